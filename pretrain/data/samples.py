"""One raw sample to an image tensor and a caption, or a reason to refuse it."""

import io
import json
import random
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.data.shards import RawSample
from pretrain.rng import derive_seed

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Named, so that a file called .png cannot reach another decoder (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP")
Reason = Literal[
    "no image",
    "no caption",
    "too many bytes",
    "too many pixels",
    "undecodable image",
    "undecodable text",
]


class Refused(Exception):
    """Why a sample cannot be used; the message is a `Reason`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Bounds:
    """Largest encoded file and decoded picture that is opened at all."""

    max_bytes: int
    max_pixels: int


def decode(raw: RawSample, bounds: Bounds) -> tuple[Image.Image, list[str]]:
    """The picture as it is stored, and every caption it has.

    Raises:
        Refused: with the reason.
    """
    encoded = next((raw.files[e] for e in IMAGE_EXTENSIONS if e in raw.files), None)
    if encoded is None:
        raise Refused("no image")
    if len(encoded) > bounds.max_bytes:
        raise Refused("too many bytes")
    captions = captions_of(raw)
    try:
        with warnings.catch_warnings():
            # Our own bound is checked below, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            if image.width * image.height > bounds.max_pixels:
                raise Refused("too many pixels")
            image.load()
    except Image.DecompressionBombError:
        raise Refused("too many pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError):
        raise Refused("undecodable image") from None
    return image, captions


def captions_of(raw: RawSample) -> list[str]:
    """Every caption of a sample: the json field `captions`, else the txt file.

    Raises:
        Refused: there is none, or it is not text.
    """
    try:
        if "json" in raw.files:
            listed = json.loads(raw.files["json"]).get("captions")
            if (
                isinstance(listed, list)
                and listed
                and all(isinstance(c, str) and c.strip() for c in listed)
            ):
                return listed
        text = raw.files.get("txt", b"").decode().strip()
    except (ValueError, AttributeError):
        raise Refused("undecodable text") from None
    if not text:
        raise Refused("no caption")
    return [text]


def flatten(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as on a page."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit; Pillow's own conversion clips it, to white for the most part."""
    grey = np.asarray(image)
    scaled = Image.fromarray((grey >> 8).astype(np.uint8))
    if "transparency" in image.info:
        opaque = grey != image.info["transparency"]
        scaled.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return scaled


def prepare(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) fp32 in [-1, 1]: the shorter side scaled to ``size``, the middle cut out."""
    rgb = flatten(image)
    scale = size / min(rgb.size)
    width, height = (max(size, round(side * scale)) for side in rgb.size)
    # Box averaging when shrinking: every source pixel counts once, and flat colours stay flat.
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    rgb = rgb.resize((width, height), method)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(rgb.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() / 127.5 - 1


def augment(image_CHW: Tensor, flip: float, jitter: float, seed: int, number: int) -> Tensor:
    """Mirror with probability ``flip`` and shift by up to ``jitter`` of the side, white moving in.

    A pure function of (seed, sample number).
    """
    draw = random.Random(derive_seed(seed, number, "augment"))
    if draw.random() < flip:
        image_CHW = image_CHW.flip(2)
    reach = int(jitter * image_CHW.shape[1])
    dy, dx = draw.randint(-reach, reach), draw.randint(-reach, reach)
    if dy or dx:
        side = image_CHW.shape[1]
        padded = torch.ones(3, side + 2 * reach, side + 2 * reach)
        padded[:, reach : reach + side, reach : reach + side] = image_CHW
        image_CHW = padded[
            :, reach + dy : reach + dy + side, reach + dx : reach + dx + side
        ].contiguous()
    return image_CHW


def choose_caption(captions: list[str], seed: int, number: int) -> str:
    """One caption, a pure function of (seed, sample number)."""
    return captions[derive_seed(seed, number, "caption") % len(captions)]
