"""The frozen networks that encode data beforehand, and whether a model is what they stand for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain import comm
from pretrain.config import build
from pretrain.data.encoded import DTYPES, REMEDY, Dtype, Encoding, TextEncoding
from pretrain.data.source import DataConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError, DataError
from pretrain.model.autoencoder import Autoencoder, build_autoencoder
from pretrain.model.diffdis import DiffDis, ModelConfig
from pretrain.model.identity import autoencoder_sha256
from pretrain.model.text_config import TextEncoderConfig, TransformersTextConfig
from pretrain.model.text_encoder import FrozenTextEncoder
from pretrain.model.transformers_text import FrozenTransformers
from pretrain.run_config import RunConfig


@dataclass(frozen=True)
class Options:
    """What is written.

    Attributes:
        model: folder of an exported model whose encoders are used; None: the configuration's.
        batch: pictures, or captions, in one forward pass.
        dtype: of latents and token-wise conditions.
        mirrored: whether mirrored pictures are encoded too, for training with ``data.flip``.
        text: whether captions are encoded too.
        part: (i, n): the i-th n-th of the shards, and no manifest.
    """

    model: str | None = None
    batch: int = 64
    dtype: Dtype = "fp16"
    mirrored: bool = False
    text: bool = False
    part: tuple[int, int] = (0, 1)


class Encoders:
    """The frozen networks of an encoding run, on this process's device.

    Raises:
        ConfigError: there is none for what is asked, or it is not for this configuration's data.
    """

    def __init__(self, config: RunConfig, options: Options) -> None:
        data, settings = config.data, config.model.autoencoder
        _check_pictures(data, options)
        if options.model is not None:
            exported = _exported(options.model)
            settings = exported.autoencoder
            if exported.image_size != data.size:
                raise ConfigError(
                    f"data.size={data.size}, but the model in {options.model!r} has image_size="
                    f"{exported.image_size}; make them equal"
                )
        self.options, self.device = options, comm.device()
        self.dtype = DTYPES[options.dtype]
        self.autoencoder: Autoencoder = build_autoencoder(settings)
        self.text: FrozenTextEncoder | FrozenTransformers | None = None
        described = None
        if options.text:
            self.text, self.tokenizer = _text_encoder(config, options)
            t = self.text.config
            described = TextEncoding(self.text.sha256, t.length, t.width, t.query_dim)
        blank = torch.zeros(1, 3, data.size, data.size, device=self.device)
        channels, height, width = map(int, self.autoencoder.encode(blank).shape[1:])
        self.encoding = Encoding(
            autoencoder_sha256(self.autoencoder, settings),
            (channels, height, width),
            options.dtype,
            data.size,
            mirrored=options.mirrored,
            text=described,
        )

    @torch.no_grad()
    def latents(self, pictures_BCHW: Tensor) -> dict[str, Any]:
        """Latents by name, (B, C, H, W) each, of uint8 pictures."""
        pixels = pictures_BCHW.to(self.device).float() / 127.5 - 1
        views = {"latent": pixels}
        if self.options.mirrored:
            views["mirrored"] = pixels.flip(3)
        return {name: self._stored(self.autoencoder.encode(x)) for name, x in views.items()}

    def features(self, captions: Sequence[str]) -> dict[str, Any]:
        """Text features by name, a row for each caption."""
        if self.text is None:
            return {}
        parts = []
        for start in range(0, len(captions), self.options.batch):
            tokens, mask = self.tokenizer.encode(
                captions[start : start + self.options.batch], self.text.config.length
            )
            features = self.text(tokens.to(self.device), mask.to(self.device))
            # e has unit norm and is a target of the loss: it stays fp32, at 4 bytes a coordinate.
            e = features.e_BE.float().cpu().numpy().astype("<f4")
            parts.append((self._stored(features.c_BLD), e, mask.numpy()))
        names = ("c", "e", "mask")
        return dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))

    def _stored(self, x: Tensor) -> Any:
        array = x.float().cpu().numpy().astype(self.dtype)
        if not np.isfinite(array).all():
            raise DataError(
                f"the encoders give values that {self.options.dtype} cannot hold; use --dtype "
                "fp32, and check their weights if that says the same"
            )
        return array


def check_encodings(model: DiffDis, encodings: Sequence[Encoding]) -> None:
    """Refuse encoded data sets that are not what ``model`` would make of the pictures itself.

    Args:
        model: to be trained on them.
        encodings: of the data sets; ``text`` only where it is to be used.

    Raises:
        ConfigError: it names the field that differs.
    """
    if not encodings:
        return
    own = autoencoder_sha256(model.autoencoder, model.config.autoencoder)
    frozen = model.frozen_text_encoder
    text = frozen.sha256 if frozen and any(e.text for e in encodings) else ""
    for number, found in enumerate(encodings):
        where = f"data set {number} of data.train"
        if found.latent != model.latent_shape:
            raise ConfigError(
                f"model.autoencoder gives latents of {model.latent_shape} at model.image_size="
                f"{model.config.image_size}, those of {where} are {found.latent}; set model."
                f"autoencoder to what encoded them, or {REMEDY}"
            )
        if found.autoencoder != own:
            raise ConfigError(
                f"model.autoencoder={model.config.autoencoder.model_dump()} is {own[:12]}…, the "
                f"latents of {where} are of {found.autoencoder[:12]}…; set it to what encoded "
                f"them, or {REMEDY}"
            )
        if found.text is None:
            continue
        if frozen is None:
            raise ConfigError(
                "data.encoded_text=true needs model.text_encoder.frozen_from, or a frozen encoder "
                "of kind transformers: features of a text encoder in training would be of weights "
                "long gone; name what encoded them, or set data.encoded_text: false"
            )
        for name in ("width", "query_dim", "length"):
            if getattr(found.text, name) != getattr(frozen.config, name):
                raise ConfigError(
                    f"model.text_encoder.{name}={getattr(frozen.config, name)}, the text features "
                    f"of {where} have {getattr(found.text, name)}; {REMEDY} with --text"
                )
        if found.text.encoder != text:
            raise ConfigError(
                f"model.text_encoder of {str(frozen.folder)!r} is {text[:12]}…, the text "
                f"features of {where} are of {found.text.encoder[:12]}…; name what encoded them, "
                f"or {REMEDY} with --text"
            )


def _check_pictures(data: DataConfig, options: Options) -> None:
    """What cannot be encoded."""
    if data.encoded:
        raise ConfigError(
            "data.encoded=true: the data is encoded already; give the configuration of the pictures"
        )
    if data.crop != "center":
        raise ConfigError(
            f"data.crop={data.crop!r}: a latent is of one crop; set data.crop: center"
        )
    if data.bucket_group:
        raise ConfigError(
            f"data.bucket_group={data.bucket_group}: latents of several shapes are not supported; "
            "leave it out"
        )
    if options.batch < 1 or not 0 <= options.part[0] < options.part[1]:
        raise ConfigError(
            f"batch={options.batch} must be at least 1, and part={options.part} (i, n) with "
            "0 <= i < n"
        )


def _exported(folder: str) -> ModelConfig:
    """The definition of an exported model."""
    try:
        tree = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--model {folder!r} is not an exported model ({error}); export one with "
            "`python -m pretrain export`"
        ) from None
    return build(ModelConfig, tree, "model").within(Path(folder))


def _text_encoder(
    config: RunConfig, options: Options
) -> tuple[FrozenTextEncoder | FrozenTransformers, Tokenizer]:
    text, tokenizer = config.model.text_encoder, Tokenizer(config.data.tokenizer)
    encoder: FrozenTextEncoder | FrozenTransformers
    if options.model is not None:
        encoder = FrozenTextEncoder(options.model)
    elif isinstance(text, TransformersTextConfig) and text.frozen:
        encoder = FrozenTransformers(text)
    elif isinstance(text, TextEncoderConfig) and text.frozen_from is not None:
        encoder = FrozenTextEncoder(text.frozen_from)
    else:
        raise ConfigError(
            "--text needs a trained text encoder; give the folder of an exported model by --model "
            "or model.text_encoder.frozen_from, or a frozen encoder of kind transformers"
        )
    encoder.check_tokenizer(tokenizer)
    if encoder.config.length != config.data.tokens:
        raise ConfigError(
            f"data.tokens={config.data.tokens}, but the text encoder in {str(encoder.folder)!r} "
            f"takes {encoder.config.length}; make them equal"
        )
    return encoder, tokenizer
