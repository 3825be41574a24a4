"""One sample: what is drawn from it is a pure function, and what is damaged has a reason."""

import contextlib
import io
import json
import resource
import struct
import zlib
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from pretrain.data.samples import (
    MAX_JSON_BYTES,
    Bounds,
    Reason,
    Refused,
    augment,
    captions_of,
    choose_caption,
    decode,
    flatten,
    open_picture,
    picture,
    prepare,
    size_of,
)
from pretrain.data.shards import RawSample
from tests.support import faulty
from tests.unit.data.conftest import png

BOUNDS = Bounds(max_bytes=10_000, max_pixels=10_000)
WIDE = Bounds(faulty.MAX_BYTES, 64_000_000)


def raw(**files: bytes) -> RawSample:
    return RawSample("k", "s.tar", files)


def reason(sample: RawSample) -> str:
    with pytest.raises(Refused) as caught:
        decode(sample, BOUNDS)
    assert caught.value.reason in get_args(Reason)
    return caught.value.reason


@pytest.mark.parametrize("key", [k for k, f in faulty.faults().items() if f[2] is not None])
def test_each_planted_sample_is_good_or_has_its_reason(key: str) -> None:
    entries, reasons, usable = faulty.faults()[key]
    files = {n.partition(".")[2].lower(): d for n, d in entries[:3]}
    try:
        image, captions = decode(RawSample(key, "s.tar", files), WIDE, (32, 32))
    except Refused as refused:
        assert not usable and reasons == [refused.reason]
        assert refused.reason in get_args(Reason)
    else:
        assert usable and image.mode == "RGB" and captions == ["a caption"]
        assert picture(image, (32, 32)).shape == (3, 32, 32)


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


def test_captions_are_the_listed_ones_else_the_text_else_a_field() -> None:
    listed = json.dumps({"captions": ["b", "c", " ", 7], "caption": "d"}).encode()
    assert captions_of(raw(json=listed, txt=b"a")) == ["b", "c"]
    assert captions_of(raw(json=b'{"captions": []}', txt=b" a\n")) == ["a"]
    assert captions_of(raw(json=b'{"captions": [1]}', txt=b"a")) == ["a"]
    assert captions_of(raw(json=b'{"caption": "d", "text": "e"}')) == ["d"]
    assert captions_of(raw(json=b'{"caption": null, "text": ["e", "f"]}')) == ["e", "f"]
    assert captions_of(raw(txt=b"\xef\xbb\xbfa")) == ["a"]


def test_bounds_of_texts() -> None:
    assert captions_of(raw(txt=b"x" * 100), 100) == ["x" * 100]
    long = {"txt": b"x" * 101}, {"json": json.dumps({"captions": ["a", "é" * 51]}).encode()}
    for files in long:
        with pytest.raises(Refused, match="caption too long"):
            captions_of(raw(**files), 100)
    large = json.dumps({"caption": "a", "exif": "x" * MAX_JSON_BYTES}).encode()
    with pytest.raises(Refused, match="too many bytes"):
        captions_of(raw(json=large))


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


def ramp(height: int = 16, width: int = 16) -> torch.Tensor:
    return (torch.arange(3 * height * width) % 251).to(torch.uint8).reshape(3, height, width)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_draws_depend_on_seed_and_number_alone(number: int) -> None:
    x_CHW = ramp()
    drawn = augment(x_CHW, 0.5, 0.2, 1, number)
    cut = picture(faulty.noise(1), (32, 32), "random", 1, number)
    torch.manual_seed(number)
    assert torch.equal(augment(x_CHW, 0.5, 0.2, 1, number), drawn)
    assert torch.equal(x_CHW, ramp())
    assert torch.equal(picture(faulty.noise(1), (32, 32), "random", 1, number), cut)
    captions = ["a", "b", "c"]
    assert choose_caption(captions, 1, number) == choose_caption(captions, 1, number)


def test_every_caption_is_drawn_about_equally_and_seeds_differ() -> None:
    captions = ["a", "b", "c", "d"]
    drawn = [choose_caption(captions, 0, n) for n in range(2_000)]
    assert all(400 <= drawn.count(c) <= 600 for c in captions)  # 500 +- 5 standard deviations
    assert drawn != [choose_caption(captions, 1, n) for n in range(2_000)]


def test_no_augmentation_changes_nothing() -> None:
    assert all(torch.equal(augment(ramp(), 0.0, 0.0, 0, n), ramp()) for n in range(20))


def test_flip_mirrors_its_share() -> None:
    x_CHW = ramp(8, 8)
    flipped = [not torch.equal(augment(x_CHW, 0.25, 0.0, 0, n), x_CHW) for n in range(1_000)]
    assert 180 <= sum(flipped) <= 320  # 250 +- 5 standard deviations
    assert torch.equal(augment(x_CHW, 1.0, 0.0, 0, 0), x_CHW.flip(2))


