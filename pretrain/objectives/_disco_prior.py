"""DisCo-Diff's second stage: an autoregressive transformer over the codes, max sum_i log
p(z_i | z_<i).

Shape legend: B samples, M codes, K values, D width of the condition, W width here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config, build
from pretrain.errors import ExportError
from pretrain.objectives._disco_nets import Rows, TransformerConfig, blocks
from pretrain.rng import generator

FOLDER = "disco_prior"  # below a run's output


class PriorConfig(TransformerConfig):
    """The paper's: width 512, 12 layers, 8 heads.

    Attributes:
        conditioned: whether it reads the caption's condition, averaged over tokens.
    """

    width: int = Field(256, ge=8)
    layers: int = Field(6, ge=1)
    conditioned: bool = True


class FitConfig(Config):
    """How the prior is trained.

    Attributes:
        samples: to see in all.
        lr, weight_decay, clip_norm: of AdamW, at a cosine from ``lr`` to 0.
        heldout: share of the data, by name of the sample, that it is judged by. Small data are soon
            learnt by heart; the best weights by that judgement are kept.
        judge_every: samples between judgements.
    """

    samples: int = Field(50_000, ge=1)
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    heldout: float = Field(0.05, ge=0, lt=1)
    judge_every: int = Field(5_000, ge=1)


class Prior(nn.Module):
    """p(z | c) = prod_i p(z_i | z_<i, c)."""

    def __init__(self, config: PriorConfig, codes: int, values: int, condition_dim: int) -> None:
        super().__init__()
        self.config, self.codes, self.values, self.condition_dim = (
            *(config, codes, values),
            condition_dim,
        )
        self.start = Rows(1, config.width)
        self.condition = nn.Linear(condition_dim, config.width) if config.conditioned else None
        # One table for all codes: value v of code i is row i K + v. The last code is never read.
        self.value = nn.Embedding(max(1, codes - 1) * values, config.width)
        self.position = nn.Embedding(codes, config.width)
        self.blocks = blocks(config)
        self.norm = nn.LayerNorm(config.width)
        self.logits = nn.Linear(config.width, values)
        nn.init.normal_(self.value.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, codes_BM: Tensor, pooled_BD: Tensor) -> Tensor:
        """Logits (B, M', K) of the first M' codes given those before each; ``codes_BM`` may hold M
        or fewer (then M' is one more).

        Args:
            pooled_BD: condition, see `pool`; not read by a prior without one.
        """
        device, given = codes_BM.device, min(codes_BM.shape[1], self.codes - 1)
        first = self.start(len(codes_BM))
        if self.condition is not None:
            first = first + self.condition(pooled_BD)[:, None]
        place = torch.arange(given, device=device) * self.values
        x_BLW = torch.cat([first, self.value(codes_BM[:, :given] + place)], dim=1)
        length = given + 1
        x_BLW = x_BLW + self.position(torch.arange(length, device=device))
        later = torch.ones(length, length, device=device).triu(1).bool()
        bias = torch.zeros(length, length, dtype=x_BLW.dtype, device=device)
        bias = bias.masked_fill(later, float("-inf")).expand(len(x_BLW), -1, -1)
        for block in self.blocks:
            x_BLW = block(x_BLW, bias)
        logits: Tensor = self.logits(self.norm(x_BLW))
        return logits

    def log_prob(self, codes_BM: Tensor, pooled_BD: Tensor) -> Tensor:
        """log p(z | c) in nats, (B,)."""
        log_p = self(codes_BM, pooled_BD).float().log_softmax(-1)
        return log_p.gather(-1, codes_BM[..., None]).sum((1, 2))

    @torch.no_grad()
    def sample(self, pooled_BD: Tensor, seeds: Sequence[int], temperature: float = 1.0) -> Tensor:
        """Codes (B, M), one seed for each; temperature 0 takes the likeliest value at each step."""
        device = pooled_BD.device
        # -log of uniform draws, E: the argmin of E / p is a draw of p, whatever the batch.
        draws = [
            torch.empty(self.codes, self.values).exponential_(generator=generator(s, "disco"))
            for s in seeds
        ]
        noise_BMK = torch.stack(draws).to(device)
        codes_BM = torch.zeros(len(seeds), 0, dtype=torch.long, device=device)
        for i in range(self.codes):
            logits = self(codes_BM, pooled_BD)[:, -1].float()
            if temperature > 0:
                logits = (logits / temperature).log_softmax(-1) - noise_BMK[:, i].log()
            codes_BM = torch.cat([codes_BM, logits.argmax(-1, keepdim=True)], dim=1)
        return codes_BM


def pool(c_BLD: Tensor) -> Tensor:
    """(B, D): the mean over all tokens of a condition; those at padding were encoded too."""
    return c_BLD.float().mean(1)


@dataclass(frozen=True)
class Fitted:
    """What training gave: nats for an image on its own samples and on held-out ones, where those
    were least, and the weights of then."""

    nats: float
    heldout_nats: float
    best_samples: int
    state: dict[str, Tensor]


Coded = tuple[Tensor, Tensor, Tensor]  # codes (B, M), pooled (B, D), held out (B,) bool


def fit(prior: Prior, batches: Iterator[Coded], config: FitConfig) -> Fitted:
    """Train ``prior``: the mean of -log p over samples that are not held out.

    A held-out sample is judged by the weights of the moment, and never learnt from. Without any,
    the last weights are the best.
    """
    optimizer = torch.optim.AdamW(
        prior.parameters(), config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    seen, since = 0, 0
    own: list[float] = []
    judged: list[Tensor] = []
    best = Fitted(float("nan"), float("inf"), 0, {})
    while seen < config.samples:
        codes, pooled, heldout = next(batches)
        rate = config.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * seen / config.samples)))
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        prior.train()
        nats = -prior.log_prob(codes, pooled)
        judged.append(nats.detach()[heldout])
        learnt = nats[~heldout]
        if len(learnt):
            optimizer.zero_grad()
            learnt.mean().backward()
            nn.utils.clip_grad_norm_(prior.parameters(), config.clip_norm)
            optimizer.step()
            own.append(float(learnt.detach().mean()))
        seen, since = seen + len(codes), since + len(codes)
        if since >= config.judge_every or seen >= config.samples:
            rows = torch.cat(judged)
            value = float(rows.mean()) if len(rows) else float("nan")
            if not value >= best.heldout_nats:  # NaN, where none are held out: the last
                state = {n: p.detach().clone() for n, p in prior.state_dict().items()}
                best = Fitted(sum(own) / max(1, len(own)), value, seen, state)
            own, judged, since = [], [], 0
    prior.load_state_dict(best.state)
    return best


def save(prior: Prior, folder: Path, facts: dict[str, Any]) -> None:
    """``prior.safetensors`` and ``prior.json`` (its definition, and ``facts``) in ``folder``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {n: p.detach().cpu().contiguous() for n, p in prior.state_dict().items()}
    save_file(state, folder / "prior.safetensors")
    shape = {"codes": prior.codes, "values": prior.values, "condition_dim": prior.condition_dim}
    tree = {"config": prior.config.model_dump(mode="json"), **shape, "facts": facts}
    (folder / "prior.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")


def load(folder: Path, codes: int, values: int, condition_dim: int) -> Prior:
    """The prior in ``folder``, for codes of this shape.

    Raises:
        ExportError: there is none, or it is of other codes.
    """
    from safetensors.torch import load_file

    try:
        tree = json.loads((folder / "prior.json").read_text(encoding="utf-8"))
        state = load_file(folder / "prior.safetensors")
    except (OSError, ValueError) as error:
        raise ExportError(
            f"prior={str(folder)!r} holds no prior ({error}); train one with "
            "`python -m pretrain disco prior`"
        ) from None
    found = (tree["codes"], tree["values"], tree["condition_dim"])
    if found != (codes, values, condition_dim):
        raise ExportError(
            f"prior={str(folder)!r} is of {found[0]} codes of {found[1]} values over a condition "
            f"of width {found[2]}, but the model has {codes}, {values} and {condition_dim}; train "
            "it anew"
        )
    prior = Prior(build(PriorConfig, tree["config"], "prior"), *found)
    prior.load_state_dict(state)
    return prior.eval()
