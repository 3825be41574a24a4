"""DCD's estimators against closed forms: Gaussians in one dimension, expectations by quadrature."""

import itertools
import math

import numpy as np
import pytest
import torch

from pretrain.diffusion import energy as dcd
from pretrain.diffusion.energy import Levels

DATA, MODEL = (0.3, 0.7), (-0.4, 1.6)  # mean and variance
PROCESSES = ["ve", "vp"]


def nodes(n=20):
    """Gauss-Hermite: points and weights of a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


def pairs(mean, variance):
    """All pairs of a data point and a draw, (B, 1) each, and their weights (B,)."""
    x, w = nodes()
    data = mean + math.sqrt(variance) * x
    grid = torch.cartesian_prod(data, x)
    return grid[:, :1], grid[:, 1:], torch.cartesian_prod(w, w).prod(1)


def quantiles(m=2001):
    return torch.special.ndtri((torch.arange(m).double() + 0.5) / m)


def gaussian(mean, variance):
    return lambda x: (x[:, 0] - mean) ** 2 / (2 * variance)


def kl(a, b):
    """KL between normals given as (mean, variance)."""
    (m, v), (n, w) = a, b
    w, n = torch.as_tensor(w), torch.as_tensor(n)
    return 0.5 * (w.log() - math.log(v) + (v + (m - n) ** 2) / w - 1)


def diffused(p, process, time):
    mean, variance = p
    if process == "ve":
        return mean, variance + time
    return math.exp(-time / 2) * mean, math.exp(-time) * variance - math.expm1(-time)


def divergence(data, model, process, time):
    return kl(data, model) - kl(diffused(data, process, time), diffused(model, process, time))


def finite(energy, process, time):
    x, xi, weight = pairs(*DATA)
    back = quantiles()[:, None, None].expand(-1, len(x), 1)
    spread = dcd.spread(process, time)
    return (weight * dcd.discrepancy(energy, x, xi, back, spread, 0.0).loss_B).sum()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("time", [0.05, 0.5, 2.0])
def test_finite_time_is_the_divergence_up_to_a_constant(process, time):
    mine = finite(gaussian(*MODEL), process, time) - finite(gaussian(*DATA), process, time)
    assert mine.item() == pytest.approx(divergence(DATA, MODEL, process, time).item(), rel=5e-3)


def test_finite_time_is_the_integral_of_squared_score_differences():
    """D = 1/2 ∫ g^2 E |grad log p_d - grad log p_theta|^2 dt, with the analytic scores."""
    (m, v), (n, w), time = DATA, MODEL, 0.5
    t = torch.linspace(0, time, 2001).double()
    slope, shift = 1 / (w + t) - 1 / (v + t), (m - n) / (w + t)
    integral = 0.5 * torch.trapezoid((v + t) * slope**2 + shift**2, t)
    mine = finite(gaussian(n, w), "ve", time) - finite(gaussian(m, v), "ve", time)
    assert mine.item() == pytest.approx(integral.item(), rel=5e-3)


@pytest.mark.parametrize("at", [MODEL, DATA])
def test_the_gradient_is_the_divergences(at):
    theta = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in at]
    mine = torch.autograd.grad(finite(gaussian(*theta), "ve", 0.5), theta)
    analytic = torch.autograd.grad(divergence(DATA, theta, "ve", 0.5), theta)
    for a, b in zip(mine, analytic, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=5e-3, abs=2e-3)


def score_matching(theta):
    """E_{p_d} [|E'|^2 / 2 - E''] of a Gaussian energy, implicit score matching."""
    mean, variance = theta
    (m, v) = DATA
    return (v + (m - mean) ** 2) / (2 * variance**2) - 1 / variance


@pytest.mark.parametrize("process", PROCESSES)
def test_one_step_tends_to_score_matching(process):
    x, xi, weight = pairs(*DATA)
    theta = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in MODEL]
    probe, errors = torch.ones_like(x), []
    for delta in (1e-1, 1e-2, 1e-3):
        term = dcd.one_step(gaussian(*theta), x, xi, probe, delta, process)
        constant = 0.5 if process == "vp" else 0.0  # -div f
        loss = (weight * term.loss_B).sum() - constant
        slopes = torch.autograd.grad(loss, theta, retain_graph=True)
        right = torch.autograd.grad(score_matching(theta), theta)
        errors.append(
            [abs(loss.item() - score_matching(theta).item())]
            + [abs((a - b).item()) for a, b in zip(slopes, right, strict=True)]
        )
    for far, near in itertools.pairwise(errors):
        assert all(b < 0.15 * a + 1e-9 for a, b in zip(far, near, strict=True)), errors
    assert max(errors[-1]) < 1e-3


