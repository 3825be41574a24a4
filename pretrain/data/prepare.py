"""A row of a source to the files of a sample, or the reason why it gives none."""

import io
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from pretrain import storage
from pretrain.data.rows import Row
from pretrain.data.samples import FORMATS, Bounds, Refused, decode
from pretrain.data.shards import RawSample
from pretrain.errors import DataError

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
FETCHES_A_TASK = 16


@dataclass(frozen=True)
class PackOptions:
    """What becomes of the rows.

    Attributes:
        shard_bytes, shard_samples: a shard is closed before it would exceed either.
        max_side: larger pictures are scaled down to this many pixels on the longer side; None
            leaves them.
        format: jpg, png or webp; None keeps the encoded bytes of pictures that need no scaling.
        quality: of jpg and webp, 1-100.
        min_side: smaller pictures are refused.
        max_bytes, max_pixels: larger files and pictures are refused before they are decoded.
    """

    shard_bytes: int = 256 << 20
    shard_samples: int = 10_000
    max_side: int | None = None
    format: str | None = None
    quality: int = 92
    min_side: int = 1
    max_bytes: int = 32 << 20
    max_pixels: int = 64_000_000


@dataclass(frozen=True)
class Prepared:
    """A row's sample as files by extension, or the reason why there is none."""

    row: int
    key: str
    name: str
    files: dict[str, bytes]
    refused: str = ""

    @property
    def tar_bytes(self) -> int:
        """What it takes in a tar."""
        return sum(512 + -(-len(data) // 512) * 512 for data in self.files.values())


def prepare_rows(
    rows: list[Row], options: PackOptions, retry: storage.Retry | None
) -> list[Prepared]:
    """The samples of some rows, in order."""
    remote = any(isinstance(row.image, str) and storage.is_remote(row.image) for row in rows)
    if not remote:
        return [prepare(row, options, retry) for row in rows]
    with ThreadPoolExecutor(FETCHES_A_TASK) as pool:  # they wait for the network, not the CPU
        return list(pool.map(partial(prepare, options=options, retry=retry), rows))


def prepare(row: Row, options: PackOptions, retry: storage.Retry | None = None) -> Prepared:
    """The sample of a row: what it refers to is read, and decoded as the trainer will; the picture
    is encoded anew only where the options ask for it."""
    try:
        if row.refused:
            raise _Unusable(row.refused)
        files = _text_files(*_texts(row, options, retry))
        encoded = _encoded(row, options, retry)
        extension, encoded = _picture(encoded, files, options)
    except (_Unusable, Refused) as refused:
        return Prepared(row.number, row.key, row.name, {}, str(refused))
    return Prepared(row.number, row.key, row.name, {extension: encoded, **files})


class _Unusable(Exception):
    """Why a row gives no sample."""


def _texts(
    row: Row, options: PackOptions, retry: storage.Retry | None
) -> tuple[list[str], dict[str, Any]]:
    """Captions and further fields of a row: its own, those of a .json beside it, or of a .txt."""
    captions, fields = list(row.captions), dict(row.fields)
    for url in row.beside:
        data = _read(url, options.max_bytes, "caption file", retry)
        try:
            if url.lower().endswith(".txt"):
                text = data.decode("utf-8-sig").strip()
                captions = captions or ([text] if text else [])
                continue
            tree = json.loads(data)
        except (ValueError, RecursionError):
            raise _Unusable("undecodable text") from None
        if not isinstance(tree, dict):
            raise _Unusable("undecodable text")
        for name in ("captions", "caption", "text"):
            found = tree.pop(name, None)
            values = found if isinstance(found, list) else [found]
            captions += [v.strip() for v in values if isinstance(v, str) and v.strip()]
            if captions:
                break
        fields |= tree
    if not captions:
        raise _Unusable("no caption")
    return captions, fields


def _text_files(captions: list[str], fields: dict[str, Any]) -> dict[str, bytes]:
    """A .txt of the first caption, for every reader; a .json where there is more to say."""
    try:
        files = {"txt": captions[0].encode()}
        if len(captions) > 1 or fields:
            tree = {**fields, "captions": captions}
            files["json"] = json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise _Unusable("undecodable text") from None
    return files


def _encoded(row: Row, options: PackOptions, retry: storage.Retry | None) -> bytes:
    if row.image is None:
        raise _Unusable("no image")
    if isinstance(row.image, bytes):
        return row.image
    return _read(row.image, options.max_bytes, "image file", retry)


def _read(url: str, max_bytes: int, what: str, retry: storage.Retry | None) -> bytes:
    parts, length = [], 0
    try:
        for part in storage.read_parts(url, retry=retry):
            parts.append(part)
            length += len(part)
            if length > max_bytes:
                raise _Unusable("too many bytes")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise _Unusable(f"missing {what}") from None
    except (DataError, OSError, ValueError, ImportError):
        raise _Unusable(f"unreadable {what}") from None
    return b"".join(parts)


def _picture(encoded: bytes, texts: dict[str, bytes], options: PackOptions) -> tuple[str, bytes]:
    """(extension, bytes) of a picture that the trainer will take together with ``texts``."""
    bounds = Bounds(options.max_bytes, options.max_pixels)
    raw = RawSample("", "", {"jpg": encoded, **texts})  # decoders go by the bytes, not by the name
    found = _header(encoded)
    if found is None:
        decode(raw, bounds)
        raise _Unusable("undecodable image")
    extension, size = found
    wanted = options.format or extension
    scale = (options.max_side or max(size)) / max(size)
    if scale >= 1 and wanted == extension:
        image, _ = decode(raw, bounds)
    else:
        # A JPEG is decoded smaller, though never below what is asked for.
        side = None if scale >= 1 or options.max_side is None else (options.max_side,) * 2
        image, _ = decode(raw, bounds, side)
    if min(size) < options.min_side:
        raise _Unusable("too small")
    if scale >= 1 and wanted == extension:
        return extension, encoded
    if scale < 1:
        scale = min(1.0, (options.max_side or 1) / max(image.size))
        small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(small, Image.Resampling.LANCZOS, reducing_gap=3.0)
    stream = io.BytesIO()
    if wanted == "png":
        image.save(stream, "PNG")
    else:
        image.save(stream, "WEBP" if wanted == "webp" else "JPEG", quality=options.quality)
    return wanted, stream.getvalue()


def _header(encoded: bytes) -> tuple[str, tuple[int, int]] | None:
    """(extension, size) by the bytes, whatever the file was called."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        return EXTENSIONS[str(image.format)], image.size
    except Exception:  # `decode` tells what it is that is wrong
        return None