def test_jitter_shifts_within_reach_and_fills_with_white() -> None:
    black = torch.zeros(3, 20, 30, dtype=torch.uint8)
    shifts = set()
    for n in range(500):
        moved = augment(black, 0.0, 0.1, 0, n)
        assert moved.shape == black.shape and moved.dtype == torch.uint8
        shifts.add((int((moved[0] == 255).all(1).sum()), int((moved[0] == 255).all(0).sum())))
    assert shifts == {(r, c) for r in range(3) for c in range(4)}


def test_jitter_moves_the_picture_whole() -> None:
    x_CHW = ramp(20, 20)
    for n in range(50):
        moved = augment(x_CHW, 0.0, 0.1, 0, n)
        wide = torch.full((3, 24, 24), 255, dtype=torch.uint8)
        wide[:, 2:22, 2:22] = x_CHW
        windows = [wide[:, y : y + 20, x : x + 20] for y in range(5) for x in range(5)]
        assert sum(torch.equal(moved, w) for w in windows) == 1


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (40, 24), (48, 64), (96, 128), (7, 90)])
def test_a_picture_covers_its_shape_and_no_more(shape: tuple[int, int]) -> None:
    image = faulty.noise(3)  # 64 x 48
    x_CHW = picture(image, shape)
    assert x_CHW.dtype == torch.uint8 and x_CHW.shape == (3, *shape) and x_CHW.is_contiguous()
    scale = max(shape[0] / 48, shape[1] / 64)
    height, width = round(48 * scale), round(64 * scale)
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    whole = np.asarray(image.resize((width, height), method) if scale != 1 else image)
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    expected = whole[top : top + shape[0], left : left + shape[1]].transpose(2, 0, 1)
    assert (x_CHW.numpy() == expected).all()


def test_random_crops_reach_both_ends_and_stay_inside() -> None:
    image = Image.new("RGB", (40, 16))
    for x in range(40):
        image.paste((x, 0, 0), (x, 0, x + 1, 16))
    lefts = [int(picture(image, (16, 16), "random", 0, n)[0, 0, 0]) for n in range(500)]
    assert set(lefts) == set(range(25))
    assert lefts != [int(picture(image, (16, 16), "random", 1, n)[0, 0, 0]) for n in range(500)]
    assert int(picture(image, (16, 16))[0, 0, 0]) == 12


