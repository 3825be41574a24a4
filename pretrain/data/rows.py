"""Where `data pack` takes pictures from: a folder, or tables of paths, URLs or bytes. Rows come in
one order, and from any row on.
"""

import csv
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, cast

from fsspec.core import url_to_fs

from pretrain import storage
from pretrain.data.manifest import folder_of
from pretrain.errors import DataError

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# Pictures too, which the decoder of the trainer does not open: counted, not passed over.
UNSUPPORTED = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".svg", ".ico", ".psd")
TABLES = (".csv", ".tsv", ".tab", ".csv.gz", ".tsv.gz", ".parquet", ".pq")
IMAGE_COLUMNS = (
    *("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp", "image_path", "img_path"),
    *("path", "file_name", "filename", "filepath", "file_path", "file", "image_url", "url", "uri"),
)
CAPTION_COLUMNS = (
    *("captions", "caption", "text", "texts", "prompt", "sentences", "sentence", "description"),
    *("alt_text", "alt", "title"),
)
BATCH_ROWS = 64
KEY_BYTES = 80  # of the 100 that the name of a tar member holds everywhere; extensions follow


@dataclass(frozen=True)
class Row:
    """A picture and its captions, before either is read.

    Attributes:
        number: in the source.
        key: of the sample.
        name: what a person finds the row by.
        image: encoded bytes, or the URL of them; None where there is none.
        captions: in order.
        beside: URLs of a .json and a .txt file that hold captions.
        fields: what else the sample's json shall say.
        refused: why the row cannot be used at all; empty if it may be.
    """

    number: int
    key: str
    name: str
    image: bytes | str | None
    captions: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


class Source(Protocol):
    """Rows in a fixed order.

    Attributes:
        name: as the user gave it.
        identity: changes when the rows do, as far as that can be told without reading them.
    """

    name: str
    identity: str

    def rows(self, start: int) -> Iterator[Row]:
        """Rows from number ``start`` on."""


@dataclass(frozen=True)
class Columns:
    """What the user says of a table; None is guessed from the usual names.

    Attributes:
        image: column of a path, a URL, bytes, or a struct of ``bytes`` and ``path``.
        captions: columns of a caption, or of a list of them.
        key: column of the sample's name; None numbers the rows.
        fields: columns copied into the sample's json.
        root: folder or URL that relative paths start from; None is the table's own.
    """

    image: str | None = None
    captions: tuple[str, ...] = ()
    key: str | None = None
    fields: tuple[str, ...] = ()
    root: str | None = None


def open_source(url: str, columns: Columns | None = None) -> Source:
    """A folder; a .csv, .tsv (or .gz of them) or .parquet table; or tables by a pattern with ``*``.

    Raises:
        DataError: there is no such thing, or a column is missing.
    """
    from pretrain.data.index import expand

    columns = columns or Columns()
    if url.lower().endswith(TABLES):
        return Tables(url, expand([url]), columns)
    fs, path = url_to_fs(url)
    if fs.isdir(path):
        if columns != Columns():
            raise DataError(
                f"source={url!r} is a folder, which has no columns; give a table "
                f"({', '.join(TABLES)}), or leave the column options out"
            )
        return Folder(url)
    raise DataError(
        f"source={url!r} is neither a folder nor a table ({', '.join(TABLES)}); check the path"
    )


