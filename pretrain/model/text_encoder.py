"""Text to a token-wise condition c and one global query e (DiffDis, section 3: c = T(y), e).

Parameters lie in leaf modules that return tensors: under ZeRO-3 each is then gathered by its own
hook.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.types import TextFeatures


class TextEncoderConfig(Config):
    """A transformer trained from scratch with the trunk.

    Attributes:
        width: D, the width of c.
        query_dim: E, the width of e.
        layers, heads: of the transformer.
        length: most tokens of a text, begin and end tokens included.
    """

    width: int = Field(192, ge=8)
    query_dim: int = Field(192, ge=4)
    layers: int = Field(3, ge=1)
    heads: int = Field(3, ge=1)
    length: int = Field(24, ge=3)

    @model_validator(mode="after")
    def _heads_divide(self) -> "TextEncoderConfig":
        if self.width % self.heads:
            raise ValueError(
                f"width={self.width} is not a multiple of heads={self.heads}; change one of them"
            )
        return self


class TextEncoder(nn.Module):
    """Bidirectional transformer; e is the L2-normalised projection of the end token's feature (as
    CLIP pools)."""

    def __init__(self, config: TextEncoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, config.width)
        self.position = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                config.width,
                config.heads,
                config.width // config.heads,
                activation_fn="gelu",
                attention_bias=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.query_dim, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.01)

    def forward(self, tokens_BL: Tensor, mask_BL: Tensor) -> TextFeatures:
        """Features of tokens; padding (mask False) is never attended to."""
        h_BLD = self.token(tokens_BL) + self.position(
            torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        )
        bias_B1L = torch.zeros(mask_BL.shape, dtype=h_BLD.dtype, device=h_BLD.device)
        bias_B1L = bias_B1L.masked_fill(~mask_BL, float("-inf"))[:, None]
        for block in self.blocks:
            h_BLD = block(h_BLD, attention_mask=bias_B1L)
        c_BLD = self.norm(h_BLD)
        last_B = mask_BL.sum(1) - 1  # the end token
        e_BE = self.query(c_BLD[torch.arange(len(c_BLD), device=c_BLD.device), last_B])
        return TextFeatures(c_BLD, F.normalize(e_BE.float(), dim=-1))