@given(st.integers(3, 130), st.integers(3, 130), st.integers(8, 64), st.sampled_from("RLC"))
@settings(max_examples=80, deadline=None)
def test_pictures_and_evaluation_see_the_same(width: int, height: int, size: int, m: str) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert({"R": "RGB", "L": "LA", "C": "RGBA"}[m])
    x_CHW = prepare(image, size)
    assert torch.equal(picture(image, (size, size)).float() / 127.5 - 1, x_CHW)
    # And both what evaluation saw before pictures were bytes: written out in numpy.
    rgb = flatten(image)
    scale = size / min(rgb.size)
    w, h = (max(size, round(side * scale)) for side in rgb.size)
    rgb = rgb.resize((w, h), Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    left, top = (w - size) // 2, (h - size) // 2
    middle = np.asarray(rgb.crop((left, top, left + size, top + size)), dtype=np.float32)
    assert (x_CHW.numpy() == middle.transpose(2, 0, 1) / np.float32(127.5) - 1).all()


def test_a_long_strip_takes_little_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x_CHW = picture(Image.new("RGB", (1, 60_000), (9, 9, 9)), (256, 256))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB; whole: 16 GB
    assert (x_CHW == 9).all()


JPEG_TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("turn", JPEG_TURNS)
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_a_picture_is_turned_as_its_exif_says(turn: int, extension: str) -> None:
    plain = raw(**{extension: faulty.encoded(faulty.noise(5), extension)}, txt=b"a")
    tagged = faulty.encoded(faulty.noise(5), extension, exif=faulty.orientation(turn))
    upright, _ = decode(raw(**{extension: tagged}, txt=b"a"), BOUNDS)
    expected = JPEG_TURNS[turn](np.asarray(decode(plain, BOUNDS)[0]))
    assert (np.asarray(upright) == expected).all()
    assert size_of(tagged) == upright.size


def test_a_damaged_orientation_loses_no_picture() -> None:
    exif = faulty.orientation(6)
    for damaged in (exif[:-6], exif.replace(b"\x12\x01\x03\x00", b"\x12\x01\x02\x00")):
        tagged = faulty.encoded(faulty.noise(5), "jpg", exif=damaged)
        assert decode(raw(jpg=tagged, txt=b"a"), BOUNDS)[0].mode == "RGB"


def photograph(width: int, height: int, **options: object) -> bytes:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return faulty.encoded(image, "jpg", quality=95, subsampling=0, **options)


@pytest.mark.parametrize(
    ("size", "target", "loaded"),
    [
        ((512, 512), (64, 64), (64, 64)),
        ((512, 512), (63, 63), (128, 128)),
        ((512, 512), (65, 65), (256, 256)),
        ((512, 512), (256, 256), (256, 256)),
        ((512, 384), (256, 256), (512, 384)),  # half of it would not cover
        ((512, 384), (32, 32), (128, 96)),
        ((1000, 511), (255, 255), (1000, 511)),
        ((1000, 511), (256, 256), (500, 256)),
        ((512, 256), (64, 128), (128, 64)),
        ((512, 256), (128, 64), (256, 128)),
        ((64, 48), (256, 256), (64, 48)),
    ],
)
def test_a_jpeg_is_loaded_at_the_least_scale_that_serves(
    size: tuple[int, int], target: tuple[int, int], loaded: tuple[int, int]
) -> None:
    encoded = photograph(*size)
    assert open_picture(encoded, WIDE, target).size == loaded
    assert open_picture(encoded, WIDE).size == size
    turned = photograph(*size, exif=faulty.orientation(6))
    assert open_picture(turned, WIDE, target[::-1]).size == loaded
    assert decode(raw(jpg=turned, txt=b"a"), WIDE, target[::-1])[0].size == loaded[::-1]


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_scaling_at_load_shows_the_same_picture(options: dict[str, object]) -> None:
    sample = raw(jpg=photograph(512, 384, **options), txt=b"a")
    for size, most in ((48, 1.5), (96, 1.5), (192, 1.5), (33, 7.0), (64, 7.0), (90, 7.0)):
        whole = picture(decode(sample, WIDE)[0], (size, size)).float()
        scaled = picture(decode(sample, WIDE, (size, size))[0], (size, size)).float()
        assert (whole - scaled).abs().mean() < most, (
            size
        )  # of 255; measured 0.4 to 0.6, and 5.3 to 6.1


def test_inks_that_are_not_inverted_show_their_colour() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    adobe = faulty.encoded(red, "jpg", quality=100)
    place = adobe.index(b"\xff\xee")
    length = struct.unpack(">H", adobe[place + 2 : place + 4])[0]
    assert adobe[place + 4 : place + 9] == b"Adobe"
    plain = adobe[:place] + adobe[place + 2 + length :]
    image, _ = decode(raw(jpg=adobe, txt=b"a"), BOUNDS)
    other, _ = decode(raw(jpg=plain, txt=b"a"), BOUNDS)
    assert image.getpixel((8, 8)) == (255, 0, 0)  # as Pillow wrote it, inverted and marked
    assert other.getpixel((8, 8)) == (
        0,
        0,
        0,
    )  # the same numbers, read as ink: all of it, and black
    assert open_picture(plain, BOUNDS).format == "JPEG"


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_a_picture_cut_anywhere_is_refused(extension: str) -> None:
    whole = faulty.encoded(faulty.noise(2), extension)
    pixels = faulty.noise(2).tobytes()
    for end in range(0, len(whole) - 12, max(1, len(whole) // 60)):
        sample = raw(**{extension: whole[:end], "txt": b"a"})
        if extension == "png" and end > 0.95 * len(whole):
            with contextlib.suppress(Refused):  # all pixels, and then no check sum
                assert decode(sample, BOUNDS)[0].tobytes() == pixels
        else:
            assert reason(sample) == "undecodable image"


def test_what_is_out_of_bounds_is_refused_before_a_pixel_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert reason(raw(png=png(size=(101, 100)), txt=b"a")) == "too many pixels"
    assert reason(raw(jpg=photograph(128, 96), txt=b"a")) == "too many pixels"
    assert reason(raw(png=b"x" * 10_001, txt=b"a")) == "too many bytes"
    assert reason(raw(png=png(size=(1, 21)), txt=b"a")) == "too elongated"
    for key in ("animated-png", "animated-webp"):
        with pytest.raises(Refused, match="animated image"):
            open_picture(faulty.faults()[key][0][0][1], WIDE)


def test_sizes_come_from_headers() -> None:
    assert size_of(faulty.bomb(8_000)) == (8_000, 8_000)
    assert size_of(b"") == size_of(b"<html>") == (0, 0)
    assert size_of(faulty.encoded(faulty.noise(5), "webp")) == (64, 48)


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
