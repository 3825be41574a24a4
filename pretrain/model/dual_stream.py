"""The dual-stream U-Net of DiffDis: Stable Diffusion's U-Net, and a text token in its encoder and
mid block.

One pass serves both tasks. The generation half (noisy image, caption, query masked out of
attention) and the alignment half (clean image at t_z = 0, null prompt, noisy query) are stacked
along the batch; the encoder runs once on both, the decoder on the first half alone. So every
parameter is gathered once a step under ZeRO-3, and every rank runs the same modules in the same
order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.recompute import Recomputing
from pretrain.model.text_stream import AlignmentHead, QueryTime, TextStreamBlock, TextStreamConfig
from pretrain.model.unet import UNetConfig, build_unet


@dataclass(frozen=True)
class Encoded:
    """What the encoder and mid block leave: the mid map, the skips for the decoder, the text token
    h_e."""

    mid_BCHW: Tensor
    skips: tuple[Tensor, ...]
    time_BD: Tensor
    h_BE: Tensor

    def first(self, n: int) -> "Encoded":
        """The first ``n`` samples (the generation half)."""
        return self._part(slice(None, n))

    def last(self, n: int) -> "Encoded":
        """The last ``n`` samples (the alignment half)."""
        return self._part(slice(-n, None))

    def _part(self, s: slice) -> "Encoded":
        return Encoded(
            self.mid_BCHW[s], tuple(k[s] for k in self.skips), self.time_BD[s], self.h_BE[s]
        )


class DualStreamUNet(Recomputing):
    """`unet` is diffusers' UNet2DConditionModel by name; `blocks` and `head` are the text
    stream."""

    def __init__(
        self,
        unet: UNetConfig,
        stream: TextStreamConfig,
        latent_channels: int,
        latent_size: int,
        condition_dim: int,
        query_dim: int,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.unet = build_unet(unet, latent_channels, condition_dim)
        self.query_time = QueryTime(query_dim)
        widths = [
            c
            for c, attends in zip(unet.channels, unet.attention, strict=True)
            if attends
            for _ in range(unet.layers)
        ]
        if stream.fusion == "mid":
            widths = []
        self.blocks = nn.ModuleList(
            TextStreamBlock(query_dim, width, unet.transformer_layers)
            for width in [*widths, unet.channels[-1]]
        )
        mid_size = latent_size // 2 ** (len(unet.channels) - 1)
        self.head = AlignmentHead(stream, query_dim, unet.channels[-1], mid_size**2)

    def encode(
        self,
        z_BCHW: Tensor,
        t_z_B: Tensor,
        c_BLD: Tensor,
        e_BE: Tensor,
        t_e_B: Tensor,
        query_seen_B: Tensor,
        c_seen_BL: Tensor | None = None,
    ) -> Encoded:
        """Encoder and mid block on images, with the query as one more token of each self-attention.

        Args:
            z_BCHW: the network's image input.
            t_z_B, t_e_B: embedded times in [0, 1000].
            c_BLD: token-wise condition.
            e_BE: (noisy) query.
            query_seen_B: bool; where False no image token attends to the query, so the image stream
                is exactly Stable Diffusion's.
            c_seen_BL: bool; where False a token of the condition is not attended to. None: all are.
        """
        u = self.unet
        c_bias = None
        if c_seen_BL is not None:  # (B, 1, L), added to the logits of cross-attention
            c_bias = torch.zeros(c_seen_BL.shape, dtype=c_BLD.dtype, device=c_BLD.device)
            c_bias = c_bias.masked_fill(~c_seen_BL, float("-inf"))[:, None]
        time_BD = u.time_embedding(u.time_proj(t_z_B).to(z_BCHW.dtype))
        inject_BE = e_BE + self.query_time(t_e_B, e_BE.dtype)
        h_BE = torch.zeros_like(e_BE)
        streams: Iterator[Any] = iter(self.blocks)

        h = u.conv_in(z_BCHW)
        skips = [h]
        for down in u.down_blocks:
            for resnet, attention in zip(down.resnets, _attentions(down), strict=True):
                h = self.unit(resnet, h, time_BD)
                if attention is not None:
                    block = next(streams) if self.stream.fusion == "all" else None
                    h, h_BE = self.unit(
                        self._transform,
                        *(attention, block, h, c_BLD, h_BE, inject_BE, query_seen_B, c_bias),
                    )
                skips.append(h)
            for downsampler in down.downsamplers or ():
                h = downsampler(h)
                skips.append(h)
        mid = u.mid_block
        h = self.unit(mid.resnets[0], h, time_BD)
        h, h_BE = self.unit(
            self._transform,
            *(mid.attentions[0], next(streams), h, c_BLD, h_BE, inject_BE, query_seen_B, c_bias),
        )
        h = self.unit(mid.resnets[1], h, time_BD)
        return Encoded(h, tuple(skips), time_BD, h_BE)

    def decode(self, encoded: Encoded, c_BLD: Tensor) -> Tensor:
        """Up blocks and output layers: the image stream's raw prediction F."""
        u, h, skips = self.unet, encoded.mid_BCHW, list(encoded.skips)
        for up in u.up_blocks:
            for resnet, attention in zip(up.resnets, _attentions(up), strict=True):
                h = self.unit(self._joined, resnet, h, skips.pop(), encoded.time_BD)
                if attention is not None:
                    h = self.unit(self._attended, attention, h, c_BLD)
            for upsampler in up.upsamplers or ():
                h = self.unit(upsampler, h)
        return u.conv_out(u.conv_act(u.conv_norm_out(h)))

    def predict_query(self, encoded: Encoded) -> Tensor:
        """ê_0, shape (B, E), from the text token and the mid map."""
        return self.read_query(encoded)[0]

    def read_query(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """ê_0, and the head's final text token, (B, W)."""
        e0_hat_BE, token_BW = self.head(encoded.h_BE, encoded.mid_BCHW)
        return e0_hat_BE, token_BW

    @staticmethod
    def _joined(resnet: Any, x_BCHW: Tensor, skip_BCHW: Tensor, time_BD: Tensor) -> Tensor:
        """A residual block of the decoder; the joined map is of its inside, not kept twice."""
        return resnet(torch.cat([x_BCHW, skip_BCHW], dim=1), time_BD)

    @staticmethod
    def _attended(attention: Any, x_BCHW: Tensor, c_BLD: Tensor) -> Tensor:
        return attention(x_BCHW, encoder_hidden_states=c_BLD, return_dict=False)[0]

    def _transform(
        self,
        attention: Any,
        block: TextStreamBlock | None,
        x_BCHW: Tensor,
        c_BLD: Tensor,
        h_BE: Tensor,
        inject_BE: Tensor,
        query_seen_B: Tensor,
        c_bias_B1L: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One transformer of the image stream (diffusers' Transformer2DModel) with the query in it
        (Fig. 3)."""
        batch, _, height, width = x_BCHW.shape
        x_BNC, _ = attention._operate_on_continuous_inputs(x_BCHW)
        if block is None:
            for layer in attention.transformer_blocks:
                x_BNC = layer(x_BNC, encoder_hidden_states=c_BLD, encoder_attention_mask=c_bias_B1L)
        else:
            n = x_BNC.shape[1]
            # u = FC_in(h_{e,l-1} + (e_t + Embed(t_e))): the query enters anew at every block.
            skip = h_BE if self.stream.skip else 0
            u_B1C = block.fc_in(skip + inject_BE)[:, None]
            bias = x_BNC.new_zeros(batch, 1, n + 1)
            bias[:, 0, n] = torch.where(query_seen_B, 0.0, float("-inf"))
            for layer, norm, feed_forward in zip(
                attention.transformer_blocks, block.norms, block.feed_forwards, strict=True
            ):
                joint = torch.cat([x_BNC, u_B1C], dim=1)
                joint = joint + layer.attn1(layer.norm1(joint), attention_mask=bias)
                x_BNC, u_B1C = joint[:, :n], joint[:, n:]
                x_BNC = x_BNC + layer.attn2(
                    layer.norm2(x_BNC), encoder_hidden_states=c_BLD, attention_mask=c_bias_B1L
                )
                x_BNC = x_BNC + layer.ff(layer.norm3(x_BNC))
                u_B1C = u_B1C + feed_forward(norm(u_B1C))
            h_BE = block.fc_out(u_B1C[:, 0])
        out = attention._get_output_for_continuous_inputs(
            x_BNC, x_BCHW, batch, height, width, x_BNC.shape[-1]
        )
        return out, h_BE


def _attentions(block: Any) -> list[Any]:
    """The transformer behind each residual block of a level; None where the level has none."""
    return list(getattr(block, "attentions", None) or [None] * len(block.resnets))
