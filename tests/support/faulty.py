"""A small corpus with every fault that a crawl has, and the exact count of each reason.

Written with tarfile and Pillow alone, so that what reads it is tested by other code.
"""

import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

MAX_BYTES = 1 << 20  # data.max_bytes for this corpus: one picture is one byte larger
MAX_MEMBERS = 64  # the default of a sample; one sample has three more
Entry = tuple[str, bytes] | tarfile.TarInfo


@dataclass(frozen=True)
class Planted:
    """A corpus with faults.

    Attributes:
        shards: paths, in order; the last is cut in the first member of a sample.
        good: samples that can be used; `whole` of them stand before the cut in the last shard.
        whole: as said.
        bad: samples that exist and are refused.
        expected: refusals by reason in one pass over the samples. The cut is not in it: it is found
            when the shard is opened, once, and not in a sample.
        keys: of the good samples.
    """

    shards: tuple[str, ...]
    good: int
    whole: int
    bad: int
    expected: Counter[str]
    keys: frozenset[str]

    @property
    def cut(self) -> str:
        """The path of the shard that is cut."""
        return self.shards[-1]


def plant(folder: Path, shards: int = 4, good_per_shard: int = 8) -> Planted:
    """Write the corpus: faults dealt out to ``shards`` tars among good samples, and a cut tar."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: Counter[str] = Counter()
    keys, bad = set(), 0
    dealt: list[list[Entry]] = [[] for _ in range(shards)]
    for number in range(shards * good_per_shard):
        key = f"good-{number:03d}"
        dealt[number % shards] += good(key, number)
        keys.add(key)
    for number, (key, (entries, reasons, usable)) in enumerate(faults().items()):
        dealt[number % shards] += entries
        expected.update(reasons)
        if usable:
            keys.add(key)
        elif usable is not None:
            bad += 1
    dealt[0].append(("good-000.cls", b"1"))  # other samples stand between it and its key
    expected["duplicate key"] += 1
    paths = [write_tar(folder / f"{i:05d}.tar", entries) for i, entries in enumerate(dealt)]
    whole = [f"cut-{number:03d}" for number in range(good_per_shard)]
    last = [e for n, key in enumerate(whole) for e in good(key, n)]
    path = Path(write_tar(folder / f"{shards:05d}.tar", [*last, ("cut-999.jpg", bytes(9_000))]))
    path.write_bytes(path.read_bytes()[: _size(last) + 512 + 5_000])
    keys |= set(whole)
    return Planted((*paths, str(path)), len(keys), len(whole), bad, expected, frozenset(keys))


def _size(entries: list[Entry]) -> int:
    return sum(512 + -(-len(e[1]) // 512) * 512 for e in entries if isinstance(e, tuple))


def write_tar(path: Path, entries: list[Entry]) -> str:
    """A tar of files, and of members that TarInfo describes alone."""
    # GNU: a name may then be any bytes. No float time, so no extension headers.
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return str(path)


def good(key: str, number: int) -> list[Entry]:
    """A whole sample, in one of the three formats."""
    extension = ("jpg", "png", "webp")[number % 3]
    return [(f"{key}.{extension}", encoded(noise(number), extension)), (f"{key}.txt", key.encode())]


@lru_cache(maxsize=1)
def faults() -> dict[str, tuple[list[Entry], list[str], bool | None]]:
    """By key: members, the reasons to be counted, and whether the sample can be used (None: there
    is no sample)."""
    jpeg, png, webp = (encoded(noise(7), e) for e in ("jpg", "png", "webp"))
    found: dict[str, tuple[list[Entry], list[str], bool | None]] = {}

    def sample(key: str, reason: str | None, extension: str, data: bytes, **texts: bytes) -> None:
        files: list[Entry] = [(f"{key}.{extension}", data)]
        files += [(f"{key}.{e}", text) for e, text in (texts or {"txt": b"a caption"}).items()]
        found[key] = (files, [reason] if reason else [], reason is None)

    def odd(key: str, reason: str, entry: Entry) -> None:
        found[key] = ([entry], [reason], None)

    # Pictures that are not.
    sample("zero-bytes", "undecodable image", "png", b"")
    sample("half-a-jpeg", "undecodable image", "jpg", jpeg[: len(jpeg) // 2])
    sample("half-a-png", "undecodable image", "png", png[: len(png) // 2])
    sample("half-a-webp", "undecodable image", "webp", webp[: len(webp) // 2])
    sample("page", "undecodable image", "jpg", b"<!doctype html><title>404 Not Found</title>")
    sample("svg", "undecodable image", "png", b'<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    sample("eps", "undecodable image", "png", encoded(noise(7), "eps"))
    sample("icc-bomb", "undecodable image", "png", with_chunk(png, b"iCCP", b"p\0\0" + zeros()))
    sample("text-bomb", "undecodable image", "png", with_chunk(png, b"zTXt", b"t\0\0" + zeros()))
    sample("bomb", "too many pixels", "png", bomb())
    sample("strip", "too elongated", "png", encoded(Image.new("RGB", (1, 10_000)), "png"))
    sample("heavy", "too many bytes", "jpg", bytes(MAX_BYTES + 1))
    frames = [noise(n) for n in (1, 2, 3)]
    sample("animated-webp", "animated image", "webp", encoded(frames[0], "webp", frames[1:]))
    sample("animated-png", "animated image", "png", encoded(frames[0], "png", frames[1:]))
    # Captions that are not.
    sample("latin-1", "undecodable text", "jpg", jpeg, txt="a café".encode("latin-1"))
    sample("json-list", "undecodable text", "jpg", jpeg, json=b'["a caption"]')
    sample("json-half", "undecodable text", "jpg", jpeg, json=b'{"captions": ["a', txt=b"a")
    sample("json-deep", "undecodable text", "jpg", jpeg, json=b"[" * 100_000, txt=b"a")
    sample("surrogate", "undecodable text", "jpg", jpeg, json=b'{"caption": "\\ud800"}')
    sample("json-empty", "no caption", "jpg", jpeg, json=b'{"captions": []}')
    sample("blank", "no caption", "jpg", jpeg, txt=b" \n")
    sample("long", "caption too long", "jpg", jpeg, txt=b"word " * 20_000)
    found["mute"] = ([("mute.jpg", jpeg)], ["no caption"], False)
    found["blind"] = ([("blind.txt", b"a caption")], ["no image"], False)
    # Members that are not.
    odd("up", "unsafe member name", ("../up.jpg", jpeg))
    odd("absolute", "unsafe member name", ("/absolute.jpg", jpeg))
    odd("backslash", "unsafe member name", ("..\\backslash.jpg", jpeg))
    odd("drive", "unsafe member name", ("C:/drive.jpg", jpeg))
    odd("bytes", "unsafe member name", ("bytes-\udce9.jpg", jpeg))
    odd("symlink", "link", described("symlink.jpg", tarfile.SYMTYPE))
    odd("hard-link", "link", described("hard-link.jpg", tarfile.LNKTYPE))
    odd("fifo", "not a file", described("fifo.jpg", tarfile.FIFOTYPE))
    odd("device", "not a file", described("device.jpg", tarfile.CHRTYPE))
    odd("bare", "no extension", ("bare", jpeg))
    found["twice"] = (
        [("twice.jpg", jpeg), ("twice.txt", b"a caption"), ("twice.JPG", png)],
        ["duplicate member"],
        True,
    )
    many: list[Entry] = [(f"many.{n}", b"") for n in range(MAX_MEMBERS + 1)]
    files = [("many.jpg", jpeg), ("many.txt", b"a caption"), *many]
    found["many"] = (files, ["too many members"] * 3, True)
    found["passed-over"] = (
        [described("folder", tarfile.DIRTYPE), ("__meta__/a.jpg", jpeg), ("._hidden.jpg", jpeg)],
        [],
        None,
    )
    # Odd, and good.
    sample("wrong-extension", None, "jpg", png)
    sample("cmyk", None, "jpg", encoded(noise(7).convert("CMYK"), "jpg"))
    deep = np.random.default_rng(7).integers(0, 1 << 16, (48, 64), dtype=np.uint16)
    sample("16-bit", None, "png", encoded(Image.fromarray(deep), "png"))
    sample("palette", None, "png", encoded(palette(), "png", transparency=b"\0\x80"))
    sample("grey-alpha", None, "png", encoded(noise(7).convert("LA"), "png"))
    sample("turned", None, "jpg", encoded(noise(7), "jpg", exif=orientation(6)))
    sample("progressive", None, "jpg", encoded(noise(7), "jpg", progressive=True))
    sample("with-preview", None, "jpg", encoded(frames[0], "mpo", frames[1:2]))
    sample("one-pixel", None, "png", encoded(Image.new("RGB", (1, 1)), "png"))
    sample("bom", None, "png", png, txt=b"\xef\xbb\xbfa caption")
    fields = {"key": "1", "status": "success", "caption": "a caption", "width": 64}
    sample("img2dataset", None, "jpg", jpeg, json=json.dumps(fields).encode())
    sample("txt-beside-empty", None, "jpg", jpeg, json=b'{"captions": []}', txt=b"a caption")
    return found


def noise(seed: int) -> Image.Image:
    """64 x 48 pixels, smooth enough for a JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC)


def encoded(
    image: Image.Image, extension: str, more: list[Image.Image] | None = None, **options: object
) -> bytes:
    """A file; ``more`` are further frames."""
    names = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "eps": "EPS", "mpo": "MPO"}
    frames = {"save_all": True, "append_images": more} if more else {}
    stream = io.BytesIO()
    image.save(stream, names[extension], **frames, **options)
    return stream.getvalue()


def palette() -> Image.Image:
    """Two colours by palette."""
    image = Image.new("P", (64, 48), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 32, 48))
    return image


def orientation(turn: int) -> bytes:
    """EXIF that says how a viewer should turn the picture."""
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif.tobytes()


def described(name: str, kind: bytes) -> tarfile.TarInfo:
    """A member without content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    return png[:33] + chunk(name, data) + png[33:]


def chunk(name: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@lru_cache(maxsize=1)
def zeros() -> bytes:
    """8 MiB in 8 KiB."""
    return zlib.compress(bytes(8 << 20), 9)


@lru_cache(maxsize=1)
def bomb(side: int = 20_000) -> bytes:
    """A whole PNG of 400 megapixels in 50 KB."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    packed = b"".join(packer.compress(row * 1_000) for _ in range(side // 1_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts
