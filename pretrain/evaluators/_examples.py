"""Pictures for a report: small, as text."""

import base64
import io

from PIL import Image

from pretrain.data.evalset import EvalSet
from pretrain.data.samples import Bounds, open_picture, upright

SIDE = 96  # pixels at most
_BOUNDS = Bounds(1 << 28, 1 << 27, max_aspect=1e9)  # the run's own bounds let it pass before


def thumbnails(data: EvalSet, indices: list[int]) -> dict[int, str]:
    """Base64 PNGs of some images of a set, by index."""
    wanted = sorted(set(indices))
    return {i: thumbnail(encoded) for i, encoded in zip(wanted, data.pictures(wanted), strict=True)}


def thumbnail(encoded: bytes) -> str:
    """A base64 PNG, `SIDE` pixels on its longer side at most."""
    image = upright(open_picture(encoded, _BOUNDS, (SIDE, SIDE)))
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
