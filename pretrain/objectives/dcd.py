"""L_DCD, an energy of the text query given the image: E(e | z), trained by diffusion contrastive
divergence (DCD, arXiv:2307.01668; losses and their names in `pretrain.diffusion.energy`).

A small head reads the alignment half's final text token, which has seen z, and a point: the clean
query, projected to at most 64 dimensions by a fixed rotation, for an estimate over a finite time
degrades where dimensions are many. z and the token stay as they are while the point diffuses, so a
step costs no further pass of the trunk, and over a finite time only M more rows of the head. The
query is data: nothing flows back into the text encoder, which could otherwise make the energy easy.

It wants captions that differ: `align` beside it, or a frozen text encoder. What is learned is
p(e | z) ∝ exp(-E(e | z)): classes compete by argmin_c E(e_c | z)
(`_dcd_inference`), one more way to classify.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain import comm
from pretrain.diffusion import energy
from pretrain.diffusion.energy import Contrast, Derivatives, Energy, Levels
from pretrain.diffusion.langevin import Slope, langevin
from pretrain.errors import ConfigError
from pretrain.model.diffdis import DiffDis
from pretrain.model.energy_net import EnergyHead
from pretrain.objectives.base import Context, Half, Objective, ObjectiveConfig
from pretrain.rng import generator
from pretrain.types import LossTerm


class Settings(ObjectiveConfig):
    """Off unless a config gives it a weight. Times and steps are in units of the captions' own
    spread (`Unit`): a ``time`` of 1 is noise as large as what tells the batch's captions apart.

    Attributes:
        estimator: "finite" (DCD over ``time``, ED estimator), "one_step" (DCD-VE or DCD-VP over
            ``delta``, Fokker-Planck: a double backward pass through the head), or "cd" (CD-k, the
            baseline: k = ``langevin_steps``).
        against: what "finite" integrates over: "noise", draws about the noised query, M =
            ``negatives`` of them; or "captions" (ours), the own and the M next captions of the
            global batch (all, if fewer), which makes the integral exact over what they are.
        dim: of the projected query.
        width: hidden units of the head.
        process: the diffusion: "ve" dx = dw, "vp" dx = -x/2 dt + dw.
        time: T of "finite".
        delta: of "one_step".
        negatives: M.
        stabilizer: w of the ED estimator.
        levels: more than one makes the energy time-dependent, E(e, t | z), at as many noise levels
            from clean to ``last_sigma``, for sampling; "finite" against "noise" only.
        last_sigma: the noisiest level.
        langevin_steps, langevin_step: of "cd".
        energy_l2: factor of the mean square of energies (JEM: 0.1 keeps CD from running away).
    """

    weight: float = Field(0.0, ge=0)
    estimator: Literal["finite", "one_step", "cd"] = "finite"
    against: Literal["noise", "captions"] = "noise"
    dim: int = Field(16, ge=1, le=64)
    width: int = Field(128, ge=1)
    process: energy.Process = "ve"
    time: float = Field(0.25, gt=0)
    delta: float = Field(0.02, gt=0)
    negatives: int = Field(16, ge=1)
    stabilizer: float = Field(1.0, ge=0)
    levels: int = Field(1, ge=1)
    last_sigma: float = Field(3.0, gt=0)
    langevin_steps: int = Field(10, ge=1)
    langevin_step: float = Field(0.01, gt=0)
    energy_l2: float = Field(0.0, ge=0)

    @property
    def spread(self) -> float:
        """Noise-to-signal ratio of the finite-time kernel."""
        return energy.spread(self.process, self.time)

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        if self.against == "captions" and self.estimator != "finite":
            raise ValueError(
                f"against='captions' goes with estimator='finite', not {self.estimator!r}; "
                "leave out against, or set estimator=finite"
            )
        if self.levels > 1:
            if self.estimator != "finite" or self.against != "noise":
                raise ValueError(
                    f"levels={self.levels} goes with estimator='finite' and against='noise' only; "
                    "set them so, or levels=1"
                )
            if self.last_sigma <= self.spread:
                raise ValueError(
                    f"last_sigma={self.last_sigma} is not above the first level's "
                    f"{self.spread:.3g} (of time={self.time}); raise last_sigma or lower time"
                )
        return self


class DCD(Objective):
    """The head, the projection, and the loss by each estimator."""

    reads: ClassVar[frozenset[Half]] = frozenset({"alignment"})

    def __init__(self, settings: Settings, query_dim: int, token_width: int) -> None:
        super().__init__()
        self.settings = settings
        self.levels = Levels.geometric(settings.spread, settings.last_sigma, settings.levels)
        self.head = EnergyHead(token_width, settings.dim, settings.width, settings.levels)
        # A function of the two widths alone, so no checkpoint need hold it; in fp32 beside bf16
        # weights, so no buffer.
        g = generator("dcd/projection", query_dim, settings.dim)
        square = torch.randn(
            query_dim, settings.dim, generator=g, dtype=torch.float64, device="cpu"
        )
        rotation = torch.linalg.qr(square).Q  # orthonormal columns
        self._projection = ((query_dim**0.5 * rotation).float(),)

    def project(self, e_BE: Tensor) -> Tensor:
        """Queries (unit rows) as points, fp32, (B, D); coordinates of mean square 1, were queries
        spread evenly."""
        return e_BE.detach().float() @ self._projection[0].to(e_BE.device)

    def forward(self, context: Context) -> LossTerm:
        token_BW, e0_hat_BE = context.output.token_BW, context.output.e0_hat_BE
        assert token_BW is not None and e0_hat_BE is not None
        contrast = self._contrast(context, token_BW, self.project(context.noised.text.e_BE))
        loss = contrast.loss_B.mean()
        if self.settings.energy_l2 > 0:
            squares = contrast.data_B.square().mean() + contrast.other_KB.square().mean()
            loss = loss + self.settings.energy_l2 * squares
        # The predictor of ê_0 takes part in every step, though nothing else may read it.
        loss = loss + 0.0 * e0_hat_BE.float().sum()
        gap_KB = contrast.other_KB - contrast.data_B
        return LossTerm(loss, {"gap": gap_KB.mean(), "above": (gap_KB > 0).float().mean()})

    def _contrast(self, context: Context, token_BW: Tensor, x_BD: Tensor) -> Contrast:
        s, rng, device = self.settings, context.rng, x_BD.device
        level_B = self.levels.pick(rng.uniform("dcd/level", device))
        all_ND = comm.all_gather(x_BD)
        unit = Unit.of(all_ND)
        u_BD = unit.enter(x_BD)

        def score(u_ND: Tensor) -> Tensor:
            energies: Tensor = self.head(token_BW, unit.leave(u_ND), level_B)[0]
            return energies

        noise_BD = rng.normal("dcd/noise", (s.dim,), device)
        if s.against == "captions":
            return self._over_captions(score, unit.enter(all_ND), u_BD, noise_BD)
        if s.estimator == "finite":
            if s.levels > 1:  # u ~ p_d^(sigma_i)
                start = rng.normal("dcd/start", (s.dim,), device)
                u_BD = u_BD + self.levels.sigma(level_B)[:, None] * start
            draws_MBD = rng.normal("dcd/noises", (s.negatives, s.dim), device).transpose(0, 1)
            kernel = self.levels.spread(level_B)[:, None]
            return energy.discrepancy(score, u_BD, noise_BD, draws_MBD, kernel, s.stabilizer)
        if s.estimator == "one_step":
            probe_BD = rng.normal("dcd/probe", (s.dim,), device).sign()

            def differentiate(u_BD: Tensor, probe_BD: Tensor) -> Derivatives:
                return self.derivatives(token_BW, u_BD, level_B, unit, probe_BD)

            return energy.one_step(
                score, u_BD, noise_BD, probe_BD, s.delta, s.process, differentiate
            )
        draws_KBD = rng.normal("dcd/langevin", (s.langevin_steps, s.dim), device).transpose(0, 1)
        slope = self.slope(token_BW.detach(), level_B, unit)
        return energy.contrastive(score, u_BD, langevin(slope, u_BD, draws_KBD, s.langevin_step))

    def derivatives(
        self, token_BW: Tensor, u_BD: Tensor, level_B: Tensor, unit: "Unit", probe_BD: Tensor
    ) -> Derivatives:
        """Of the energy of standardised points, by these."""
        value_B, gradient_BD, laplacian_B = self.head(token_BW, unit.leave(u_BD), level_B, probe_BD)
        return Derivatives(value_B, unit.scale * gradient_BD, unit.scale**2 * laplacian_B)

    def slope(self, token_BW: Tensor, level_B: Tensor, unit: "Unit") -> Slope:
        """dE/du without a graph, for Langevin steps."""

        def slope(u_BD: Tensor) -> Tensor:
            probe_BD = torch.zeros_like(u_BD)
            return self.derivatives(token_BW, u_BD, level_B, unit, probe_BD).gradient.detach()

        return slope

    def _over_captions(
        self, score: Energy, all_ND: Tensor, u_BD: Tensor, noise_BD: Tensor
    ) -> Contrast:
        """Candidates: the own caption first, then those of the next samples of the global batch."""
        n, b = len(all_ND), len(u_BD)
        if n < 2:
            raise ConfigError(
                "objectives.dcd.against='captions' with one sample in the batch has nothing to "
                "stand against it; raise engine.micro_batch, or set objectives.dcd.against=noise"
            )
        own_B = torch.arange(b, device=u_BD.device) + comm.rank() * b
        offsets_K = torch.arange(min(n, self.settings.negatives + 1), device=u_BD.device)
        candidates_KBD = all_ND[(own_B[None] + offsets_K[:, None]) % n]
        energies_KB = score(candidates_KBD.flatten(0, 1)).view(-1, b)
        y_BD = u_BD + self.settings.spread * noise_BD
        squared_KB = (candidates_KBD - y_BD).square().sum(-1)
        return energy.over_candidates(energies_KB, squared_KB, self.settings.spread)


@dataclass(frozen=True)
class Unit:
    """Standardised points u = (x - mean) / scale: the unit of times and steps is the spread of the
    captions at hand, which changes as their encoder learns. The head itself reads x.

    Attributes:
        mean_1D: of the points.
        scale: root mean square deviation of a coordinate, 0-dimensional; 1 of one point alone.
    """

    mean_1D: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x_ND: Tensor) -> "Unit":
        """That of some captions, such as the global batch."""
        mean_1D = x_ND.mean(0, keepdim=True)
        scale = (x_ND - mean_1D).square().mean().sqrt()
        return cls(mean_1D, torch.where(scale > 1e-6, scale, torch.ones_like(scale)))

    def enter(self, x_ND: Tensor) -> Tensor:
        """Points to standardised points."""
        return (x_ND - self.mean_1D) / self.scale

    def leave(self, u_ND: Tensor) -> Tensor:
        """And back."""
        return self.mean_1D + self.scale * u_ND


def build(settings: ObjectiveConfig, model: DiffDis) -> Objective:
    """The objective.

    Raises:
        ConfigError: the query is not as wide as its projection.
    """
    assert isinstance(settings, Settings)
    query_dim = model.config.text_encoder.query_dim
    if settings.dim > query_dim:
        raise ConfigError(
            f"objectives.dcd.dim={settings.dim} is more than model.text_encoder.query_dim="
            f"{query_dim}; lower objectives.dcd.dim to {query_dim} or less"
        )
    return DCD(settings, query_dim, model.config.text_stream.head_width)
