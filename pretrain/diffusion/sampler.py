"""Deterministic samplers over any path: from noise to x_0 along a grid of times.

A sampler sees only ``denoise(z_t, t) -> x_0``: guidance and normalisation live in the caller's
function. Agreement with diffusers' schedulers is tested in tests/parity.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pretrain.diffusion.path import Path

Denoise = Callable[[Tensor, Tensor], Tensor]
Method = Literal["ddim", "dpmpp_2m", "heun"]


def start(path: Path, eps: Tensor) -> Tensor:
    """The state at t_max: sigma(t_max) times unit noise ``eps`` (B, ...), or that noise itself."""
    if path.config.unit_start:
        return eps
    return eps * path.schedule.sigma(torch.tensor([path.schedule.t_max])).to(eps)


def sample(
    path: Path,
    denoise: Denoise,
    eps: Tensor,
    steps: int,
    method: Method = "ddim",
    last_noise: float = 0.0,
) -> Tensor:
    """Integrate from unit noise ``eps`` (B, ...) to x_0 on a grid of ``steps`` steps.

    ``heun`` calls the network 2·steps − 1 times, the others ``steps`` times. Steps whose
    noise-to-signal ratio is at most ``last_noise`` are left out; the estimate before them is final.
    """
    times = path.schedule.grid(steps).to(eps.device)
    if last_noise > 0:
        above = times[path.schedule.sigma(times) > last_noise * path.schedule.alpha(times)]
        times = torch.cat([above, times[-1:]])
    z = start(path, eps)
    memory: tuple[Tensor, Tensor] | None = None  # (log noise-to-signal, x_0) of the step before
    for t, t_next in pairwise(times):
        t_B, next_B = t.expand(len(z)), t_next.expand(len(z))
        x0 = denoise(z, t_B)
        if method == "heun":
            z = _heun(path, denoise, z, x0, t_B, next_B)
        elif method == "dpmpp_2m":
            z, memory = _dpmpp_2m(path, z, x0, t_B, next_B, memory)
        else:
            z = _ddim(path, z, x0, t_B, next_B)
    return z / path.config.gamma  # at t = 0 the path stands at gamma x_0


def _ddim(path: Path, z: Tensor, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    # DDIM with eta = 0: the same eps, at the next level (DiffDis Alg. 2 and 3).
    return path.noised(x0, path.eps_of(z, x0, t), t_next)


def _heun(path: Path, denoise: Denoise, z: Tensor, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    # Karras et al. 2022, Alg. 1, in y = z / alpha and s = sigma / alpha: dy/ds = (y - x_0) / s.
    ab = path._coefficients(t, z)
    ab_next = path._coefficients(t_next, z)
    s, s_next = ab[1] / ab[0], ab_next[1] / ab_next[0]
    slope = (z / ab[0] - x0) / s
    y_next = z / ab[0] + (s_next - s) * slope
    if bool((s_next > 0).all()):
        x0_next = denoise(ab_next[0] * y_next, t_next)
        slope_next = (y_next - x0_next) / s_next
        y_next = z / ab[0] + (s_next - s) * 0.5 * (slope + slope_next)
    return ab_next[0] * y_next


def _dpmpp_2m(
    path: Path,
    z: Tensor,
    x0: Tensor,
    t: Tensor,
    t_next: Tensor,
    memory: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    # DPM-Solver++ (Lu et al. 2022), second-order multistep, data prediction; lambda = ln(alpha /
    # sigma).
    (alpha, sigma), (alpha_next, sigma_next) = (
        path._coefficients(t, z),
        path._coefficients(t_next, z),
    )
    lam = (alpha / sigma).log()
    if bool((sigma_next == 0).all()):  # the last step, to clean data, is first order
        return alpha_next * x0, (lam, x0)
    h = (alpha_next / sigma_next).log() - lam
    d = x0
    if memory is not None:
        lam_before, x0_before = memory
        r = (lam - lam_before) / h
        d = x0 + (x0 - x0_before) / (2 * r)
    return sigma_next / sigma * z - alpha_next * torch.expm1(-h) * d, (lam, x0)
