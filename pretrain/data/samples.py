"""One raw sample to a picture and its captions, or a reason to refuse it."""

import io
import json
import math
import random
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageChops
from torch import Tensor

from pretrain.data.shards import RawSample
from pretrain.rng import derive_seed

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Named, so that a file called .png cannot reach another decoder (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG = b"\xff\xd8"
MAX_JSON_BYTES = 1 << 20  # of lists of lists it makes 30 MB of objects
# A longer strip is cut before it is resized: 1 x 10,000 for 512 pixels would take 10 GB.
_LONGEST_STRIP = 64
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_here = threading.local()
Crop = Literal["center", "random"]
Reason = Literal[
    "no image",
    "no caption",
    "too many bytes",
    "too many pixels",
    "too elongated",
    "animated image",
    "undecodable image",
    "undecodable text",
    "caption too long",
]


class Refused(Exception):
    """Why a sample cannot be used; the message is a `Reason`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Bounds:
    """What is opened at all.

    Attributes:
        max_bytes: of the encoded picture.
        max_pixels: of the picture as stored. (179 million are the most: Pillow's own bound.)
        max_caption_bytes: of one caption in UTF-8. A longer one is refused and not cut: it is no
            caption but a page or a dump, and a cut would change the data without a count.
        max_aspect: longer side by shorter side. What a crop shows of a longer strip is too small a
            part to be what the caption says.
    """

    max_bytes: int
    max_pixels: int
    max_caption_bytes: int = 1 << 16
    max_aspect: float = 20.0


@contextmanager
def without_warnings() -> Iterator[None]:
    """Pillow's warnings of odd tags, and by a bound of its own, are not shown. Every decode is
    within one; put around many, it spares them what it costs."""
    if getattr(_here, "quiet", False):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _here.quiet = True
        try:
            yield
        finally:
            _here.quiet = False


class Opened(NamedTuple):
    """A sample within bounds, of whose picture no pixel is decoded yet.

    Attributes:
        image: of a JPEG, opened; of another format None: some decoders take the memory of all
            pixels when they are opened, and many samples may be waiting.
        encoded: the picture's bytes.
        captions: every one there is.
    """

    image: Image.Image | None
    encoded: bytes
    captions: list[str]


def decode(
    raw: RawSample, bounds: Bounds, target: tuple[int, int] | None = None
) -> tuple[Image.Image, list[str]]:
    """The picture as RGB, upright, on white; and every caption it has.

    Animated pictures are refused: nothing says which frame the caption means, and the first is
    often blank or a title.

    Args:
        raw: the sample's files.
        bounds: what is larger is refused by its header, before any pixel is decoded.
        target: (height, width) that `picture` will be asked for. A JPEG that is much larger is then
            decoded at 1/8, 1/4 or 1/2 of its size, in a third of the time; None decodes all of it.

    Raises:
        Refused: with the reason.
    """
    opened = open_sample(raw, bounds, target)
    return load(opened, bounds, target), opened.captions


def open_sample(raw: RawSample, bounds: Bounds, target: tuple[int, int] | None = None) -> Opened:
    """The first half of `decode`, which is quick: all that can be told without pixels.

    Between one picture's decoding and the next this code takes three times as long, for it is in
    no cache of the processor any more: so many samples are opened before the first is loaded.

    Raises:
        Refused: with the reason.
    """
    encoded = next((raw.files[e] for e in IMAGE_EXTENSIONS if e in raw.files), None)
    if encoded is None:
        raise Refused("no image")
    if len(encoded) > bounds.max_bytes:
        raise Refused("too many bytes")
    captions = captions_of(raw, bounds.max_caption_bytes)
    image = _header(encoded, bounds, target) if encoded.startswith(_JPEG) else None
    return Opened(image, encoded, captions)


def load(opened: Opened, bounds: Bounds, target: tuple[int, int] | None = None) -> Image.Image:
    """The second half of `decode`, with the same bounds and target: the picture.

    Raises:
        Refused: with the reason.
    """
    image = opened.image
    return upright(_loaded(_header(opened.encoded, bounds, target) if image is None else image))


def open_picture(
    encoded: bytes, bounds: Bounds, target: tuple[int, int] | None = None
) -> Image.Image:
    """The picture of an encoded file as it is stored, its pixels loaded; `decode` says more.

    Raises:
        Refused: with the reason.
    """
    return _loaded(_header(encoded, bounds, target))


def _header(encoded: bytes, bounds: Bounds, target: tuple[int, int] | None) -> Image.Image:
    """The picture, opened and set to be decoded at the scale that is wanted."""
    try:
        image = _open(encoded, bounds)
        if target is not None and image.format == "JPEG":
            _scale_at_load(image, target if _orientation(image) < 5 else target[::-1])
        return image
    except Exception as error:
        raise _refusal(error) from None


def _loaded(image: Image.Image) -> Image.Image:
    """Its pixels decoded."""
    try:
        image.load()
        return _straight_inks(image)
    except Exception as error:
        raise _refusal(error) from None


def _refusal(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return Refused("too many pixels")
    # Whatever a decoder raises on bytes from anywhere, the bytes are at fault; were it the
    # decoder, the rate of refusals would stop the run.
    return Refused("undecodable image")


def _scale_at_load(image: Image.Image, shape_HW: tuple[int, int]) -> None:
    """Have a JPEG decoded at the least of 1/8, 1/4 and 1/2 of its size that is the shape's to the
    pixel, or twice that at least.

    Between the two, box averaging takes one source pixel here and two there. On noise of a natural
    spectrum, 384 pixels shrunk to 90 are off by 2 of 255 in the mean if decoded whole, by 5 at 1/2
    and by 9 at 1/4.
    """
    width, height = image.size
    if -(-width // 2) < shape_HW[1] or -(-height // 2) < shape_HW[0]:
        return  # most pictures of a corpus that was made for the size
    for divisor in (8, 4, 2):
        ratio = min(-(-width // divisor) / shape_HW[1], -(-height // divisor) / shape_HW[0])
        if ratio == 1 or ratio >= 2:
            image.draft(None, (width // divisor, height // divisor))
            return


def _open(encoded: bytes, bounds: Bounds) -> Image.Image:
    """The picture by its header, within bounds."""
    with without_warnings():
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    width, height = image.size
    if width * height > bounds.max_pixels:
        raise Refused("too many pixels")
    if max(width, height) > bounds.max_aspect * min(width, height):
        raise Refused("too elongated")
    if image.format == "MPO":
        image.format = "JPEG"  # with further pictures, a preview or depth: the first is the picture
    elif image.format != "JPEG" and getattr(image, "is_animated", False):
        raise Refused("animated image")
    return image


def size_of(encoded: bytes) -> tuple[int, int]:
    """(width, height) of a picture when upright, by its header alone; (0, 0) if it has none."""
    try:
        image = _open(encoded, Bounds(len(encoded), 1 << 62, max_aspect=math.inf))
    except Exception:
        return (0, 0)
    return image.size if _orientation(image) < 5 else image.size[::-1]


def _straight_inks(image: Image.Image) -> Image.Image:
    """Pillow takes every CMYK JPEG for Adobe's, which store the inks inverted."""
    if image.mode != "CMYK" or "adobe" in image.info:
        return image
    straight = ImageChops.invert(image)
    straight.format, straight.info = image.format, image.info
    return straight


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    with without_warnings():
        try:
            return int(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # a damaged tag is no reason to lose the picture
            return 1


def upright(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF says a viewer should turn it."""
    turn = _TURNS.get(_orientation(image))
    rgb = flatten(image)
    return rgb if turn is None else rgb.transpose(turn)


def captions_of(raw: RawSample, max_caption_bytes: int = 1 << 16) -> list[str]:
    """Every caption of a sample: the json field `captions` (a list), else the txt file, else the
    json field `caption` or `text` (a string, or a list of them), as converters write them.

    Raises:
        Refused: there is none, or it is not text, or too long.
    """
    text = raw.files.get("txt", b"")
    if "json" not in raw.files:
        if len(text) > max_caption_bytes:
            raise Refused("caption too long")
        try:
            caption = text.decode("utf-8-sig").strip()
        except ValueError:
            raise Refused("undecodable text") from None
        if not caption:
            raise Refused("no caption")
        return [caption]
    encoded = raw.files["json"]
    if len(encoded) > MAX_JSON_BYTES:
        raise Refused("too many bytes")
    if len(text) > max_caption_bytes:
        raise Refused("caption too long")
    try:
        fields = json.loads(encoded)
        if not isinstance(fields, dict):
            raise Refused("undecodable text")
        captions = (
            _texts(fields.get("captions"))
            or _texts(text.decode("utf-8-sig").strip())
            or _texts(fields.get("caption"))
            or _texts(fields.get("text"))
        )
        # Raises on half of a surrogate pair, which a json escape can spell and no encoder takes.
        longest = max((len(c.encode()) for c in captions), default=0)
    except (ValueError, RecursionError):
        raise Refused("undecodable text") from None
    if longest > max_caption_bytes:
        raise Refused("caption too long")
    if not captions:
        raise Refused("no caption")
    return captions


def _texts(value: Any) -> list[str]:
    """The strings in a string or list that are not blank."""
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and v.strip()]


def flatten(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as on a page."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit; Pillow's own conversion clips it, to white for the most part."""
    grey = np.asarray(image)
    scaled = Image.fromarray((grey >> 8).astype(np.uint8))
    if "transparency" in image.info:
        opaque = grey != image.info["transparency"]
        scaled.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return scaled


def picture(
    image: Image.Image,
    shape_HW: tuple[int, int],
    crop: Crop = "center",
    seed: int = 0,
    number: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """(3, H, W) uint8: scaled until it just covers the shape, then cut to it.

    Args:
        image: of any mode.
        shape_HW: height and width in pixels.
        crop: where it is cut along the side that is left over: the middle, or a place drawn from
            (seed, sample number).
        out: where to write it; None: memory of its own.
    """
    out = torch.empty(3, *shape_HW, dtype=torch.uint8) if out is None else out
    np.copyto(out.numpy(), fitted(image, shape_HW, crop, seed, number))
    return out


def fitted(
    image: Image.Image, shape_HW: tuple[int, int], crop: Crop, seed: int, number: int
) -> npt.NDArray[np.uint8]:
    """The same as a view of (H, 3, W): its reader makes the only copy."""
    height, width = shape_HW
    rgb = _cover(flatten(image), shape_HW)
    if rgb.size != (width, height):
        left, top = rgb.width - width, rgb.height - height
        if crop == "random":
            draw = random.Random(derive_seed(seed, number, "crop"))
            left, top = draw.randint(0, left), draw.randint(0, top)
        else:
            left, top = left // 2, top // 2
        rgb = rgb.crop((left, top, left + width, top + height))
    # Packed with the colours of a line one after another: the one copy that is left moves whole
    # lines, which takes a fifth of the time that pixels of three bytes do.
    lines_HCW = np.frombuffer(rgb.tobytes("raw", "RGB;L"), np.uint8).reshape(height, 3, width)
    return lines_HCW.transpose(1, 0, 2)


def _scale(size: tuple[int, int], shape_HW: tuple[int, int]) -> float:
    """By which a picture of ``size`` (width, height) just covers ``shape_HW``."""
    return max(shape_HW[1] / size[0], shape_HW[0] / size[1])


def _cover(rgb: Image.Image, shape_HW: tuple[int, int]) -> Image.Image:
    """``rgb`` resized, aspect kept, to just cover ``shape_HW``."""
    height, width = shape_HW
    scale = _scale(rgb.size, shape_HW)
    longest_x = math.ceil(_LONGEST_STRIP * width / scale)
    longest_y = math.ceil(_LONGEST_STRIP * height / scale)
    if rgb.width > longest_x or rgb.height > longest_y:
        left, top = max(0, rgb.width - longest_x) // 2, max(0, rgb.height - longest_y) // 2
        box = (left, top, min(rgb.width, left + longest_x), min(rgb.height, top + longest_y))
        rgb = rgb.crop(box)
    size = max(width, round(rgb.width * scale)), max(height, round(rgb.height * scale))
    if size == rgb.size:
        return rgb
    # Box averaging when shrinking: every source pixel counts once, and flat colours stay flat.
    return rgb.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)


def prepare(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) fp32 in [-1, 1]: the shorter side scaled to ``size``, the middle cut out."""
    return picture(image, (size, size)).float() / 127.5 - 1


def augment(image_CHW: Tensor, flip: float, jitter: float, seed: int, number: int) -> Tensor:
    """Mirror with probability ``flip`` and shift by up to ``jitter`` of each side, white moving in.

    A pure function of (seed, sample number), on uint8.
    """
    if not flip and not jitter:
        return image_CHW
    draw = random.Random(derive_seed(seed, number, "augment"))
    if draw.random() < flip:
        image_CHW = image_CHW.flip(2)
    _, height, width = image_CHW.shape
    reach_y, reach_x = int(jitter * height), int(jitter * width)
    dy, dx = draw.randint(-reach_y, reach_y), draw.randint(-reach_x, reach_x)
    if not dy and not dx:
        return image_CHW
    moved = torch.full_like(image_CHW, 255)
    moved[:, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)] = image_CHW[
        :, max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)
    ]
    return moved


def choose_caption(captions: list[str], seed: int, number: int) -> str:
    """One caption, a pure function of (seed, sample number)."""
    if len(captions) == 1:
        return captions[0]
    return captions[derive_seed(seed, number, "caption") % len(captions)]