class Folder:
    """Pictures below a folder, each with a .txt, a .json or both of its name beside it.

    Names are taken in sorted order, a folder at a time; hidden files and linked folders are left
    out.
    """

    def __init__(self, url: str) -> None:
        self.name = url
        self.identity = f"folder {url}"
        self._fs, self._path = url_to_fs(url)
        self._remote = storage.is_remote(url)

    def rows(self, start: int) -> Iterator[Row]:
        """Rows from number ``start`` on."""
        for number, row in enumerate(self._below(self._path, "")):
            if number >= start:
                name, key, image, beside, refused = row
                yield Row(number, safe_key(key), name, image, (), beside, {}, refused)

    def _below(
        self, folder: str, prefix: str
    ) -> Iterator[tuple[str, str, str, tuple[str, ...], str]]:
        """(name, name without extension, URL, URLs of its captions, why refused)."""
        entries = {
            info["name"].rstrip("/").rpartition("/")[2]: info
            for info in self._fs.ls(folder, detail=True)
        }
        stems: dict[str, int] = {}
        for name in entries:
            if name.lower().endswith((*PICTURES, *UNSUPPORTED)):
                stem = name.rpartition(".")[0]
                stems[stem] = stems.get(stem, 0) + 1
        for name in sorted(entries):
            info = entries[name]
            if name.startswith(".") or not name:
                continue
            if info["type"] == "directory":
                if not info.get("islink"):
                    yield from self._below(info["name"], f"{prefix}{name}/")
                continue
            if not name.lower().endswith((*PICTURES, *UNSUPPORTED)):
                continue
            stem = name.rpartition(".")[0]
            refused = "" if name.lower().endswith(PICTURES) else "unsupported format"
            beside = tuple(
                self._url(entries[f"{stem}{end}"]["name"])
                for end in (".json", ".txt")
                if f"{stem}{end}" in entries
            )
            # Two pictures of one name are two samples: the key then keeps the extension.
            key = stem if stems[stem] == 1 else name
            yield f"{prefix}{name}", f"{prefix}{key}", self._url(info["name"]), beside, refused

    def _url(self, path: str) -> str:
        return cast(str, self._fs.unstrip_protocol(path)) if self._remote else path


class Tables:
    """Rows of CSV, TSV or Parquet files, one after the other."""

    def __init__(self, name: str, urls: Sequence[str], columns: Columns) -> None:
        self.name, self.urls, self.columns = name, list(urls), columns
        sizes = []
        for url in self.urls:
            try:
                sizes.append(storage.size(url))
            except FileNotFoundError:
                raise DataError(f"source={url!r} does not exist; check the path") from None
        told = json.dumps([self.urls, sizes, columns.__dict__], sort_keys=True)
        self.identity = f"table {hashlib.sha256(told.encode()).hexdigest()[:16]}"
        self._chosen(self.urls[0], _columns_of(self.urls[0]))  # a wrong column is told at once

    def rows(self, start: int) -> Iterator[Row]:
        """Rows from number ``start`` on."""
        number = 0
        for url in self.urls:
            image, captions = self._chosen(url, _columns_of(url))
            wanted = [image, *captions, *self.columns.fields]
            if self.columns.key:
                wanted.append(self.columns.key)
            read = _parquet if is_parquet(url) else _csv
            root = self.columns.root or folder_of(url)
            for skipped, values in read(url, list(dict.fromkeys(wanted)), max(0, start - number)):
                number += skipped
                if values is not None:
                    yield self._row(number, url, root, values, image, captions)
                    number += 1

    def _chosen(self, url: str, known: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """The image column and the caption columns of a table.

        Raises:
            DataError: one is not there.
        """
        c = self.columns
        for name in (c.image, *c.captions, c.key, *c.fields):
            if name is not None and name not in known:
                raise DataError(f"source={url!r} has no column {name!r}; it has {', '.join(known)}")
        image = c.image or _guess(known, IMAGE_COLUMNS)
        caption = c.captions or tuple(x for x in [_guess(known, CAPTION_COLUMNS)] if x is not None)
        for what, found, option in (
            ("pictures", image, "--image-column"),
            ("captions", caption, "--caption-column"),
        ):
            if not found:
                raise DataError(
                    f"source={url!r}: which column holds the {what} cannot be told from its name; "
                    f"give {option}, one of {', '.join(known)}"
                )
        return cast(str, image), caption

    def _row(
        self,
        number: int,
        url: str,
        root: str,
        values: dict[str, Any],
        image: str,
        captions: tuple[str, ...],
    ) -> Row:
        key = self.columns.key
        return Row(
            number,
            safe_key(str(values[key])) if key else f"{number:09d}",
            f"{url.rpartition('/')[2]} row {number}",
            _picture(values[image], root),
            tuple(text for name in captions for text in _texts(values[name])),
            (),
            {name: _jsonable(values[name]) for name in self.columns.fields},
        )


def safe_key(text: str) -> str:
    """``text`` as the key of a sample: no dot (the extension begins at the first), no step out of
    the archive, at most `KEY_BYTES`. A text that had to be changed gets a hash of the original, so
    that two never become one.
    """
    kept = "".join("_" if c in '.\\:*?"<>|' or not c.isprintable() else c for c in text)
    kept = "/".join(part for part in kept.split("/") if part.strip("_ "))
    encoded = kept.encode("utf-8", "replace")
    if kept == text and 0 < len(encoded) <= KEY_BYTES:
        return kept
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:10]
    return f"{encoded[: KEY_BYTES - 11].decode('utf-8', 'ignore') or 'sample'}-{digest}"


