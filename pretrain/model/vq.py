"""A small VQ-VAE (van den Oord et al. 2017): pictures to a grid of codes and back.

Shape legend: B pictures, C channels, H/W pixels, h/w grid (H / factor), N = B·h·w vectors, D their
width, V codes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config


class VQConfig(Config):
    """Attributes:
    codes: V.
    dim: D.
    width: channels at full resolution; twice that after the first halving.
    halvings: the grid is 2^halvings times coarser than the picture.
    codebook: ``ema``: codes are moving averages of the vectors they stand for (appendix A.1);
        ``gradient``: learned by |sg(z) - e|^2 (Eq. 3).
    decay: of the moving averages.
    commitment: beta of Eq. 3.
    revive: a code whose moving count falls under this is put on a vector of the batch, in either
        kind of codebook; 0 never.
    """

    codes: int = Field(128, ge=2)
    dim: int = Field(16, ge=1)
    width: int = Field(32, ge=8, multiple_of=8)
    halvings: int = Field(2, ge=0, le=6)
    codebook: Literal["ema", "gradient"] = "ema"
    decay: float = Field(0.99, gt=0, lt=1)
    commitment: float = Field(0.25, ge=0)
    revive: float = Field(0.05, ge=0)


class Codebook(nn.Module):
    """The nearest code of each vector, with the gradient passed straight through."""

    codes_VD: Tensor
    counts_V: Tensor
    sums_VD: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        start = torch.randn(config.codes, config.dim)
        if config.codebook == "ema":
            self.register_buffer("codes_VD", start)
            self.register_buffer("sums_VD", start.clone())
        else:
            self.codes_VD = nn.Parameter(start)
        self.register_buffer("counts_V", torch.ones(config.codes))

    def nearest(self, z_ND: Tensor) -> Tensor:
        """Indices (N,)."""
        return torch.cdist(z_ND.float(), self.codes_VD.float()).argmin(1)

    def forward(self, z_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised vectors, their indices, and the codebook's own loss (a scalar)."""
        index_N = self.nearest(z_ND)
        if self.training:
            with torch.no_grad():
                self._follow(z_ND.detach().float(), index_N)
        code_ND = F.embedding(index_N, self.codes_VD)
        loss = self.config.commitment * F.mse_loss(z_ND, code_ND.detach())
        if self.config.codebook == "gradient":
            loss = loss + F.mse_loss(code_ND, z_ND.detach())
        return z_ND + (code_ND - z_ND).detach(), index_N, loss

    def _follow(self, z_ND: Tensor, index_N: Tensor) -> None:
        keep = self.config.decay
        one_hot = F.one_hot(index_N, self.config.codes).to(z_ND)
        self.counts_V.mul_(keep).add_(one_hot.sum(0), alpha=1 - keep)
        if self.config.codebook == "ema":
            self.sums_VD.mul_(keep).add_(one_hot.T @ z_ND, alpha=1 - keep)
            self.codes_VD.copy_(self.sums_VD / self.counts_V.clamp(min=1e-5)[:, None])
        dead = self.counts_V < self.config.revive
        if bool(dead.any()):
            fresh = z_ND[torch.randint(len(z_ND), (int(dead.sum()),), device=z_ND.device)]
            self.codes_VD[dead] = fresh.to(self.codes_VD.dtype)
            self.counts_V[dead] = 1.0
            if self.config.codebook == "ema":
                self.sums_VD[dead] = fresh


@dataclass(frozen=True)
class Reconstruction:
    """Attributes:
    images_BCHW: as decoded.
    tokens_Bhw: codes.
    loss: mean square error plus the codebook's.
    perplexity: exp of the entropy of the codes that were used, 1 to V.
    """

    images_BCHW: Tensor
    tokens_Bhw: Tensor
    loss: Tensor
    perplexity: Tensor


class VQAutoencoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to tokens (B, h, w) and back."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        wide = config.width * (2 if config.halvings else 1)
        down: list[nn.Module] = [nn.Conv2d(3, config.width, 3, padding=1)]
        up: list[nn.Module] = []
        for i in range(config.halvings):
            here = config.width if i == 0 else wide
            down += [nn.SiLU(), nn.Conv2d(here, wide, 4, stride=2, padding=1)]
            up = [nn.ConvTranspose2d(wide, here, 4, stride=2, padding=1), nn.SiLU(), *up]
        self.encoder = nn.Sequential(*down, Residual(wide), nn.Conv2d(wide, config.dim, 1))
        self.codebook = Codebook(config)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.dim, wide, 3, padding=1),
            Residual(wide),
            *up,
            nn.Conv2d(config.width, 3, 3, padding=1),
        )

    @property
    def factor(self) -> int:
        """Pixels on a side of one token."""
        return 2**self.config.halvings

    def forward(self, images_BCHW: Tensor) -> Reconstruction:
        """A training pass."""
        z = self.encoder(images_BCHW).permute(0, 2, 3, 1)
        quantised, index_N, loss = self.codebook(z.flatten(0, 2))
        out = self.decoder(quantised.view_as(z).permute(0, 3, 1, 2))
        share = torch.bincount(index_N, minlength=self.config.codes) / len(index_N)
        perplexity = (-(share * share.clamp(min=1e-12).log()).sum()).exp()
        total = F.mse_loss(out, images_BCHW) + loss
        return Reconstruction(out, index_N.view(z.shape[:3]), total, perplexity)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Tokens (B, h, w)."""
        z = self.encoder(images_BCHW).permute(0, 2, 3, 1)
        return self.codebook.nearest(z.flatten(0, 2)).view(z.shape[:3])

    @torch.no_grad()
    def decode(self, tokens_Bhw: Tensor) -> Tensor:
        """Pictures; may leave [-1, 1] slightly."""
        codes = F.embedding(tokens_Bhw, self.codebook.codes_VD)
        return self.decoder(codes.permute(0, 3, 1, 2))


class Residual(nn.Module):
    """x + conv(conv(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.body(x_BCHW)
