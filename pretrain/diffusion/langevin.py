"""Descending an energy, with noise and without: Langevin steps, annealed sampling, denoising."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.diffusion.energy import Energy

Slope = Callable[[Tensor], Tensor]  # dE/dx at (N, ...) points, without a graph


def slope_of(energy: Energy) -> Slope:
    """dE/dx by autograd, also where gradients are off."""

    def slope(x_N: Tensor) -> Tensor:
        with torch.enable_grad():
            x_N = x_N.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(energy(x_N).sum(), x_N)
        return gradient

    return slope


def langevin(slope: Slope, x_N: Tensor, noises: Sequence[Tensor] | Tensor, step: float) -> Tensor:
    """x <- x - step dE/dx + sqrt(2 step) xi, once for each of ``noises`` (K, N, ...): time
    2 step K of dx = -grad E / 2 dt + dw."""
    x_N = x_N.detach()
    for noise_N in noises:
        x_N = x_N - step * slope(x_N) + (2 * step) ** 0.5 * noise_N
    return x_N


def annealed_langevin(
    slope_at: Callable[[int], Slope],
    x_N: Tensor,
    sigmas: Sequence[float],
    steps: int,
    rate: float,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Annealed Langevin dynamics (Song and Ermon 2019, Alg. 1): ``steps`` Langevin steps at each
    level, from the noisiest to the cleanest, of size ``rate`` sigma_i^2.

    Args:
        slope_at: slope of the energy of level i.
        sigmas: rising; sigmas[0] may be 0 (clean data), whose steps are then those of level 1.
    """
    for level in reversed(range(len(sigmas))):
        sigma = sigmas[level] or sigmas[1]
        slope = slope_at(level)
        for _ in range(steps):
            x_N = langevin(slope, x_N, [noise(x_N)], rate * sigma**2)
    return x_N


def denoise(
    energy: Energy, y_N: Tensor, sigma: float, steps: int = 100, rate: float = 0.05
) -> Tensor:
    """The likeliest x given y = x + sigma xi: descend E(x) + |x - y|^2 / 2 sigma^2 from y, by
    steps of ``rate`` sigma^2."""
    slope, x_N = slope_of(energy), y_N.detach()
    for _ in range(steps):
        x_N = x_N - rate * (sigma**2 * slope(x_N) + x_N - y_N)
    return x_N