def test_one_step_is_the_divergence_over_delta():
    x, xi, weight = pairs(*DATA)
    delta, one = 1e-3, torch.ones_like(x)
    of = [dcd.one_step(gaussian(*p), x, xi, one, delta).loss_B for p in (MODEL, DATA)]
    mine = (weight * (of[0] - of[1])).sum()
    assert mine.item() == pytest.approx(
        divergence(DATA, MODEL, "ve", delta).item() / delta, rel=5e-3
    )


def test_contrastive_divergence_keeps_half_of_the_limit():
    """CD-1 of time delta: its gradient tends to delta/2 that of score matching (Hyvärinen 2007);
    DCD's one step to all of it. What differs is the gradient that CD drops."""
    x, xi, weight = pairs(*DATA)
    theta = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in MODEL]
    energy, delta = gaussian(*theta), 1e-4
    from pretrain.diffusion.langevin import langevin, slope_of

    negative = langevin(slope_of(energy), x, [xi], delta / 2)
    cd = (weight * dcd.contrastive(energy, x, negative).loss_B).sum() / delta
    right = torch.autograd.grad(score_matching(theta), theta)
    for a, b in zip(torch.autograd.grad(cd, theta), right, strict=True):
        assert a.item() == pytest.approx(0.5 * b.item(), rel=2e-3)


def test_langevin_of_the_model_leaves_the_model_alone():
    """So CD is the member of the family whose Fokker-Planck term is zero."""
    x = torch.randn(7, 1, dtype=torch.float64)
    at = dcd.derivatives(gaussian(*MODEL), x, torch.ones_like(x))
    assert dcd.log_density_rate(x, at, "langevin").abs().max() < 1e-12
    assert dcd.log_density_rate(x, at, "ve").abs().min() > 1e-3


@pytest.mark.parametrize("process", PROCESSES)
def test_the_rate_is_that_of_the_diffused_density(process):
    """d/dt log p^(t) of a Gaussian, by differences of the closed form."""
    x, h = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 1e-6

    def log_p(time):
        m, v = diffused(MODEL, process, time)
        return -((x[:, 0] - m) ** 2) / (2 * v) - 0.5 * math.log(2 * math.pi * v)

    at = dcd.derivatives(gaussian(*MODEL), x, torch.ones_like(x))
    assert torch.allclose(
        dcd.log_density_rate(x, at, process), (log_p(h) - log_p(0)) / h, atol=1e-4
    )


