"""How much the trajectories of a probability-flow ODE bend: what few steps of a sampler cost."""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma_B) -> x_0 estimate


def tangent(denoise: Denoise, x: Tensor, sigma_B: Tensor) -> Tensor:
    """Unit tangent T of dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, Eq. 3), the
    noise level falling; zero where the field is."""
    shape = (-1, *(1,) * (x.ndim - 1))
    slope = (x - denoise(x, sigma_B)) / sigma_B.view(shape)
    norm = slope.flatten(1).norm(dim=1).view(shape)
    return -slope / norm.clamp(min=1e-30)


def curvature(denoise: Denoise, x: Tensor, sigma_B: Tensor, step: float = 1e-3) -> Tensor:
    """|T(t) - T(t - dt)| / |x(t) - x(t - dt)| (DisCo-Diff app. F), (B,), in 1 / units of x.

    Args:
        denoise: x_0 of x = x_0 + sigma eps.
        x: states (B, ...) at ``sigma_B`` > ``step``.
        step: dt, in units of sigma; one Heun step leads to x(t - dt).
    """
    shape = (-1, *(1,) * (x.ndim - 1))
    here, there = sigma_B.view(shape), (sigma_B - step).view(shape)
    slope = (x - denoise(x, sigma_B)) / here
    guess = x - step * slope
    after = x - step * 0.5 * (slope + (guess - denoise(guess, sigma_B - step)) / there)
    turned = tangent(denoise, x, sigma_B) - tangent(denoise, after, sigma_B - step)
    moved = (x - after).flatten(1).norm(dim=1)
    return turned.flatten(1).norm(dim=1) / moved.clamp(min=1e-30)


def trajectory_curvature(denoise: Denoise, x: Tensor, sigmas: Tensor, step: float = 1e-3) -> Tensor:
    """Curvature at every noise level of Heun trajectories from ``x``, (len(sigmas), B).

    Args:
        x: states (B, ...) at sigmas[0].
        sigmas: decreasing, the last > ``step``.
    """
    found = []
    for i, sigma in enumerate(sigmas):
        sigma_B = sigma.expand(len(x))
        found.append(curvature(denoise, x, sigma_B, step))
        if i + 1 < len(sigmas):
            slope = (x - denoise(x, sigma_B)) / sigma
            below = sigmas[i + 1]
            guess = x + (below - sigma) * slope
            slope_below = (guess - denoise(guess, below.expand(len(x)))) / below
            x = x + (below - sigma) * 0.5 * (slope + slope_below)
    return torch.stack(found)
