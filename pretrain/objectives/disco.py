"""DisCo-Diff (Xu et al. 2024, arXiv:2407.03300): the denoiser is told a few discrete codes of its
clean image, learnt with it inside L_IG.

Stage 1: E_y E_{z ~ E_phi(y)} E_{t,n} lambda(t) |D(y + n, t, z) - y|^2, with no term that holds the
codes together: draws at temperature 1 are all that limits them. The codes' tokens are appended to
the condition c of the generation half; the alignment half never sees them. Stage 2, the prior that
draws codes for new images: `_disco_prior.py`, `python -m pretrain disco prior`.

This objective teaches through `generate`. Its own term is an entropy bonus against collapse of the
codes, off by default: it is ours, not the paper's.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pretrain import comm
from pretrain.errors import ConfigError
from pretrain.model.diffdis import DiffDis
from pretrain.objectives._disco_codes import draw_codes, missing_entropy, use_of_codes
from pretrain.objectives._disco_nets import (
    CodeEncoder,
    CodeTokens,
    EncoderConfig,
    TransformerConfig,
)
from pretrain.objectives.base import Context, Half, Objective, ObjectiveConfig
from pretrain.rng import SampleRandom
from pretrain.types import Batch, LossTerm, Noised


class Settings(ObjectiveConfig):
    """Attributes:
    weight: any value > 0 gives codes to `generate`; it scales the entropy bonus alone.
    codes, values: M codes of K values each (paper: 10 of 100).
    temperature: tau of the Gumbel-softmax in training.
    hard: one-hot codes with the straight-through gradient; else soft draws.
    drop: share of samples whose codes are replaced by the null tokens, for guidance and for
        sampling without codes.
    min_noise: noise-to-signal ratio sigma / alpha below which every sample has the null tokens. 0
        gives codes at all noise; their gain sits at large noise (paper, app.).
    entropy_bonus: ours, not the paper's: factor of log K - H(marginal of a code over the global
        micro-batch), averaged over codes. It keeps values in use; 0.1 on the 2-D toy.
    encoder, tokens: the two networks.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"generate"})

    codes: int = Field(10, ge=1)
    values: int = Field(100, ge=2)
    temperature: float = Field(1.0, gt=0)
    hard: bool = True
    drop: float = Field(0.1, ge=0, lt=1)
    min_noise: float = Field(0.0, ge=0)
    entropy_bonus: float = Field(0.0, ge=0)
    encoder: EncoderConfig = EncoderConfig()
    tokens: TransformerConfig = TransformerConfig(layers=2)


@dataclass(frozen=True)
class Codes:
    """What `Disco.condition` leaves for the term: the encoder's logits, and which samples were
    given none of it."""

    logits_BMK: Tensor
    null_B: Tensor


