"""The image stream: diffusers' own UNet2DConditionModel, so its parameter names and its
initialisation.

Stable Diffusion's weights load into it and come out of it with no conversion table. Only its
forward pass is ours (dual_stream.py), because a token of the text stream passes through its
attention.
"""

from typing import Any

from diffusers import UNet2DConditionModel
from pydantic import Field, model_validator

from pretrain.config import Config


class UNetConfig(Config):
    """Shape of the U-Net; the defaults of the fields not listed are Stable Diffusion 1.x's.

    Attributes:
        channels: output channels of each resolution level.
        attention: which levels have transformers.
        layers: residual blocks in each level of the encoder (the decoder has one more).
        head_dim: width of an attention head (SD 2.x: 64).
        heads: attention heads in every level (SD 1.x: 8), in place of ``head_dim``.
        transformer_layers: K, transformer layers in each block.
        norm_groups: groups of the group norms; divides every level's channels.
        linear_projection: linear instead of 1×1 convolution around transformers (SD 2.x).
    """

    channels: tuple[int, ...] = (64, 128, 256)
    attention: tuple[bool, ...] = (False, True, True)
    layers: int = Field(1, ge=1)
    head_dim: int = Field(32, ge=1)
    heads: int | None = Field(None, ge=1)
    transformer_layers: int = Field(1, ge=1)
    norm_groups: int = Field(32, ge=1)
    linear_projection: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "UNetConfig":
        if len(self.channels) != len(self.attention):
            raise ValueError(
                f"attention has {len(self.attention)} entries and channels {len(self.channels)}; "
                "give one per level"
            )
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"channels={width} is not a multiple of norm_groups={self.norm_groups}; "
                    "change one of them"
                )
        field = "head_dim" if self.heads is None else "heads"
        parts = getattr(self, field)
        attending = [c for c, a in zip(self.channels, self.attention, strict=True) if a]
        for width in (*attending, self.channels[-1]):  # the mid block attends
            if width % parts:
                raise ValueError(
                    f"channels={width} is not a multiple of {field}={parts}; change one of them"
                )
        return self


def diffusers_arguments(
    config: UNetConfig, latent_channels: int, condition_dim: int
) -> dict[str, Any]:
    """The arguments of `UNet2DConditionModel` that ``config`` stands for."""
    down = [("CrossAttnDownBlock2D" if a else "DownBlock2D") for a in config.attention]
    up = [("CrossAttnUpBlock2D" if a else "UpBlock2D") for a in reversed(config.attention)]
    return {
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": config.channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "layers_per_block": config.layers,
        "cross_attention_dim": condition_dim,
        # diffusers' `attention_head_dim` is in truth the number of heads (kept so for SD 1.x's
        # files).
        "attention_head_dim": tuple(
            config.heads or max(1, c // config.head_dim) for c in config.channels
        ),
        "transformer_layers_per_block": config.transformer_layers,
        "norm_num_groups": config.norm_groups,
        "use_linear_projection": config.linear_projection,
    }


def build_unet(
    config: UNetConfig, latent_channels: int, condition_dim: int
) -> UNet2DConditionModel:
    """A freshly initialised image stream."""
    return UNet2DConditionModel(**diffusers_arguments(config, latent_channels, condition_dim))