def test_the_normaliser_cancels():
    g = torch.Generator().manual_seed(0)
    x, xi, probe = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(3))
    back = torch.randn(4, 5, 3, generator=g, dtype=torch.float64)

    def losses(shift):
        def energy(p):
            return (p**4).sum(1) / 4 + shift

        return [
            dcd.discrepancy(energy, x, xi, back, 0.5).loss_B,
            dcd.one_step(energy, x, xi, probe, 0.1, "ve").loss_B,
            dcd.one_step(energy, x, xi, probe, 0.1, "vp").loss_B,
            dcd.contrastive(energy, x, back[0]).loss_B,
            dcd.over_candidates(energy(back[0])[:, None], xi.square()[:, :1], 1.0).loss_B,
        ]

    for a, b in zip(losses(0.0), losses(100.0), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_hutchinson_over_all_signs_is_the_laplacian():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 3, generator=g, dtype=torch.float64)
    x = torch.randn(1, 3, generator=g, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    rows = x.expand(8, 3)
    at = dcd.derivatives(lambda p: (p @ a * p).sum(1) + (p**3).sum(1), rows, signs)
    assert at.laplacian_N.mean().item() == pytest.approx((2 * a.trace() + 6 * x.sum()).item())
    assert torch.allclose(at.gradient[0], x[0] @ (a + a.T) + 3 * x[0] ** 2)


def test_over_candidates_is_the_divergence_of_discrete_distributions():
    """KL - KL after the noise, the latter by integrating mixtures of normals over a grid."""
    points = torch.tensor([-1.5, -0.2, 0.1, 0.9, 2.0], dtype=torch.float64)
    p = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    energies = torch.tensor([0.3, -0.5, 1.0, 0.2, -1.0], dtype=torch.float64)
    spread, (xi, weight) = 0.6, nodes(40)

    def loss(e):
        total = 0.0
        for j in range(5):
            order = [j, *(i for i in range(5) if i != j)]
            y = points[j] + spread * xi
            squared = (y[None] - points[order][:, None]).square()
            term = dcd.over_candidates(e[order][:, None].expand(5, len(y)), squared, spread)
            total += p[j] * (weight * term.loss_B).sum()
        return total

    q = (-energies).softmax(0)
    y = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    kernel = torch.exp(-((y[:, None] - points) ** 2) / (2 * spread**2))
    after = [(kernel @ d) / (spread * math.sqrt(2 * math.pi)) for d in (p, q)]
    contraction = torch.trapezoid(after[0] * (after[0] / after[1]).log(), y)
    expected = (p * (p / q).log()).sum() - contraction
    assert (loss(energies) - loss(-p.log())).item() == pytest.approx(expected.item(), rel=1e-3)


def test_over_candidates_of_much_noise_is_infonce():
    g = torch.Generator().manual_seed(0)
    energies, squared = torch.randn(6, 4, generator=g), torch.rand(6, 4, generator=g)
    mine = dcd.over_candidates(energies, squared, 1e4).loss_B
    own = torch.zeros(4, dtype=torch.int64)
    assert torch.allclose(
        mine, torch.nn.functional.cross_entropy(-energies.T, own, reduction="none")
    )


def test_the_stabiliser_bounds_the_loss():
    x, m = torch.zeros(3, 2), 8
    back = torch.randn(m, 3, 2, generator=torch.Generator().manual_seed(0))
    steep = dcd.discrepancy(lambda p: 1e4 * p.square().sum(1), x, back[0] * 0, back, 1.0)
    assert torch.allclose(steep.loss_B, torch.full((3,), -math.log(m)))


def test_levels_of_a_time_dependent_energy_are_right_at_the_diffused_data():
    """At each level the gradient by the variance is zero at the data's variance + sigma_i^2."""
    levels = Levels.geometric(0.3, 2.0, 4)
    assert len(levels) == 4 and levels.sigmas[0] == 0
    assert (levels.sigmas[1], levels.sigmas[4]) == (0.3, pytest.approx(2.0))
    for i in range(len(levels)):
        level = torch.tensor([i])
        right = DATA[1] + levels.sigmas[i] ** 2
        x, xi, weight = pairs(DATA[0], right)
        back = quantiles(2001)[:, None, None].expand(-1, len(x), 1)
        kernel = levels.spread(level).double()[:, None]
        slopes = []
        for variance in (right, 1.3 * right):
            v = torch.tensor(variance, dtype=torch.float64, requires_grad=True)
            term = dcd.discrepancy(gaussian(DATA[0], v), x, xi, back, kernel, 0.0)
            slopes.append(torch.autograd.grad((weight * term.loss_B).sum(), v)[0].item())
        assert abs(slopes[0]) < 0.05 * slopes[1], (i, slopes)
    u = torch.tensor([0.0, 0.26, 0.99, 1 - 1e-9])
    assert levels.pick(u).tolist() == [0, 1, 3, 3]
