"""Noise schedules: alpha(t), sigma(t), their inverse, the times to train at and the grid to sample
on.

Every schedule measures time so that t = 0 is clean data (alpha = 1, sigma = 0) and t = `t_max` is
the noisiest. All functions are elementwise over tensors of times.
"""

import math
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from pretrain.config import Config


class Schedule(Protocol):
    """z_t = alpha(t) x_0 + sigma(t) eps."""

    t_max: float

    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient in [0, 1]."""

    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient, >= 0."""

    def time_of(self, noise_to_signal: Tensor) -> Tensor:
        """The inverse: the time at which sigma / alpha has this value."""

    def embed(self, t: Tensor) -> Tensor:
        """The number in [0, 1000] that the network's sinusoidal time embedding reads; 0 for clean
        data."""

    def training_times(self, u: Tensor) -> Tensor:
        """Uniform draws in [0, 1) to training times: the schedule's own training distribution."""

    def grid(self, steps: int) -> Tensor:
        """steps + 1 decreasing times from `t_max` to 0, for a sampler."""


class ScaledLinearConfig(Config):
    """Stable Diffusion's schedule (DDPM with sqrt(beta) linear); defaults are SD 1.x's."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    steps: int = Field(1000, ge=2)
    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)


class EDMConfig(Config):
    """EDM (Karras et al. 2022): alpha = 1, ln sigma ~ N(p_mean, p_std^2) in training, rho-grid in
    sampling."""

    kind: Literal["edm"] = "edm"
    p_mean: float = -1.2
    p_std: float = Field(1.2, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    rho: float = Field(7.0, gt=0)


ScheduleConfig = Annotated[ScaledLinearConfig | EDMConfig, Field(discriminator="kind")]


class ScaledLinear:
    """Variance-preserving, discrete times 0..T; time k >= 1 is diffusers' timestep k - 1.

    Between integers ln(alpha-bar) is linear, so that `time_of` is an exact inverse.
    """

    def __init__(self, config: ScaledLinearConfig) -> None:
        # On the CPU also where a model is made on the meta device: from_pretrained of transformers
        # can leave torch.device("meta") with a torch.linspace in mind that is no longer it.
        kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps, **kind)
        log_abar = torch.log1p(-(roots**2)).cumsum(0)
        self._log_abar = torch.cat([torch.zeros(1, **kind), log_abar])  # index 0: clean
        self.t_max = float(config.steps)

    def _log_alpha(self, t: Tensor) -> Tensor:
        table = self._log_abar.to(t.device)
        low = t.floor().long().clamp(0, len(table) - 2)
        part = t.double() - low
        return 0.5 * torch.lerp(table[low], table[low + 1], part)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp().float()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt().float()

    def time_of(self, noise_to_signal: Tensor) -> Tensor:
        log_abar = -torch.log1p(noise_to_signal.double() ** 2)
        table = self._log_abar.to(log_abar.device)
        # searchsorted wants an ascending table; ln(alpha-bar) falls with time.
        high = torch.searchsorted(-table, -log_abar).clamp(1, len(table) - 1)
        low = high - 1
        return (low + (log_abar - table[low]) / (table[high] - table[low])).float()

    def embed(self, t: Tensor) -> Tensor:
        return (t - 1).clamp(min=0) * (1000 / self.t_max)

    def training_times(self, u: Tensor) -> Tensor:
        return (u * self.t_max).floor() + 1  # uniform over {1..T}

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(self.t_max, 0, steps + 1).round()


class EDM:
    """Variance-exploding with alpha = 1 and sigma(t) = t."""

    def __init__(self, config: EDMConfig) -> None:
        self.config = config
        self.t_max = config.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_of(self, noise_to_signal: Tensor) -> Tensor:
        return noise_to_signal

    def embed(self, t: Tensor) -> Tensor:
        # EDM feeds ln(sigma)/4; the same coordinate stretched over the range that the embedding
        # resolves.
        low, high = math.log(self.config.sigma_min), math.log(self.config.sigma_max)
        return ((t.clamp(min=self.config.sigma_min).log() - low) / (high - low) * 1000).clamp(
            0, 1000
        )

    def training_times(self, u: Tensor) -> Tensor:
        # The tails are cut at 1e-6 so that the largest sigma stays finite.
        normal = torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))
        return (self.config.p_mean + self.config.p_std * normal).exp().float()

    def grid(self, steps: int) -> Tensor:
        c = self.config
        ramp = (
            torch.linspace(0, 1, steps, dtype=torch.float64)
            if steps > 1
            else torch.zeros(1).double()
        )
        sigmas = (
            c.sigma_max ** (1 / c.rho) * (1 - ramp) + c.sigma_min ** (1 / c.rho) * ramp
        ) ** c.rho
        return torch.cat([sigmas, torch.zeros(1).double()]).float()


def build_schedule(config: ScaledLinearConfig | EDMConfig) -> Schedule:
    """The schedule that ``config`` describes."""
    return EDM(config) if isinstance(config, EDMConfig) else ScaledLinear(config)
