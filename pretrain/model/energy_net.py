"""Energies: one on the trunk's text token, E(e | z), and networks that stand alone, for points and
for small pictures. Smooth throughout (SiLU): losses read second derivatives."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.diffusion.energy import Derivatives, derivatives


class EnergyHead(nn.Module):
    """E(x | z): three layers on the text token's feature (what it has read of z) and a point x.

    A leaf module, and gradient and Laplacian are made within its forward: so under ZeRO-3 its
    weights are there while they are made, and again in the pass back through them. Computed in
    fp32; its loss is of differences of energies.

    Args:
        token_width: W of the feature.
        dim: D of x.
        width: hidden units.
        levels: of a time-dependent energy; 1 is one energy.
    """

    def __init__(self, token_width: int, dim: int, width: int, levels: int = 1) -> None:
        super().__init__()
        self.from_token = nn.Parameter(torch.randn(width, token_width) / token_width**0.5)
        self.from_point = nn.Parameter(torch.randn(width, dim) / dim**0.5)
        self.level = nn.Parameter(torch.zeros(levels, width))
        self.hidden = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Parameter(torch.randn(1, width) / width**0.5)  # a bias would change nothing

    def forward(
        self,
        token_BW: Tensor,
        x_ND: Tensor,
        level_B: Tensor,
        probe_ND: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(E,) of N = K B points, K of each sample, row k B + b being sample b's; with a probe (E,
        dE/dx, Laplacian), see `derivatives`.

        Args:
            level_B: int64 level of each sample.
        """
        levels_L = torch.arange(len(self.level), device=level_B.device)
        level_BH = (level_B[:, None] == levels_L).float() @ self.level.float()
        h_BH = F.linear(token_BW.float(), self.from_token.float()) + level_BH

        def energy(x_ND: Tensor) -> Tensor:
            x_KBD = x_ND.view(-1, len(h_BH), x_ND.shape[-1])
            h = F.silu(h_BH + F.linear(x_KBD, self.from_point.float()))
            h = F.silu(F.linear(h, self.hidden.float(), self.bias.float()))
            return F.linear(h, self.out.float()).flatten()

        if probe_ND is None:
            return (energy(x_ND.float()),)
        at: Derivatives = derivatives(energy, x_ND.float(), probe_ND)
        return at.energy_N, at.gradient, at.laplacian_N


class EnergyMLP(nn.Module):
    """E(x) or E(x, level) of points in few dimensions.

    Args:
        dim: coordinates.
        width, layers: of the hidden layers.
        levels: of a time-dependent energy; 1 is one energy.
        frequencies: if any, sines and cosines of pi f x for each f are read beside x.
    """

    def __init__(
        self,
        dim: int,
        width: int = 128,
        layers: int = 3,
        levels: int = 1,
        frequencies: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.frequencies = tuple(frequencies)
        self.level = nn.Embedding(levels, width)
        nn.init.zeros_(self.level.weight)
        self.first = nn.Linear(dim * (1 + 2 * len(self.frequencies)), width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.out = nn.Linear(width, 1, bias=False)

    def forward(self, x_ND: Tensor, level_N: Tensor | None = None) -> Tensor:
        """E, shape (N,)."""
        x_ND = x_ND.flatten(1)
        waves = [w(torch.pi * f * x_ND) for f in self.frequencies for w in (torch.sin, torch.cos)]
        if level_N is None:
            level_N = torch.zeros(len(x_ND), dtype=torch.int64, device=x_ND.device)
        h = F.silu(self.first(torch.cat([x_ND, *waves], dim=1)) + self.level(level_N))
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.out(h)[:, 0]


class EnergyConv(nn.Module):
    """E(x) or E(x, level) of small pictures (N, channels, H, W): convolutions, halving twice, a sum
    over places."""

    def __init__(self, channels: int = 1, width: int = 32, levels: int = 1) -> None:
        super().__init__()
        self.level = nn.Embedding(levels, width)
        nn.init.zeros_(self.level.weight)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.hidden = nn.ModuleList(
            [
                nn.Conv2d(width, width, 3, padding=1),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            ]
        )
        self.out = nn.Linear(4 * width, 1, bias=False)

    def forward(self, x_NCHW: Tensor, level_N: Tensor | None = None) -> Tensor:
        """E, shape (N,)."""
        if level_N is None:
            level_N = torch.zeros(len(x_NCHW), dtype=torch.int64, device=x_NCHW.device)
        h = F.silu(self.first(x_NCHW) + self.level(level_N)[:, :, None, None])
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.out(h.sum((2, 3)))[:, 0]