def is_parquet(url: str) -> bool:
    """Whether a table is Parquet, by its name."""
    return url.lower().endswith((".parquet", ".pq"))


def _guess(known: Sequence[str], usual: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(known)}
    return next((lower[name] for name in usual if name in lower), None)


def _picture(value: Any, root: str) -> bytes | str | None:
    """Encoded bytes or a URL, whatever form the column has."""
    if isinstance(value, dict):  # as Hugging Face's `datasets` writes them
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value) or None
    text = str(value).strip() if value is not None else ""
    if not text:
        return None
    return text if "://" in text or text.startswith("/") else storage.join(root or ".", text)


def _texts(value: Any) -> list[str]:
    """The captions in a cell: a text, a list of them, or a JSON list in a text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            listed = json.loads(value)
        except ValueError:
            listed = None
        if isinstance(listed, list) and all(isinstance(one, str) for one in listed):
            value = listed
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for one in values if one is not None and (text := str(one).strip())]


def _jsonable(value: Any) -> Any:
    return (
        value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
    )


def _columns_of(url: str) -> list[str]:
    if is_parquet(url):
        with storage.open_read(url) as stream:
            return list(_parquet_file(url, stream).schema_arrow.names)
    with storage.open_read(url) as raw:
        header = next(_records(url, raw), None)
    if header is None:
        raise DataError(f"source={url!r} is empty; it must begin with a line of column names")
    return header


def _csv(
    url: str, wanted: Sequence[str], start: int
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(0, values) of each row from ``start`` on; what is skipped comes as (rows, None)."""
    with storage.open_read(url) as raw:
        records = _records(url, raw)
        header = next(records, [])
        places = {name: header.index(name) for name in wanted}
        for number, record in enumerate(records):
            if number < start:
                yield 1, None
            else:
                yield 0, {n: record[i] if i < len(record) else None for n, i in places.items()}


def _records(url: str, raw: IO[bytes]) -> Iterator[list[str]]:
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    stream = gzip.GzipFile(fileobj=raw) if url.lower().endswith(".gz") else raw
    # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
    text = io.TextIOWrapper(cast(IO[bytes], stream), encoding="utf-8-sig", newline="")
    plain = url.lower().removesuffix(".gz")
    reader = csv.reader(text, delimiter="," if plain.endswith(".csv") else "\t")
    try:
        yield from (record for record in reader if record)
    except (csv.Error, UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(
            f"source={url!r} cannot be read as a table after line {reader.line_num} ({error}); "
            "it must be UTF-8 text"
        ) from None


def _parquet(
    url: str, wanted: Sequence[str], start: int
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(0, values) of each row from ``start`` on; what is skipped comes as (rows, None)."""
    with storage.open_read(url) as stream:
        file = _parquet_file(url, stream)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start >= rows:
                start -= rows
                yield rows, None
                continue
            batches = file.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=list(wanted), use_threads=False
            )
            for batch in batches:
                values = batch.slice(start) if start else batch
                if skipped := batch.num_rows - values.num_rows:
                    start -= skipped
                    yield skipped, None
                yield from ((0, one) for one in values.to_pylist())


def _parquet_file(url: str, stream: IO[bytes]) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"source={url!r}: reading Parquet needs pyarrow; `pip install pyarrow`, or give a CSV"
        ) from None
    try:
        # Buffered: a column chunk of pictures can have gigabytes.
        return pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"source={url!r} is not a Parquet file ({error})") from None
