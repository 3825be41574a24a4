"""Langevin steps, annealed sampling and denoising, where the answer is known."""

import math

import pytest
import torch

from pretrain.diffusion.langevin import annealed_langevin, denoise, langevin, slope_of

G = torch.Generator


def test_steps_have_the_variance_of_the_linear_recursion():
    v, step, k = 0.5, 0.2, 6
    g = G().manual_seed(0)
    x, noises = torch.zeros(40_000, 1), torch.randn(k, 40_000, 1, generator=g)
    found = langevin(slope_of(lambda p: p[:, 0] ** 2 / (2 * v)), x, noises, step)
    variance = 0.0
    for _ in range(k):
        variance = (1 - step / v) ** 2 * variance + 2 * step
    assert found.var().item() == pytest.approx(variance, rel=0.03)
    assert not found.requires_grad


def test_annealing_finds_the_weights_of_modes_that_are_far_apart():
    """Weights .2 and .8 at -4 and 4: from noise, by the exact energies of the diffused data."""
    sigmas = [0.0, *(0.5 * 2 ** (i / 2) for i in range(9))]

    def slope_at(level):
        v = 0.09 + sigmas[level] ** 2

        def energy(p):
            logs = [math.log(w) - (p[:, 0] - m) ** 2 / (2 * v) for w, m in ((0.2, -4), (0.8, 4))]
            return -torch.stack(logs).logsumexp(0)

        return slope_of(energy)

    g = G().manual_seed(0)
    x = annealed_langevin(
        slope_at,
        8 * torch.randn(2000, 1, generator=g),
        sigmas,
        steps=40,
        rate=0.1,
        noise=lambda like: torch.randn(like.shape, generator=g),
    )
    assert (x < 0).float().mean().item() == pytest.approx(0.2, abs=0.05)
    assert (x.abs() - 4).abs().mean() < 0.6
    plain = langevin(
        slope_at(0), 0.1 + 0 * x, [torch.randn(2000, 1, generator=g) for _ in range(240)], 0.01
    )
    assert abs((plain < 0).float().mean().item() - 0.2) > 0.1, "annealing was not needed"


def test_denoising_a_gaussian_is_wiener_filtering():
    v, sigma = 0.4, 0.5
    y = torch.linspace(-2, 2, 9)[:, None]
    x = denoise(lambda p: p[:, 0] ** 2 / (2 * v), y, sigma, steps=300, rate=0.1)
    assert torch.allclose(x, y * v / (v + sigma**2), atol=1e-4)
