"""Pixels to latents and back. Frozen, and outside the engine: no parameter of it is ever
partitioned."""

from typing import Annotated, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from pretrain import hub
from pretrain.config import Config
from pretrain.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Autoencoder(Protocol):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, channels, H / factor, W / factor) and back."""

    channels: int
    factor: int

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents of about unit scale."""

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Images; may leave [-1, 1] slightly."""


class SpaceToDepthConfig(Config):
    """Blocks of factor × factor pixels become channels: exact, invertible, free.

    Attributes:
        factor: 1 is plain pixels.
        shift: taken from every pixel; the mean of the data centres the latents, as EDM's
            coefficients assume (drawings on white have a mean of 0.6).
        gains: of the three colour axes, luminance, orange to blue and magenta to green, onto which
            pixels are turned; None leaves red, green and blue. Of drawings green has 4% of the
            variance, and is what a short training leaves out.
    """

    kind: Literal["space_to_depth"] = "space_to_depth"
    factor: int = Field(2, ge=1)
    shift: float = 0.0
    gains: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None


class DiffusersConfig(Config):
    """A pretrained autoencoder in diffusers' format.

    Attributes:
        path: a folder, or a hub name that the machine can reach.
        model: the diffusers class.
        subfolder: where in the folder it lies; "vae" in a pipeline folder.
        precision: in which it is held and computes.
        channels, factor: of its latents; checked against the files.
    """

    kind: Literal["diffusers"] = "diffusers"
    path: str
    model: Literal["AutoencoderKL", "AutoencoderTiny"] = "AutoencoderKL"
    subfolder: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels: int = Field(4, ge=1)
    factor: int = Field(8, ge=1)


AutoencoderConfig = Annotated[SpaceToDepthConfig | DiffusersConfig, Field(discriminator="kind")]


_COLOUR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


class SpaceToDepth:
    """An exact, parameter-free autoencoder."""

    def __init__(
        self, factor: int, shift: float = 0.0, gains: tuple[float, float, float] | None = None
    ) -> None:
        self.factor = factor
        self.shift = shift
        self.channels = 3 * factor**2
        self.axes = self.inverse = None
        if gains is not None:
            turn = F.normalize(torch.tensor(_COLOUR_AXES), dim=1)
            scale = torch.tensor(gains)
            self.axes = scale[:, None] * turn
            self.inverse = turn.T / scale

    def encode(self, images_BCHW: Tensor) -> Tensor:
        centred = _turned(images_BCHW - self.shift, self.axes)
        return F.pixel_unshuffle(centred, self.factor)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        images_BCHW = _turned(F.pixel_shuffle(z_BCHW, self.factor), self.inverse) + self.shift
        return images_BCHW.contiguous()


def _turned(images_BCHW: Tensor, axes: Tensor | None) -> Tensor:
    if axes is None:
        return images_BCHW
    return torch.einsum("dc,bchw->bdhw", axes.to(images_BCHW), images_BCHW)


class Diffusers:
    """AutoencoderKL or AutoencoderTiny, frozen; latents are scaled by the model's own factor.

    Raises:
        ConfigError: the folder holds no such autoencoder, or one of other latents.
    """

    def __init__(self, config: DiffusersConfig) -> None:
        import diffusers

        field = "model.autoencoder"
        folder = hub.folder(f"{field}.path", config.path, config.subfolder)
        cls = getattr(diffusers, config.model)
        try:
            made = cls.load_config(folder, local_files_only=True).get("_class_name", config.model)
            if made != config.model:
                raise ValueError(f"its config.json is of a {made}")
            vae: Any
            vae, found = cls.from_pretrained(
                folder,
                output_loading_info=True,
                torch_dtype=_DTYPES[config.precision],
                local_files_only=True,
                low_cpu_mem_usage=False,  # it would need accelerate
            )
            if found["missing_keys"]:
                raise ValueError(f"it lacks {sorted(found['missing_keys'])[0]}, and perhaps more")
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{field}.path={str(folder)!r} cannot be loaded as {config.model} ({why}); give "
                f"the folder of one (subfolder: vae in a pipeline folder), or set {field}.model"
            ) from None
        self.vae = vae.eval().requires_grad_(False)
        self.channels = int(vae.config.latent_channels)
        self.factor = 2 ** (len(getattr(vae.config, "block_out_channels", [0] * 4)) - 1)
        self.scale = float(vae.config.scaling_factor)
        for name in ("channels", "factor"):
            given, own = getattr(config, name), getattr(self, name)
            if given != own:
                raise ConfigError(
                    f"{field}.{name}={given}, but the autoencoder in path={str(folder)!r} has "
                    f"{own}; set {field}.{name}: {own}"
                )

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        encoded = self.vae.to(images_BCHW.device).encode(images_BCHW.to(self.vae.dtype))
        # The mode, not a draw: the latent of a sample is then a function of its pixels alone.
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents * self.scale).float()

    @torch.no_grad()
    def decode(self, z_BCHW: Tensor) -> Tensor:
        return (
            self.vae.to(z_BCHW.device)
            .decode((z_BCHW / self.scale).to(self.vae.dtype))
            .sample.float()
        )


def build_autoencoder(config: SpaceToDepthConfig | DiffusersConfig) -> Autoencoder:
    """The autoencoder of ``config``; a diffusers one is read from its folder."""
    if isinstance(config, DiffusersConfig):
        return Diffusers(config)
    return SpaceToDepth(config.factor, config.shift, config.gains)
