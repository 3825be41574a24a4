"""p(x_0 | x_t, c) over VQ tokens: a small transformer that reads a condition by cross-attention, as
VQ-Diffusion's does.

Shape legend: B samples, L tokens, V codes, M condition tokens, D width, C width of the condition.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config


class TokenDenoiserConfig(Config):
    """Attributes: the paper's is 18 layers of width 192 with 16 heads (COCO, CUB)."""

    width: int = Field(192, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(6, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> "TokenDenoiserConfig":
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} is not a multiple of twice heads={self.heads}; try "
                f"{self.width // (2 * self.heads) * 2 * self.heads or 2 * self.heads}"
            )
        return self


class Attention(nn.Module):
    """Attention of D-wide queries on C-wide keys."""

    def __init__(self, width: int, heads: int, source: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.pair = nn.Linear(source, 2 * width)

    def forward(self, x_BLD: Tensor, source_BMC: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.pair(source_BMC).chunk(2, -1)
        y = F.scaled_dot_product_attention(split(self.query(x_BLD)), split(key), split(value))
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the norms are shifted and scaled by time."""

    def __init__(self, width: int, heads: int, condition: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.shift = nn.Linear(width, 6 * width)
        self.self_attention = Attention(width, heads, width)
        self.cross_attention = Attention(width, heads, condition)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BLD: Tensor, time_BD: Tensor, c_BMC: Tensor) -> Tensor:
        scale = self.shift(F.silu(time_BD))[:, None].chunk(6, -1)

        def normed(i: int) -> Tensor:
            return self.norms[i](x_BLD) * (1 + scale[2 * i]) + scale[2 * i + 1]

        here = normed(0)
        x_BLD = x_BLD + self.self_attention(here, here)
        x_BLD = x_BLD + self.cross_attention(normed(1), c_BMC)
        return x_BLD + self.feed_forward(normed(2))


class TokenDenoiser(nn.Module):
    """Args:
    codes: V; state V is [MASK].
    length: L.
    condition: C.
    steps: T, which scales the time.
    """

    def __init__(
        self, config: TokenDenoiserConfig, codes: int, length: int, condition: int, steps: int
    ) -> None:
        super().__init__()
        self.width, self.steps = config.width, steps
        self.tokens = nn.Embedding(codes + 1, config.width)
        self.places = nn.Embedding(length, config.width)
        self.time = nn.Linear(config.width, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, condition) for _ in range(config.layers)
        )
        self.norm, self.out = nn.LayerNorm(config.width), nn.Linear(config.width, codes)

    def forward(self, x_t_BL: Tensor, t_B: Tensor, c_BMC: Tensor) -> Tensor:
        """log p(x_0 | x_t, c), (B, L, V), fp32."""
        half = self.width // 2
        rates = torch.exp(-math.log(1e4) * torch.arange(half, device=t_B.device) / half)
        angle = 1000 * t_B[:, None].float() / self.steps * rates
        time_BD = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(self.out.weight.dtype))
        places = torch.arange(x_t_BL.shape[1], device=x_t_BL.device)
        x = self.tokens(x_t_BL) + self.places(places)
        for block in self.blocks:
            x = block(x, time_BD, c_BMC)
        return self.out(self.norm(x)).float().log_softmax(-1)
