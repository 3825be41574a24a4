"""The one decode that the limit and every peer call: what pretrain/data/samples.py asks of Pillow
for a plain RGB JPEG, without its checks. (tests/unit/data/test_benchmark.py holds them together.)
"""

import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    import torch


def decode(encoded: bytes, size: int) -> npt.NDArray[np.uint8]:
    """(3, size, size): scaled until it covers the square, the middle cut out.

    The array is a view of (size, 3, size): its reader makes the only copy.
    """
    image = Image.open(io.BytesIO(encoded), formats=("JPEG",))
    for divisor in (8, 4, 2):  # a reduced decode, where it is the wanted size or twice that
        ratio = min(-(-side // divisor) for side in image.size) / size
        if ratio == 1 or ratio >= 2:
            image.draft(None, (image.width // divisor, image.height // divisor))
            break
    image.load()
    scale = size / min(image.size)
    covering = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    rgb: Image.Image = image
    if covering != rgb.size:
        method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        rgb = rgb.resize(covering, method)
    if rgb.size != (size, size):
        left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
        rgb = rgb.crop((left, top, left + size, top + size))
    lines_HCW = np.frombuffer(rgb.tobytes("raw", "RGB;L"), np.uint8).reshape(size, 3, size)
    return lines_HCW.transpose(1, 0, 2)


def tensor(encoded: bytes, size: int) -> "torch.Tensor":
    """The same as a tensor of its own, as our loader makes it."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(decode(encoded, size)))
