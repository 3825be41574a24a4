"""What the verbs of `disco` share: a trained run with codes, and the codes of its data."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.config import build, merge, parse_override
from pretrain.data.loader import Loader
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.export import load_task
from pretrain.objectives._disco_codes import entropy
from pretrain.objectives._disco_prior import Coded, FitConfig, Prior, PriorConfig, pool
from pretrain.objectives.disco import Disco
from pretrain.rng import SampleRandom, derive_seed
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask


def settings(overrides: Sequence[str]) -> tuple[PriorConfig, FitConfig]:
    """Of ``prior.field=value`` and ``fit.field=value``.

    Raises:
        ConfigError: an unknown field.
    """
    tree: dict[str, Any] = {"prior": {}, "fit": {}}
    for text in overrides:
        tree = merge(tree, parse_override(text))
    unknown = sorted(set(tree) - {"prior", "fit"})
    if unknown:
        raise ConfigError(f"--set {unknown[0]}: unknown; there are prior.* and fit.*")
    return build(PriorConfig, tree["prior"], "prior"), build(FitConfig, tree["fit"], "fit")


def load(
    output: str, which: str, weights: str | None
) -> tuple[PretrainTask, RunConfig, Tokenizer, Disco]:
    """A trained task, and its codes.

    Raises:
        ConfigError: it was trained without them.
    """
    task, config, tokenizer, _ = load_task(output, which=which, weights=weights)
    for objective in task.objectives.values():
        if isinstance(objective, Disco):
            return task, config, tokenizer, objective
    raise ConfigError(
        f"output={output!r} was trained without codes; set objectives.disco.weight > 0 and train"
    )


def new_prior(task: PretrainTask, disco: Disco, config: PriorConfig, seed: int) -> Prior:
    """A freshly initialised prior for a run's codes."""
    torch.manual_seed(seed)
    s = disco.settings
    return Prior(config, s.codes, s.values, task.model.config.text_encoder.width)


class Use:
    """How often each value of each code came, over all that was encoded."""

    def __init__(self, disco: Disco) -> None:
        self.counts_MK = torch.zeros(disco.settings.codes, disco.settings.values)

    def add(self, codes_BM: Tensor) -> None:
        """Count."""
        ones = torch.ones(codes_BM.T.shape)
        self.counts_MK.scatter_add_(1, codes_BM.T.cpu(), ones)

    def facts(self) -> dict[str, list[float]]:
        """``perplexity`` of each code: how many values it uses, in effect."""
        p_MK = self.counts_MK / self.counts_MK.sum(1, keepdim=True).clamp(min=1)
        return {"perplexity": [round(float(x), 3) for x in entropy(p_MK).exp()]}


def coded(
    task: PretrainTask,
    config: RunConfig,
    tokenizer: Tokenizer,
    disco: Disco,
    batch: int,
    seed: int,
    fit: FitConfig,
    use: Use,
) -> Iterator[Coded]:
    """Codes and pooled conditions of the run's training data, captions dropped as in training; for
    ever. ``seed`` is of the order and the draws, unlike the run's."""
    loader = Loader(config.data, tokenizer, derive_seed("disco", seed), batch, 0, 1)
    s = disco.settings
    device = task.model.null_tokens_L.device
    for given in loader:
        moved = given.to(device)
        with torch.no_grad():
            noised = task.noise(moved)
            rng = SampleRandom(derive_seed("disco", seed), given.positions_B)
            u_BMK = rng.uniform("codes", device, (s.codes, s.values))
            codes_BM = disco.codes_of(noised.x0_z_BCHW, u_BMK)
        use.add(codes_BM)
        heldout = [
            derive_seed("heldout", key) % 10_000 < fit.heldout * 10_000 for key in given.keys
        ]
        yield codes_BM, pool(noised.c_BLD), torch.tensor(heldout, device=device)
