"""One sample: what is drawn from it is a pure function, and what is damaged has a reason."""

import io
import json
import struct
import zlib
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.data.samples import (
    Bounds,
    Reason,
    Refused,
    augment,
    captions_of,
    choose_caption,
    decode,
    prepare,
)
from pretrain.data.shards import RawSample
from tests.unit.data.conftest import png

BOUNDS = Bounds(max_bytes=10_000, max_pixels=10_000)


def raw(**files: bytes) -> RawSample:
    return RawSample("k", "s.tar", files)


def reason(sample: RawSample) -> str:
    with pytest.raises(Refused) as caught:
        decode(sample, BOUNDS)
    assert caught.value.reason in get_args(Reason)
    return caught.value.reason


def test_each_kind_of_damage_has_its_reason() -> None:
    stream = io.BytesIO()
    Image.effect_noise((80, 80), 90).convert("RGB").save(stream, "JPEG")
    jpeg = stream.getvalue()
    assert reason(raw(txt=b"a")) == "no image"
    assert reason(raw(png=png())) == "no caption"
    assert reason(raw(png=png(), txt=b"  ")) == "no caption"
    assert reason(raw(png=b"", txt=b"a")) == "undecodable image"
    assert reason(raw(jpg=jpeg[: len(jpeg) // 2], txt=b"a")) == "undecodable image"
    assert reason(raw(png=png(), txt=b"\xff\xfe\xff")) == "undecodable text"
    assert reason(raw(png=png(), json=b"{", txt=b"a")) == "undecodable text"
    assert reason(raw(png=png(size=(101, 100)), txt=b"a")) == "too many pixels"
    assert reason(raw(png=b"x" * 10_001, txt=b"a")) == "too many bytes"


def test_a_bomb_is_refused_by_its_header() -> None:
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + b"\x08\x02\x00\x00\x00"
    bomb = png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]
    assert reason(raw(png=bomb, txt=b"a")) == "too many pixels"


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_png_is_an_image_or_a_reason(data: st.DataObject) -> None:
    bytes_ = bytearray(png(size=(9, 7)))
    for _ in range(data.draw(st.integers(1, 4))):
        bytes_[data.draw(st.integers(8, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(bytes_)))
    try:
        image, _ = decode(raw(png=bytes(bytes_[:cut]), txt=b"a"), BOUNDS)
        prepare(image, 8)
    except Refused as refused:
        assert refused.reason in get_args(Reason)


def test_captions_are_the_listed_ones_else_the_text() -> None:
    listed = json.dumps({"captions": ["b", "c"]}).encode()
    assert captions_of(raw(json=listed, txt=b"a")) == ["b", "c"]
    assert captions_of(raw(json=b'{"captions": []}', txt=b" a\n")) == ["a"]
    assert captions_of(raw(json=b'{"captions": [1]}', txt=b"a")) == ["a"]


def test_transparent_becomes_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(prepare(image, 8), torch.ones(3, 8, 8))


def test_pixels_span_minus_one_to_one_and_keep_channel_order() -> None:
    x_CHW = prepare(Image.new("RGB", (64, 64), (255, 0, 255)), 32)
    assert x_CHW.shape == (3, 32, 32) and x_CHW.dtype == torch.float32
    assert x_CHW[:, 0, 0].tolist() == [1.0, -1.0, 1.0]


@pytest.mark.parametrize("size", [(64, 20), (20, 64), (5, 5), (33, 32)])
def test_any_shape_fills_the_square_with_its_middle(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "black")
    image.putpixel((size[0] // 2, size[1] // 2), (255, 255, 255))
    x_CHW = prepare(image, 16)
    assert x_CHW.shape == (3, 16, 16)
    peak = divmod(int(x_CHW[0].argmax()), 16)
    assert all(6 <= p <= 9 for p in peak)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_draws_depend_on_seed_and_number_alone(number: int) -> None:
    x_CHW = torch.arange(3 * 16 * 16, dtype=torch.float32).reshape(3, 16, 16)
    drawn = augment(x_CHW, 0.5, 0.2, 1, number)
    torch.manual_seed(number)
    assert torch.equal(augment(x_CHW, 0.5, 0.2, 1, number), drawn)
    captions = ["a", "b", "c"]
    assert choose_caption(captions, 1, number) == choose_caption(captions, 1, number)


def test_every_caption_is_drawn_about_equally_and_seeds_differ() -> None:
    captions = ["a", "b", "c", "d"]
    drawn = [choose_caption(captions, 0, n) for n in range(2_000)]
    assert all(400 <= drawn.count(c) <= 600 for c in captions)  # 500 +- 5 standard deviations
    assert drawn != [choose_caption(captions, 1, n) for n in range(2_000)]


def test_no_augmentation_changes_nothing() -> None:
    x_CHW = torch.randn(3, 16, 16)
    assert all(torch.equal(augment(x_CHW, 0.0, 0.0, 0, n), x_CHW) for n in range(20))


def test_flip_mirrors_its_share() -> None:
    x_CHW = torch.arange(3 * 64, dtype=torch.float32).reshape(3, 8, 8)
    flipped = [not torch.equal(augment(x_CHW, 0.25, 0.0, 0, n), x_CHW) for n in range(1_000)]
    assert 180 <= sum(flipped) <= 320  # 250 +- 5 standard deviations
    assert torch.equal(augment(x_CHW, 1.0, 0.0, 0, 0), x_CHW.flip(2))


def test_jitter_shifts_within_reach_and_fills_with_white() -> None:
    black = -torch.ones(3, 20, 20)
    shifts = set()
    for n in range(300):
        moved = augment(black, 0.0, 0.1, 0, n)
        assert moved.shape == black.shape
        rows, columns = (moved[0] == 1).all(1).sum(), (moved[0] == 1).all(0).sum()
        shifts.add((int(rows), int(columns)))
    assert shifts == {(r, c) for r in range(3) for c in range(3)}


def stored(image: Image.Image, extension: str = "png", **options: object) -> torch.Tensor:
    """What training sees of an image that was stored in a format and read again."""
    stream = io.BytesIO()
    image.save(stream, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[extension], **options)
    return prepare(decode(raw(**{extension: stream.getvalue()}, txt=b"a"), BOUNDS)[0], 8)


def palette() -> Image.Image:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), {}, (1, -1, -1)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), {}, (1, 1, 1)),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 51)), {}, (0.6, 0.6, 0.6)),  # a fifth of black
        (Image.new("LA", (8, 8), (0, 0)), {}, (1, 1, 1)),
        (Image.new("L", (8, 8), 51), {}, (-0.6, -0.6, -0.6)),
        (Image.new("L", (8, 8), 51), {"transparency": 51}, (1, 1, 1)),
        (Image.new("1", (8, 8), 1), {}, (1, 1, 1)),
        (Image.new("P", (8, 8), 0), {"transparency": 0}, (1, 1, 1)),
        (Image.fromarray(np.full((8, 8), 0x3333, np.uint16)), {}, (-0.6, -0.6, -0.6)),
        (Image.fromarray(np.full((8, 8), 0xFFFF, np.uint16)), {}, (1, 1, 1)),
        (Image.fromarray(np.full((8, 8), 0x3333, np.uint16)), {"transparency": 0x3333}, (1, 1, 1)),
    ],
)
def test_every_kind_of_png_shows_its_colour_on_white(
    image: Image.Image, options: dict[str, object], expected: tuple[float, ...]
) -> None:
    x_CHW = stored(image, **options)
    assert torch.allclose(
        x_CHW, torch.tensor(expected).float().view(3, 1, 1).expand(3, 8, 8), atol=0.01
    )


