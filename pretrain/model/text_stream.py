"""The text stream: what DiffDis adds to Stable Diffusion's blocks (Fig. 3), and the alignment
head."""

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.model.fresh import initialise
from pretrain.model.recompute import Recomputing


class TextStreamConfig(Config):
    """Attributes:
    fusion: "all" lets the query join every encoder and mid transformer; "mid" the mid block alone
        (ablation).
    skip: whether a block receives the block before's h_e (the cross-block skip of Fig. 3), or only
        e_t again.
    head_layers, head_width, head_dim: the transformer after the mid block (the paper's review: 6,
        768, 64).
    """

    fusion: str = Field("all", pattern="^(all|mid)$")
    skip: bool = True
    head_layers: int = Field(6, ge=1)
    head_width: int = Field(768, ge=8)
    head_dim: int = Field(64, ge=1)


class QueryTime(nn.Module):
    """Embed(t_e): sinusoid and two linear layers, to the width E of the query."""

    def __init__(self, query_dim: int) -> None:
        super().__init__()
        self.sinusoid = Timesteps(query_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(query_dim, 2 * query_dim, out_dim=query_dim)

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, E) for embedded times in [0, 1000]."""
        return self.mlp(self.sinusoid(t_B).to(dtype))


class TextStreamBlock(nn.Module):
    """What one dual-stream block owns for the text token: FC_in, a feed-forward for each layer,
    FC_out.

    The self-attention and its norm are the image stream's own and shared; cross-attention is
    skipped.
    """

    def __init__(self, query_dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.fc_in = nn.Linear(query_dim, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.feed_forwards = nn.ModuleList(
            FeedForward(width, activation_fn="geglu") for _ in range(layers)
        )
        self.fc_out = nn.Linear(width, query_dim)
        # e_t is nearly all noise of unit size. At the usual scale it drowns what attention brings
        # from the image (at the start another image turned ê_0 by a cosine of 0.93, another e_t by
        # 0.73; docs/LOG.md), and InfoNCE stays at chance for longer.
        initialise(self.fc_in, _quiet)


class AlignmentHead(Recomputing):
    """M transformer blocks over [text token; flattened mid map], then a linear predictor on the
    text token."""

    def __init__(
        self, config: TextStreamConfig, query_dim: int, mid_channels: int, max_tokens: int
    ) -> None:
        super().__init__()
        width = config.head_width
        self.from_query = nn.Linear(query_dim, width)
        self.from_map = nn.Linear(mid_channels, width)
        self.position = nn.Embedding(max_tokens + 1, width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                width // config.head_dim,
                config.head_dim,
                activation_fn="gelu",
                attention_bias=True,
            )
            for _ in range(config.head_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.predictor = nn.Linear(width, query_dim)
        initialise(self.position, _near_zero)

    def forward(self, h_BE: Tensor, mid_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """ê_0, shape (B, E), not normalised; and the final text token it is read from, (B, W)."""
        map_BNC = mid_BCHW.flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.from_query(h_BE)[:, None], self.from_map(map_BNC)], dim=1)
        x_BND = x_BND + self.position(torch.arange(x_BND.shape[1], device=x_BND.device))
        for block in self.blocks:
            x_BND = self.unit(block, x_BND)
        token_BW = self.norm(x_BND[:, 0])
        return self.predictor(token_BW), token_BW


def _quiet(layer: nn.Linear) -> None:
    layer.weight.mul_(0.1)


def _near_zero(table: nn.Embedding) -> None:
    nn.init.normal_(table.weight, std=0.02)
