"""A feature extractor is a file in this folder: images in, one row of features for each image out.

Its ``build(path)`` takes the file of its weights (None: where the file itself looks by default) and
returns an `Extractor`.
"""

import hashlib
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import plugins
from pretrain.config import Config

PACKAGE = "pretrain.features"


class FeaturesConfig(Config):
    """Attributes:
    kind: a file of pretrain/features: ``squeezenet`` or ``inception``.
    path: of its weights; None where the extractor has a default.
    """

    kind: str = "squeezenet"
    path: str | None = None


class Extractor(Protocol):
    """A frozen network. Which one, and with which weights, is its fingerprint.

    Attributes:
        name: of the network.
        width: features of an image.
        fingerprint: of everything that its features depend on.
    """

    name: str
    width: int
    fingerprint: str

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Features (N, D), fp32, on the images' device, of images in [-1, 1] of any size."""


def build(config: FeaturesConfig, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of ``config``, its weights on ``device``.

    Raises:
        ConfigError: there is no such kind.
        DataError: its weights are missing, or are not those of its network.
    """
    module = plugins.load(PACKAGE, config.kind, "features.kind")
    extractor: Extractor = module.build(config.path, device)
    return extractor


def fingerprint(name: str, state: Mapping[str, Tensor]) -> str:
    """``name`` and a hash of the weights, whatever file they came from."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + str(tuple(state[key].shape)).encode())
        digest.update(state[key].detach().float().cpu().contiguous().numpy().tobytes())
    return f"{name}-{digest.hexdigest()[:24]}"


def to_uint8(images_NCHW: Tensor) -> Tensor:
    """Images in [-1, 1] as the pixels that a PNG of them would hold."""
    return ((images_NCHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels_NCHW: Tensor) -> Tensor:
    """Pixels as fp32 in [-1, 1]."""
    return pixels_NCHW.float() / 127.5 - 1


def resized(x_NCHW: Tensor, size: int) -> Tensor:
    """``size`` × ``size``, bilinear, with antialiasing where it shrinks (Parmar et al. 2022)."""
    if x_NCHW.shape[-2:] == (size, size):
        return x_NCHW
    return F.interpolate(x_NCHW, (size, size), mode="bilinear", align_corners=False, antialias=True)