class Disco(Objective):
    """Encoder and tokens of the codes.

    Args:
        encodes: False leaves the encoder out, where images are only to be drawn.
    """

    reads: ClassVar[frozenset[Half]] = frozenset({"generation"})

    def __init__(self, settings: Settings, model: DiffDis, encodes: bool = True) -> None:
        super().__init__()
        channels, side, _ = model.latent_shape
        if settings.encoder.patch > side:
            raise ConfigError(
                f"objectives.disco.encoder.patch={settings.encoder.patch} is more than the "
                f"{side} latent pixels on a side; lower it to {max(1, side // 4)}"
            )
        self.settings = settings
        if encodes:
            self.encoder = CodeEncoder(
                settings.encoder, channels, side, settings.codes, settings.values
            )
        self.tokens = CodeTokens(
            settings.tokens, settings.codes, settings.values, model.config.text_encoder.width
        )

    def condition(self, batch: Batch, noised: Noised, model: DiffDis, rng: SampleRandom) -> Noised:
        s, z = self.settings, noised.x0_z_BCHW
        logits_BMK = self.encoder(z.to(model.dtype)).float()
        u_BMK = rng.uniform("disco/gumbel", z.device, (s.codes, s.values))
        null_B = rng.uniform("disco/drop", z.device) < s.drop
        null_B = null_B | self.without_codes(model, noised.t_z_B)
        tokens_BMD = self.tokens(draw_codes(logits_BMK, u_BMK, s.temperature, s.hard), null_B)
        return replace(
            noised,
            c_BLD=torch.cat([noised.c_BLD, tokens_BMD.to(noised.c_BLD.dtype)], dim=1),
            extras=(*noised.extras, Codes(logits_BMK, null_B)),
        )

    def condition_at_inference(self, c_BLD: Tensor) -> Tensor:
        return torch.cat([c_BLD, self.null_tokens(len(c_BLD)).to(c_BLD)], dim=1)

    def save_condition(self, folder: Path, output: Path) -> bool:
        from pretrain.objectives import _disco_export

        _disco_export.save(self, folder, output)
        return True

    def fingerprint(self) -> str:
        """Of the weights that give codes their meaning."""
        digest = hashlib.sha256()
        for name, value in sorted(self.tokens.named_parameters()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def forward(self, context: Context) -> LossTerm:
        s, codes = self.settings, context.noised.extra(Codes)
        marginal_1MK = codes.logits_BMK.softmax(-1).mean(0, keepdim=True)
        if s.entropy_bonus > 0:  # of the global micro-batch: every rank holds as many samples
            marginal_1MK = comm.all_gather_with_grad(marginal_1MK).mean(0, keepdim=True)
        loss = s.entropy_bonus * missing_entropy(marginal_1MK[0])
        dropped = codes.null_B.float().mean()
        return LossTerm(loss, {**use_of_codes(codes.logits_BMK), "dropped": dropped})

    def without_codes(self, model: DiffDis, t_z_B: Tensor) -> Tensor:
        """Where the noise is too small for codes, (B,) bool."""
        schedule = model.image_path.schedule
        return schedule.sigma(t_z_B) < self.settings.min_noise * schedule.alpha(t_z_B)

    def tokens_of(self, codes_BM: Tensor) -> Tensor:
        """Tokens (B, M, D) of codes given as numbers in [0, K)."""
        one_hot = torch.nn.functional.one_hot(codes_BM, self.settings.values).float()
        none = torch.zeros(len(codes_BM), dtype=torch.bool, device=codes_BM.device)
        tokens: Tensor = self.tokens(one_hot, none)
        return tokens

    def null_tokens(self, batch: int) -> Tensor:
        """Tokens (B, M, D) that stand for no codes."""
        s, device = self.settings, self.tokens.out.weight.device
        zeros = torch.zeros(batch, s.codes, s.values, device=device)
        tokens: Tensor = self.tokens(zeros, torch.ones(batch, dtype=torch.bool, device=device))
        return tokens

    def codes_of(self, z_BCHW: Tensor, u_BMK: Tensor | None = None) -> Tensor:
        """Codes (B, M) of clean latents: draws of the encoder's distribution for uniform ``u_BMK``,
        else the likeliest values.

        The paper draws them for its second stage at tau = 0.01; the value that a Gumbel draw falls
        on is the same at every tau.
        """
        logits = self.encoder(z_BCHW.to(self.tokens.out.weight.dtype)).float()
        return logits.argmax(-1) if u_BMK is None else draw_codes(logits, u_BMK, 1, True).argmax(-1)


def build(settings: ObjectiveConfig, model: DiffDis) -> Objective:
    """The objective."""
    assert isinstance(settings, Settings)
    return Disco(settings, model)


def load_condition(folder: Path, model: DiffDis) -> Callable[..., object]:
    """The condition of generation that `Disco.save_condition` wrote.

    Raises:
        ExportError: a file is missing, or is of another model.
    """
    from pretrain.objectives._disco_export import Exported

    return Exported(folder, model)
