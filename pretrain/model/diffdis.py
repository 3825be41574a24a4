"""DiffDis: text encoder and dual-stream U-Net under two diffusion paths; the stacked training
pass."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.diffusion.path import StreamConfig, build_path
from pretrain.model.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Diffusers,
    DiffusersConfig,
    SpaceToDepthConfig,
    build_autoencoder,
)
from pretrain.model.dual_stream import DualStreamUNet
from pretrain.model.text_config import AnyTextConfig, TextEncoderConfig, with_kind
from pretrain.model.text_encoder import (
    PREFIX,
    AnyTextEncoder,
    FrozenTextEncoder,
    build_text_encoder,
)
from pretrain.model.text_stream import TextStreamConfig
from pretrain.model.transformers_text import FrozenTransformers, TransformersTextEncoder
from pretrain.model.unet import UNetConfig
from pretrain.types import ModelOutput, Noised, TextFeatures

EXPORTED_AUTOENCODER = "vae"  # its folder in that of an exported model


class InitConfig(Config):
    """Where the image stream's weights come from, before the first step.

    Attributes:
        path: a folder in diffusers' layout, or a hub name that the machine can reach.
        subfolder: where in it the U-Net lies; null: in ``path`` itself.
        variant: of the files' names, such as "fp16" or "non_ema".
        scheduler: where in it the scheduler's configuration lies, with which ``image_path`` must
            agree; null: it is not looked at.
    """

    path: str = Field(min_length=1)
    subfolder: str | None = "unet"
    variant: str | None = None
    scheduler: str | None = "scheduler"


class ModelConfig(Config):
    """All that defines the network's function: its shape and the meaning of its outputs.

    Attributes:
        image_size: pixels on a side.
        init: pretrained weights of the image stream; None: it starts from random ones.
        autoencoder: pixels to latents.
        unet, text_encoder, text_stream: the parts.
        image_path, text_path: schedule and parametrisation of each stream. DiffDis predicts eps for
            the image and x0 for the text query; where the text stream predicts eps (as its Fig. 2
            draws it) the path turns it into ê_0, which is what losses and chains read.
    """

    image_size: int = 32
    init: InitConfig | None = None
    autoencoder: AutoencoderConfig = SpaceToDepthConfig()
    unet: UNetConfig = UNetConfig()
    text_encoder: AnyTextConfig = TextEncoderConfig()
    text_stream: TextStreamConfig = TextStreamConfig()
    image_path: StreamConfig = StreamConfig()
    text_path: StreamConfig = StreamConfig(predict="x0")

    @field_validator("text_encoder", mode="before")
    @classmethod
    def _with_kind(cls, tree: Any) -> Any:
        return with_kind(tree)

    @property
    def size_multiple(self) -> int:
        """What the sides of a picture must be multiples of."""
        return self.autoencoder.factor * 2 ** (len(self.unet.channels) - 1)

    def exact(self) -> "ModelConfig":
        """The same model with its frozen parts in fp32, as inference and exports have them."""
        parts = {n: getattr(self, n) for n in ("autoencoder", "text_encoder")}
        changed = {
            n: part.model_copy(update={"precision": "fp32"})
            for n, part in parts.items()
            if hasattr(part, "precision")
        }
        return self.model_copy(update=changed)

    def within(self, folder: Path) -> "ModelConfig":
        """The same model, with an autoencoder that lies in its own exported ``folder``."""
        part = self.autoencoder
        if isinstance(part, DiffusersConfig) and part.path == EXPORTED_AUTOENCODER:
            part = part.model_copy(update={"path": str(folder / part.path)})
        return self.model_copy(update={"autoencoder": part})

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        step = self.size_multiple
        if self.image_size % step:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of {step} (autoencoder.factor="
                f"{self.autoencoder.factor} × {step // self.autoencoder.factor} for "
                f"{len(self.unet.channels)} unet levels); "
                f"try {max(step, self.image_size // step * step)}"
            )
        return self


class DiffDis(nn.Module):
    """The network that is trained, exported and served.

    Args:
        config: its definition.
        vocab_size: of the tokenizer it is trained with.
        null_tokens_L, null_mask_L: the empty prompt, tokenised; it is the condition "no caption".
        autoencoder, text_encoder: given where they were loaded already; else built from ``config``.
    """

    null_tokens_L: Tensor
    null_mask_L: Tensor

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        null_tokens_L: Tensor,
        null_mask_L: Tensor,
        autoencoder: Autoencoder | None = None,
        text_encoder: AnyTextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        # Not a submodule: a frozen autoencoder must be neither partitioned nor optimised nor saved.
        self._autoencoder = (autoencoder or build_autoencoder(config.autoencoder),)
        self.image_path = build_path(config.image_path)
        self.text_path = build_path(config.text_path)
        # No submodule where it is frozen, for the same reason.
        self.text_encoder = text_encoder or build_text_encoder(config.text_encoder, vocab_size)
        self.trunk = DualStreamUNet(
            config.unet,
            config.text_stream,
            latent_channels=self.autoencoder.channels,
            latent_size=config.image_size // self.autoencoder.factor,
            condition_dim=config.text_encoder.width,
            query_dim=config.text_encoder.query_dim,
        )
        self._null_c_1LD: Tensor | None = None
        self.register_buffer("null_tokens_L", null_tokens_L, persistent=False)
        self.register_buffer("null_mask_L", null_mask_L, persistent=False)

    @property
    def autoencoder(self) -> Autoencoder:
        """The frozen image autoencoder."""
        return self._autoencoder[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        side = self.config.image_size // self.autoencoder.factor
        return (self.autoencoder.channels, side, side)

    @property
    def frozen_text_encoder(self) -> FrozenTextEncoder | FrozenTransformers | None:
        """The text encoder where it is frozen."""
        encoder = self.text_encoder
        return encoder if isinstance(encoder, FrozenTextEncoder | FrozenTransformers) else None

    def portable(self) -> tuple[ModelConfig, dict[str, Tensor]]:
        """Definition and weights that stand on their own: those of a frozen text encoder are among
        them, and nobody needs the folders they came from."""
        weights = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        frozen, text = self.frozen_text_encoder, self.config.text_encoder
        if frozen is not None:
            own = {PREFIX + name: p.float() for name, p in frozen.encoder.named_parameters()}
            text, weights = frozen.portable(), weights | own
        elif isinstance(self.text_encoder, TransformersTextEncoder):
            text = self.text_encoder.portable()
        changed: dict[str, Any] = {"text_encoder": text, "init": None}
        image = self.config.autoencoder
        if isinstance(image, DiffusersConfig):
            place = {"path": EXPORTED_AUTOENCODER, "subfolder": None, "precision": "fp32"}
            changed["autoencoder"] = image.model_copy(update=place)
        return self.config.model_copy(update=changed), weights

    def save_autoencoder(self, folder: Path) -> None:
        """Put a pretrained autoencoder where `portable`'s definition has it in ``folder``."""
        if isinstance(self.autoencoder, Diffusers):
            self.autoencoder.vae.save_pretrained(folder / EXPORTED_AUTOENCODER)

    @property
    def dtype(self) -> torch.dtype:
        """Computation type of the weights."""
        return self.trunk.unet.conv_in.weight.dtype

    def encode_text(self, tokens_BL: Tensor, mask_BL: Tensor) -> tuple[TextFeatures, Tensor]:
        """Features of texts, and the null prompt's condition (1, L, D), in one pass of the
        encoder."""
        tokens = torch.cat(
            [tokens_BL, self.null_tokens_L[None, : tokens_BL.shape[1]].to(tokens_BL)]
        )
        mask = torch.cat([mask_BL, self.null_mask_L[None, : mask_BL.shape[1]].to(mask_BL.device)])
        features = self.text_encoder(tokens, mask)
        return TextFeatures(features.c_BLD[:-1], features.e_BE[:-1]), features.c_BLD[-1:]

    def null_condition(self) -> Tensor:
        """The null prompt's condition alone, (1, L, D); of a frozen encoder it is kept."""
        if self._null_c_1LD is not None:
            return self._null_c_1LD.to(self.null_tokens_L.device)
        c_1LD: Tensor = self.text_encoder(self.null_tokens_L[None], self.null_mask_L[None]).c_BLD
        if self.frozen_text_encoder is not None:
            self._null_c_1LD = c_1LD
        return c_1LD

    def forward(
        self, noised: Noised, generation: bool = True, alignment: bool = True
    ) -> ModelOutput:
        """The stacked pass: generation half, then alignment half, one encoder pass on both.

        Args:
            noised: inputs of both halves, B samples each.
            generation, alignment: which halves the run's objectives read; fixed for a run, so that
                every rank runs the same modules at every step.
        """
        dtype, n = self.dtype, len(noised.z_BCHW)
        z_path, e_path = self.image_path, self.text_path
        halves: list[tuple[Tensor, ...]] = []
        if generation:
            halves.append(
                (
                    z_path.network_input(noised.z_t_BCHW, noised.t_z_B),
                    z_path.schedule.embed(noised.t_z_B),
                    noised.c_BLD,
                    # Masked out of attention: what stands here cannot reach the image stream.
                    torch.zeros_like(noised.e_t_BE),
                    torch.zeros_like(noised.t_e_B),
                    torch.zeros_like(noised.t_e_B, dtype=torch.bool),
                )
            )
        if alignment:
            clean = torch.zeros_like(noised.t_z_B)
            halves.append(
                (
                    z_path.network_input(noised.z_BCHW, clean),
                    z_path.schedule.embed(clean),
                    noised.null_c_BLD,  # never the caption: it would leak the answer
                    e_path.network_input(noised.e_t_BE, noised.t_e_B),
                    e_path.schedule.embed(noised.t_e_B),
                    torch.ones_like(noised.t_e_B, dtype=torch.bool),
                )
            )
        c_seen = None
        if len(halves) == 2:
            c, null_c, c_seen = _same_length(halves[0][2], halves[1][2])
            halves = [(*h[:2], given, *h[3:]) for h, given in zip(halves, (c, null_c), strict=True)]
        z, t_z, c, e, t_e, seen = (torch.cat(parts) for parts in zip(*halves, strict=True))
        encoded = self.trunk.encode(z.to(dtype), t_z, c.to(dtype), e.to(dtype), t_e, seen, c_seen)
        f_z = e0_hat = token = None
        if generation:
            f_z = self.trunk.decode(encoded.first(n), noised.c_BLD.to(dtype)).float()
        if alignment:
            f_e, token = self.trunk.read_query(encoded.last(n))
            e0_hat = e_path.x0_of(f_e.float(), noised.e_t_BE, noised.t_e_B)
        return ModelOutput(f_z, e0_hat, token)

    def denoise_image(self, z_t_BCHW: Tensor, t_z_B: Tensor, c_BLD: Tensor) -> Tensor:
        """x_0 estimate of the generation branch, for samplers."""
        f = self.predict_image(z_t_BCHW, t_z_B, c_BLD)
        return self.image_path.x0_of(f, z_t_BCHW, t_z_B)

    def predict_image(self, z_t_BCHW: Tensor, t_z_B: Tensor, c_BLD: Tensor) -> Tensor:
        """F of the generation branch alone, as `forward` computes it; for samplers, and for
        objectives that ask the trunk again (as often on every rank, at every step)."""
        query = z_t_BCHW.new_zeros(
            len(z_t_BCHW), self.config.text_encoder.query_dim, dtype=self.dtype
        )
        unseen = torch.zeros(len(z_t_BCHW), dtype=torch.bool, device=z_t_BCHW.device)
        path = self.image_path
        encoded = self.trunk.encode(
            path.network_input(z_t_BCHW, t_z_B).to(self.dtype),
            path.schedule.embed(t_z_B),
            c_BLD.to(self.dtype),
            query,
            torch.zeros_like(t_z_B),
            unseen,
        )
        return self.trunk.decode(encoded, c_BLD.to(self.dtype)).float()

    def denoise_query(
        self, e_t_BE: Tensor, t_e_B: Tensor, z_BCHW: Tensor, null_c_1LD: Tensor
    ) -> Tensor:
        """ê_0 of the alignment branch given clean latents, not normalised."""
        return self.read_query(e_t_BE, t_e_B, z_BCHW, null_c_1LD)[0]

    def read_query(
        self, e_t_BE: Tensor, t_e_B: Tensor, z_BCHW: Tensor, null_c_1LD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`denoise_query`, and the final text token (B, W) beside it."""
        clean = torch.zeros(len(z_BCHW), device=z_BCHW.device)
        encoded = self.trunk.encode(
            self.image_path.network_input(z_BCHW, clean).to(self.dtype),
            self.image_path.schedule.embed(clean),
            null_c_1LD.expand(len(z_BCHW), -1, -1).to(self.dtype),
            self.text_path.network_input(e_t_BE, t_e_B).to(self.dtype),
            self.text_path.schedule.embed(t_e_B),
            torch.ones(len(z_BCHW), dtype=torch.bool, device=z_BCHW.device),
        )
        f_e, token_BW = self.trunk.read_query(encoded)
        return self.text_path.x0_of(f_e.float(), e_t_BE, t_e_B), token_BW


def _same_length(c_BLD: Tensor, null_c_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both halves' conditions, the shorter padded to the longer, and which tokens of the stacked
    two are seen, (2B, L) bool; None where nothing was padded."""
    parts = (c_BLD, null_c_BLD)
    length = max(part.shape[1] for part in parts)
    if all(part.shape[1] == length for part in parts):
        return c_BLD, null_c_BLD, None
    padded = [F.pad(part, (0, 0, 0, length - part.shape[1])) for part in parts]
    place = torch.arange(length, device=c_BLD.device)
    seen = torch.cat([(place < part.shape[1]).expand(len(part), -1) for part in parts])
    return padded[0], padded[1], seen
