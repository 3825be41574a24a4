"""The benchmark compares like with like: the decode that it gives everybody is ours."""

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks._data.picture import decode as common
from pretrain.data.samples import Bounds, decode, picture
from pretrain.data.shards import RawSample

SIZE = 32
BOUNDS = Bounds(1 << 20, 1 << 20)


def jpeg(width: int, height: int) -> bytes:
    """Noise, so that any other way of scaling shows."""
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    stream = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.mark.parametrize("width", [*range(20, 70), 95, 96, 127, 128, 129, 255, 256, 257, 300])
def test_the_common_decode_is_ours_to_the_bit_at_every_size(width: int) -> None:
    # Around twice the size, a decode at a half is to the pixel or is not: one rule for all.
    for height in {width, width + 1, 2 * SIZE - 1, 2 * SIZE, 100}:
        encoded = jpeg(width, height)
        raw = RawSample("key", "shard", {"jpg": encoded, "txt": b"a caption"})
        ours = picture(decode(raw, BOUNDS, (SIZE, SIZE))[0], (SIZE, SIZE)).numpy()
        assert np.array_equal(ours, common(encoded, SIZE)), (width, height)
