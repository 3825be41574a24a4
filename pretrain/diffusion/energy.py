"""Losses of an energy E_theta(x), p_theta ∝ exp(-E_theta), that never ask for log Z: diffusion
contrastive divergence (DCD, arXiv:2307.01668) and contrastive divergence (CD) as a member of it.

Let p^(T) be p after a diffusion dx = f dt + g dw of time T. DCD minimises

    D = KL(p_d | p_theta) - KL(p_d^(T) | p_theta^(T))
      = 1/2 ∫_0^T g^2 E_{p_d^(t)} |grad log p_d^(t) - grad log p_theta^(t)|^2 dt   >= 0
      = E_{y ~ p_d^(T)} KL(p_d(x | y) | p_theta(x | y)).

In CD f is the Langevin drift of p_theta itself: then p_theta^(T) = p_theta, p_d^(T) depends on
theta, and that part of the gradient is dropped. With f and g free of theta nothing is dropped:

    L = E_{p_d} E(x) + E_{y ~ p_d^(T)} log ∫ k_T(y | x) exp(-E(x)) dx,       D = L - min L.

The estimators are ours from this definition, not the authors' code; each is named for what it is:

- `discrepancy`: finite T, by M draws ("DCD, ED estimator"; Energy Discrepancy, arXiv:2307.06431);
- `one_step`: a short time delta, by the Fokker-Planck equation of p_theta (DCD-VE, DCD-VP);
- `over_candidates`: finite T where x is one of a known list, exactly;
- `contrastive`: CD-k, the baseline.

All take draws as arguments, and energies of rows: ``energy(x)`` maps (N, ...) to (N,). Where
several points belong to each of B samples they come sample-fastest: row k·B + b is sample b's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Energy = Callable[[Tensor], Tensor]
Process = Literal["ve", "vp"]


@dataclass(frozen=True)
class Contrast:
    """Attributes:
    loss_B: each sample's loss; the mean over the data is minimised.
    data_B: E(x) of the data.
    other_KB: energies of the K points that stand against it.
    """

    loss_B: Tensor
    data_B: Tensor
    other_KB: Tensor


@dataclass(frozen=True)
class Derivatives:
    """Attributes:
    energy_N: E.
    gradient: dE/dx, as x.
    laplacian_N: estimate of the sum of second derivatives (Hutchinson: v·Hv, E vv^T = 1).
    """

    energy_N: Tensor
    gradient: Tensor
    laplacian_N: Tensor


def spread(process: Process, time: float) -> float:
    """Noise-to-signal ratio sigma / alpha of the kernel k_T(y | x) = N(alpha x, sigma^2).

    VE: dx = dw, so sqrt(T). VP: dx = -x/2 dt + dw, so sqrt(e^T - 1).

    A divergence does not change where both distributions are scaled alike, so over a finite time
    the process enters by this number alone: y / alpha is x with noise of this size, whichever it
    was.
    """
    return math.sqrt(time) if process == "ve" else math.sqrt(math.expm1(time))


def discrepancy(
    energy: Energy,
    x_B: Tensor,
    noise_B: Tensor,
    noises_MB: Tensor,
    spread: float | Tensor,
    stabilizer: float = 1.0,
) -> Contrast:
    """DCD over a finite time, ED estimator: log(w/M + 1/M sum_j exp(E(x) - E(x'_j))),
    x'_j = x + s xi + s xi'_j (arXiv:2307.06431, its estimator with w-stabilisation).

    As a function of x, k_T(y | x) is a normal density about y / alpha of deviation s = sigma/alpha
    (times a constant), so the integral in L is a mean of exp(-E) over draws around the noised data.

    Args:
        x_B: (B, ...) data.
        noise_B, noises_MB: standard normal draws, as x, and (M, B, ...).
        spread: s, a number or of a shape that broadcasts with ``x_B``.
        stabilizer: w >= 0. 0 is the plain estimate, whose minimum is at no finite energy where M is
            small; 1 bounds it from below by -log M.
    """
    m, b = noises_MB.shape[:2]
    y_B = x_B + spread * noise_B
    back = (y_B + spread * noises_MB).flatten(0, 1)
    energies = energy(torch.cat([x_B, back]))
    data_B, other_KB = energies[:b], energies[b:].view(m, b)
    terms = data_B - other_KB
    if stabilizer > 0:
        terms = torch.cat([torch.full_like(terms[:1], math.log(stabilizer)), terms])
    return Contrast(terms.logsumexp(0) - math.log(m), data_B, other_KB)


def over_candidates(energies_KB: Tensor, squared_KB: Tensor, spread: float) -> Contrast:
    """DCD over a finite time where x is one of K candidates (p_theta(x_j) ∝ exp(-E_j), the
    candidates themselves being the base measure): -log p_theta(x_0 | y), exactly.

    log p_theta(x_j | y) = -E_j - |y - x_j|^2 / 2 s^2 - log sum, and D is the mean of
    KL(p_d(x | y) | p_theta(x | y)). For s -> infinity y tells nothing and this is InfoNCE, which is
    maximum likelihood; the smaller s, the more it is about candidates near the right one.

    Args:
        energies_KB: E(x_j) for each sample, the sample's own x first.
        squared_KB: |y - x_j|^2, y the own x with noise of deviation ``spread``.
    """
    logits_KB = -energies_KB - squared_KB / (2 * spread**2)
    return Contrast(logits_KB.logsumexp(0) - logits_KB[0], energies_KB[0], energies_KB[1:])


def derivatives(energy: Energy, x_N: Tensor, probe_N: Tensor) -> Derivatives:
    """E, its gradient and Laplacian at points that are data (no gradient flows back into them); all
    three can be differentiated by the parameters, which makes training a double backward pass.

    Args:
        probe_N: draws with zero mean and unit covariance, as x (signs have the least variance).
    """
    with torch.enable_grad():
        x_N = x_N.detach().requires_grad_()
        energy_N = energy(x_N)
        (gradient,) = torch.autograd.grad(energy_N.sum(), x_N, create_graph=True)
        (product,) = torch.autograd.grad(
            (gradient * probe_N).sum(), x_N, create_graph=True, materialize_grads=True
        )
        laplacian_N = (product * probe_N).flatten(1).sum(1)
    return Derivatives(energy_N, gradient, laplacian_N)


def log_density_rate(
    x_N: Tensor, at: Derivatives, drift: Literal["ve", "vp", "langevin"]
) -> Tensor:
    """d/dt log p_theta^(t)(x) at t = 0 under dx = f dt + dw, (N,): the Fokker-Planck equation,

    d/dt log p = -div f - f·grad log p + 1/2 (Δ log p + |grad log p|^2),  grad log p = -grad E.

    ve: f = 0. vp: f = -x/2. langevin: f = -grad E / 2, for which it is zero: p_theta does not
    change, and the one-step loss is CD's.
    """
    squared_N = at.gradient.square().flatten(1).sum(1)
    heat_N = 0.5 * (squared_N - at.laplacian_N)
    if drift == "ve":
        return heat_N
    if drift == "vp":
        dimension = x_N[0].numel()
        return heat_N - 0.5 * (x_N * at.gradient).flatten(1).sum(1) + 0.5 * dimension
    return heat_N + 0.5 * at.laplacian_N - 0.5 * squared_N


def one_step(
    energy: Energy,
    x_B: Tensor,
    noise_B: Tensor,
    probe_B: Tensor,
    delta: float,
    process: Process = "ve",
    differentiate: Callable[[Tensor, Tensor], Derivatives] | None = None,
) -> Contrast:
    """DCD over one short step (DCD-VE, DCD-VP):
    (1/delta) {E(x) - E(y)} + d/dt log p_theta^(t)(y), y ~ k_delta(. | x); for VE that is
    (1/delta) {E(x) - E(y) + (delta/2) (-ΔE(y) + |grad E(y)|^2)}.

    As delta -> 0 its mean is that of |grad E|^2 / 2 - ΔE, implicit score matching (Hyvärinen 2005),
    which does not see how mass is shared among modes that are far apart.

    Args:
        differentiate: in place of `derivatives` of ``energy``.
    """
    if process == "ve":
        y_B = x_B + math.sqrt(delta) * noise_B
    else:
        y_B = math.exp(-delta / 2) * x_B + math.sqrt(-math.expm1(-delta)) * noise_B
    at = differentiate(y_B, probe_B) if differentiate else derivatives(energy, y_B, probe_B)
    data_B = energy(x_B)
    loss_B = (data_B - at.energy_N) / delta + log_density_rate(y_B, at, process)
    return Contrast(loss_B, data_B, at.energy_N[None])


def contrastive(energy: Energy, x_B: Tensor, negative_B: Tensor) -> Contrast:
    """CD (Hinton 2002): E(x) - E(x^-), where x^- is x after k steps of `langevin`, held fixed: the
    gradient through it is what CD drops.

    In the limit of one short step of time delta this drops half of the gradient of D, and what is
    left is delta/2 times that of implicit score matching (Hyvärinen 2007).
    """
    b = len(x_B)
    energies = energy(torch.cat([x_B, negative_B.detach()]))
    return Contrast(energies[:b] - energies[b:], energies[:b], energies[b:][None])


@dataclass(frozen=True)
class Levels:
    """Noise levels of a time-dependent energy E(x, t): 0 = sigma_0 < sigma_1 < ... < sigma_L.

    Energy i (of L) is of p_d^(sigma_i), learned by DCD between sigma_i and sigma_{i+1} on
    x ~ p_d^(sigma_i). VE; under VP x is divided by alpha, and nothing else changes.
    """

    sigmas: tuple[float, ...]

    @classmethod
    def geometric(cls, first: float, last: float, number: int) -> "Levels":
        """``number`` energies; of one, sigma_1 is ``first``."""
        ratio = (last / first) ** (1 / max(number - 1, 1))
        return cls((0.0, *(first * ratio**i for i in range(number))))

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def sigma(self, level_B: Tensor) -> Tensor:
        """sigma_i of each sample, fp32."""
        return torch.tensor(self.sigmas, device=level_B.device)[level_B]

    def spread(self, level_B: Tensor) -> Tensor:
        """Deviation of the noise that leads from level i to level i + 1."""
        return (self.sigma(level_B + 1).square() - self.sigma(level_B).square()).sqrt()

    def pick(self, u_B: Tensor) -> Tensor:
        """Uniform draws in [0, 1) to levels, int64."""
        return (u_B * len(self)).long().clamp(max=len(self) - 1)