def test_a_palette_with_a_transparent_entry_keeps_its_other_colours() -> None:
    x_CHW = stored(palette(), transparency=0)
    assert x_CHW[:, 0, 0].tolist() == [-1, -1, 1] and x_CHW[:, 5, 5].tolist() == [1, 1, 1]


def test_a_cmyk_jpeg_shows_its_colour() -> None:
    x_CHW = stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpg")
    assert torch.allclose(x_CHW, torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 8, 8))


def test_a_webp_is_read_and_a_picture_of_another_format_is_not() -> None:
    assert stored(Image.new("RGB", (8, 8), "white"), "webp", lossless=True).min() == 1
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "BMP")
    assert reason(raw(png=stream.getvalue(), txt=b"a")) == "undecodable image"


@given(
    st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.integers(8, 40),
)
@settings(max_examples=60, deadline=None)
def test_flat_colours_stay_flat_and_in_range(
    colour: tuple[int, int, int], shape: tuple[int, int], size: int
) -> None:
    x_CHW = prepare(Image.new("RGB", shape, colour), size)
    expected = torch.tensor(colour).float().view(3, 1, 1) / 127.5 - 1
    assert torch.allclose(x_CHW, expected.expand(3, size, size), atol=1e-6)


@given(st.integers(0, 1_000), st.sampled_from([(64, 40), (9, 70), (12, 12)]))
@settings(max_examples=30, deadline=None)
def test_any_picture_stays_in_range(seed: int, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(seed).integers(0, 2, (*shape, 3), dtype=np.uint8) * 255
    x_CHW = augment(prepare(Image.fromarray(pixels), 32), 0.5, 0.2, seed, 0)
    assert x_CHW.shape == (3, 32, 32)
    assert x_CHW.min() >= -1 and x_CHW.max() <= 1
