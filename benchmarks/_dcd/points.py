"""Sets of points in the plane with a known density, and KL(data | model) on a grid."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIDE, HALF = 241, 6.0  # cells and half width of the grid
DIVERGED = 5.0  # nats; a uniform density over the grid is at 2.9 (rings) and 3.7 (modes)


@dataclass(frozen=True)
class Points:
    """Attributes:
    draw: n points.
    log_density: log p at (N, 2) points, up to a constant.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    log_density: Callable[[Tensor], Tensor]


def _modes() -> Points:
    means, shares, sd = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.2, 0.8]), 0.4

    def draw(n: int, g: torch.Generator) -> Tensor:
        which = torch.multinomial(shares, n, replacement=True, generator=g)
        return means[which] + sd * torch.randn(n, 2, generator=g)

    def log_density(x: Tensor) -> Tensor:
        squares = (x[:, None] - means.to(x)).square().sum(-1)
        return (shares.to(x).log() - squares / (2 * sd**2)).logsumexp(1)

    return Points(draw, log_density)


def _rings() -> Points:
    radii, sd = torch.tensor([1.0, 2.5]), 0.15

    def draw(n: int, g: torch.Generator) -> Tensor:
        which = torch.randint(2, (n,), generator=g)
        angle = 2 * math.pi * torch.rand(n, generator=g)
        r = radii[which] + sd * torch.randn(n, generator=g)
        return r[:, None] * torch.stack([angle.cos(), angle.sin()], 1)

    def log_density(x: Tensor) -> Tensor:  # of the radius, by the circumference
        r = x.norm(dim=1, keepdim=True).clamp(min=1e-3)
        return (-((r - radii.to(x)) ** 2) / (2 * sd**2)).logsumexp(1) - r[:, 0].log()

    return Points(draw, log_density)


SETS: dict[str, Callable[[], Points]] = {"two rings": _rings, "modes .2/.8": _modes}


def grid() -> Tensor:
    """Centres of the cells, (SIDE^2, 2)."""
    line = torch.linspace(-HALF, HALF, SIDE)
    return torch.cartesian_prod(line, line)


@torch.no_grad()
def log_probabilities(net: nn.Module) -> Tensor:
    """log of the model's share of each cell, fp64; nothing of the model is off the grid."""
    energies = torch.cat([net(part) for part in grid().split(8192)])
    return (-energies.double()).log_softmax(0)


def divergence(points: Points, log_q: Tensor) -> float:
    """KL(data | model) in nats; infinity where the model is not finite."""
    log_p = points.log_density(grid().double()).log_softmax(0)
    value = (log_p.exp() * (log_p - log_q)).sum().item()
    return value if math.isfinite(value) else math.inf


def left_share(log_q: Tensor) -> float:
    """The model's share of the left half plane (modes: 0.2 is right)."""
    return log_q.exp()[grid()[:, 0] < 0].sum().item()
