"""DisCo-Diff's own networks: latents to logits of codes, and codes to tokens of the condition.

Parameters lie in leaf modules that return tensors: under ZeRO-3 each is then gathered by its own
hook.

Shape legend: B samples, M codes, K values of a code, D width of the condition, W width here.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.model.recompute import Recomputing


class TransformerConfig(Config):
    """Attributes: width of the transformer, its layers, and the width of an attention head."""

    width: int = Field(128, ge=8)
    layers: int = Field(4, ge=0)
    head_dim: int = Field(32, ge=4)

    @model_validator(mode="after")
    def _heads_divide(self) -> "TransformerConfig":
        if self.width % self.head_dim:
            raise ValueError(
                f"width={self.width} is not a multiple of head_dim={self.head_dim}; change one of "
                "them"
            )
        return self


class EncoderConfig(TransformerConfig):
    """A ViT over latents (the paper's: width 768, 12 layers, 64 patches of an image).

    Attributes:
        patch: latent pixels on a side of a patch.
    """

    patch: int = Field(2, ge=1)


def blocks(config: TransformerConfig) -> nn.ModuleList:
    """Self-attention and feed-forward, ``layers`` times."""
    return nn.ModuleList(
        BasicTransformerBlock(
            config.width,
            config.width // config.head_dim,
            config.head_dim,
            activation_fn="gelu",
            attention_bias=True,
        )
        for _ in range(config.layers)
    )


class Rows(nn.Module):
    """Learned tokens, one for each code."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.02)

    def forward(self, batch: int) -> Tensor:
        """(B, rows, W)."""
        return self.weight.expand(batch, -1, -1)


class CodeEncoder(Recomputing):
    """E_phi(y): a ViT with M tokens beside those of the patches, each of which becomes a code's
    logits (DisCo-Diff, section 3 and app. D.1)."""

    def __init__(
        self, config: EncoderConfig, channels: int, side: int, codes: int, values: int
    ) -> None:
        super().__init__()
        self.codes = codes
        self.patches = nn.Conv2d(channels, config.width, config.patch, config.patch)
        self.position = nn.Embedding((side // config.patch) ** 2, config.width)
        self.queries = Rows(codes, config.width)
        self.blocks = blocks(config)
        self.norm = nn.LayerNorm(config.width)
        self.logits = nn.Linear(config.width, values)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """Logits (B, M, K) of the codes of clean latents."""
        x_BNW = self.patches(z_BCHW).flatten(2).transpose(1, 2)
        x_BNW = x_BNW + self.position(torch.arange(x_BNW.shape[1], device=x_BNW.device))
        x_BNW = torch.cat([self.queries(len(x_BNW)), x_BNW], dim=1)
        for block in self.blocks:
            x_BNW = self.unit(block, x_BNW)
        logits: Tensor = self.logits(self.norm(x_BNW[:, : self.codes]))
        return logits


class Codebooks(nn.Module):
    """A vector for each value of each code; the last value of each is the null token."""

    def __init__(self, codes: int, values: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, values + 1, width))

    def forward(self, codes_BMK: Tensor, null_B: Tensor) -> Tensor:
        """Vectors (B, M, W) of (relaxed) one-hot codes; the null tokens where ``null_B``."""
        given_BM1 = (~null_B)[:, None, None].to(codes_BMK.dtype).expand(*codes_BMK.shape[:2], 1)
        rows = torch.cat([codes_BMK * given_BM1, 1 - given_BM1], dim=-1)
        return torch.einsum("bmk,mkw->bmw", rows.to(self.weight.dtype), self.weight)


class CodeTokens(Recomputing):
    """Codes to tokens that cross-attention reads: a transformer over the M vectors (the paper's:
    width 192, 6 layers)."""

    def __init__(
        self, config: TransformerConfig, codes: int, values: int, condition_dim: int
    ) -> None:
        super().__init__()
        self.books = Codebooks(codes, values, config.width)
        self.blocks = blocks(config)
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, condition_dim)

    def forward(self, codes_BMK: Tensor, null_B: Tensor) -> Tensor:
        """Tokens (B, M, D)."""
        x_BMW = self.books(codes_BMK, null_B)
        for block in self.blocks:
            x_BMW = self.unit(block, x_BMW)
        tokens: Tensor = self.out(self.norm(x_BMW))
        return tokens
