"""The forward process of one stream, and what a network's output F stands for.

Two separate choices. The path noises: z_t = gamma alpha x_0 + sigma eps. The parametrisation reads
F: every one in use is affine, x_0 = skip z_t + out F(in z_t), so four rows of coefficients cover
eps, x0, v and EDM, and the loss of each is the plain mean square error between F and the F that
would be right.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from pretrain.config import Config
from pretrain.diffusion.schedule import (
    EDMConfig,
    ScaledLinearConfig,
    Schedule,
    ScheduleConfig,
    build_schedule,
)

Parametrisation = Literal["eps", "x0", "v", "edm"]


class StreamConfig(Config):
    """The diffusion of one stream.

    Attributes:
        schedule: alpha and sigma over time.
        predict: what F stands for. The paper's image stream is eps over scaled_linear; its text
            stream x0.
        gamma: scale of the signal in z_t, in (0, 1] (DiffDis: e_t = gamma sqrt(abar) e_0 + ...).
        unit_start: whether a sampler's chain starts at noise of unit scale, as diffusers' pipelines
            do (at SD's last time sigma is 0.9977), instead of at sigma(t_max).
        sigma_data: standard deviation of clean data; read by ``predict: edm`` alone.
    """

    schedule: ScheduleConfig = ScaledLinearConfig()
    predict: Parametrisation = "eps"
    gamma: float = Field(1.0, gt=0, le=1)
    unit_start: bool = False
    sigma_data: float = Field(0.5, gt=0)


class Path:
    """One stream's forward process and the algebra between z_t, eps, x_0 and F.

    Times are shape (B,), signals (B, ...).
    """

    def __init__(self, config: StreamConfig) -> None:
        self.config = config
        self.schedule: Schedule = build_schedule(config.schedule)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1,) * (like.ndim - 1))
        alpha = self.schedule.alpha(t).view(shape) * self.config.gamma
        return alpha, self.schedule.sigma(t).view(shape)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = gamma alpha(t) x_0 + sigma(t) eps."""
        alpha, sigma = self._coefficients(t, x0)
        return alpha * x0 + sigma * eps

    def eps_of(self, z_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The noise that leads from ``x0`` to ``z_t``; t > 0."""
        alpha, sigma = self._coefficients(t, z_t)
        return (z_t - alpha * x0) / sigma

    def network_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """What the network is fed: z_t, scaled to unit variance under EDM (its c_in)."""
        return self._skip_out_in(z_t, t)[2] * z_t

    def x0_of(self, f: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x_0 that the raw output ``f`` stands for."""
        skip, out, _ = self._skip_out_in(z_t, t)
        return skip * z_t + out * f

    def f_target(self, x0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The raw output that would be exactly right; the MSE to it is the loss of every
        parametrisation.

        For eps that is Eq. 4 of DiffDis; for EDM it equals lambda(sigma) |D - x_0|^2 (Karras et al.
        2022, Eq. 8).
        """
        skip, out, _ = self._skip_out_in(z_t, t)
        return (x0 - skip * z_t) / out

    def _skip_out_in(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self._coefficients(t, z_t)
        one = alpha.new_ones(())
        match self.config.predict:
            case "eps":
                return 1 / alpha, -sigma / alpha, one
            case "x0":
                return 0 * one, one, one
            case "v":  # v = alpha eps - sigma x_0, for alpha^2 + sigma^2 = 1
                return alpha, -sigma, one
            case "edm":  # Karras et al. 2022, Table 1, on z_t / alpha
                data = self.config.sigma_data
                s = sigma / alpha
                total = s**2 + data**2
                return data**2 / total / alpha, s * data / total.sqrt(), 1 / total.sqrt() / alpha


def build_path(config: StreamConfig) -> Path:
    """The path of ``config``.

    Raises:
        ConfigError: the parametrisation does not go with the schedule.
    """
    from pretrain.errors import ConfigError

    if config.predict == "v" and (isinstance(config.schedule, EDMConfig) or config.gamma != 1):
        raise ConfigError(
            "diffusion predict='v' needs a variance-preserving path (alpha^2 + sigma^2 = 1); "
            "use schedule.kind=scaled_linear with gamma=1, or predict=edm"
        )
    if config.unit_start and isinstance(config.schedule, EDMConfig):
        raise ConfigError(
            "diffusion unit_start=true over schedule.kind=edm, whose chains start at sigma_max="
            f"{config.schedule.sigma_max}; remove it"
        )
    if config.predict == "eps" and isinstance(config.schedule, EDMConfig):
        raise ConfigError(
            "diffusion predict='eps' over schedule.kind=edm leaves the network's input unscaled "
            "(sigma up to "
            f"{config.schedule.sigma_max}); use predict=edm, or schedule.kind=scaled_linear"
        )
    return Path(config)
