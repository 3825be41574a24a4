"""What shards there are: names, sample counts, sizes and hashes. The order of samples is defined
over it, and beside it lies the member table that opens any sample with one ranged read.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain import storage
from pretrain.data.strings import Strings
from pretrain.errors import DataError

SCHEMA = 2
REMEDY = "make one with `python -m pretrain data index SHARDS... --out MANIFEST`"

# A row of the member table. `offset` and `bytes` bound all tar members of one sample, headers
# included, in the unpacked tar; `width` and `height` are 0 where no picture could be opened.
ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("crc32", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)

# Aspect buckets: width / height that a picture is counted under, by the nearest in logarithm.
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)


def aspect_of(rows: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Number of the aspect bucket of each row of the member table; a picture of unknown size is
    square."""
    width = np.maximum(rows["width"], 1).astype(np.float64)
    height = np.maximum(rows["height"], 1).astype(np.float64)
    middles = (np.log(ASPECTS)[1:] + np.log(ASPECTS)[:-1]) / 2
    known = (rows["width"] > 0) & (rows["height"] > 0)
    return np.where(known, np.searchsorted(middles, np.log(width / height)), ASPECTS.index(1.0))


_TEXT = ("url", "sha256", "version")
_NUMBERS = ("samples", "bytes", "unpacked")
_COLUMNS = (*_TEXT, *_NUMBERS, "aspects")


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        url: relative to the manifest's folder, or absolute.
        samples: rows of it in the member table.
        bytes: of the file as it is stored.
        sha256: of the file as it is stored.
        aspects: samples in each aspect bucket, in the order of `ASPECTS`.
        unpacked: bytes of the tar inside a compressed shard; 0 where the tar is stored plain.
        version: what the store said of the file when it was indexed (ETag, or size and time), for
            the next incremental run.
    """

    url: str
    samples: int
    bytes: int
    sha256: str
    aspects: tuple[int, ...] = ()
    unpacked: int = 0
    version: str = ""


class Shards(Sequence[Shard]):
    """Shards held as columns, 50 to 100 bytes each: every worker keeps all of a manifest.

    Attributes:
        columns: by field; text as `Strings`, numbers as arrays, aspects as an array (shards,
            aspects). All but ``samples`` are of the least integers that hold them.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        held = list(shards)
        self._fill({name: [getattr(s, name) for s in held] for name in _COLUMNS})

    @classmethod
    def of_columns(cls, columns: Mapping[str, Sequence[Any]]) -> "Shards":
        """From one sequence a field, all of one length.

        Raises:
            ValueError: they are not.
        """
        if len({len(columns[name]) for name in _COLUMNS}) > 1:
            raise ValueError("its columns differ in length")
        made = cls(())
        made._fill(columns)
        return made

    def _fill(self, columns: Mapping[str, Sequence[Any]]) -> None:
        text = {n: Strings(columns[n]) for n in _TEXT}
        numbers = {n: np.array(columns[n], dtype=np.int64) for n in _NUMBERS}
        rows = [tuple(a) or (0,) * len(ASPECTS) for a in columns["aspects"]]
        aspects = np.array(rows, dtype=np.int64).reshape(len(rows), len(ASPECTS))
        least = {n: _least(numbers[n]) for n in ("bytes", "unpacked")}
        self.columns: dict[str, Any] = {**text, **numbers, **least, "aspects": _least(aspects)}

    def __len__(self) -> int:
        return len(self.columns["samples"])

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        c = self.columns
        return Shard(
            url=c["url"][number],
            samples=int(c["samples"][number]),
            bytes=int(c["bytes"][number]),
            sha256=c["sha256"][number],
            aspects=tuple(c["aspects"][number].tolist()),
            unpacked=int(c["unpacked"][number]),
            version=c["version"][number],
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Manifest:
    """An ordered list of shards.

    Attributes:
        shards: in order; sample numbers are defined over this order.
        folder: path or URL that the shards' relative URLs start from.
        members_url: of the member table.
    """

    shards: Shards
    folder: str
    members_url: str = ""

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples of each shard."""
        return self.shards.columns["samples"]

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Row of each shard's first sample in the member table, with the table's length last."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return int(self.starts[-1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' hashes in order: two manifests of equal fingerprint number
        samples alike."""
        hashes, sizes = self.shards.columns["sha256"], self.sizes
        digest, separator = hashlib.sha256(), ""
        for sha256, samples in zip(hashes, sizes.tolist(), strict=True):
            digest.update(f"{separator}{sha256} {samples}".encode())
            separator = "\n"
        return digest.hexdigest()

    def url(self, number: int) -> str:
        """Where shard ``number`` is."""
        url: str = self.shards.columns["url"][number]
        absolute = "://" in url or url.startswith("/")
        return url if absolute else storage.join(self.folder, url)

    @classmethod
    def load(
        cls, url: str, retry: storage.Retry | None = None, *, versions: bool = True
    ) -> "Manifest":
        """Read a manifest, local or remote.

        Args:
            versions: keep the shards' versions, which only `data index` looks at.

        Raises:
            DataError: it is missing, not a manifest, or lists no sample.
        """
        try:
            tree = json.loads(storage.read_bytes(url, retry))
            if not isinstance(tree, dict) or "schema" not in tree:
                raise ValueError("no field `schema`")
            if tree["schema"] != SCHEMA:
                raise DataError(
                    f"manifest={url!r} has schema {tree['schema']!r}, this version reads "
                    f"{SCHEMA}; {REMEDY}"
                )
            columns = tree["shards"]
            if not versions:
                columns["version"] = [""] * len(columns["url"])
            shards = Shards.of_columns(columns)
            made = cls(shards, folder_of(url), members_of(url))
            empty = not made.num_samples
        except FileNotFoundError:
            raise DataError(f"manifest={url!r} does not exist; {REMEDY}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"manifest={url!r} is not a manifest ({error}); {REMEDY}") from None
        if empty:
            raise DataError(f"manifest={url!r} lists no sample; {REMEDY}")
        return made

    def save(self, url: str) -> None:
        """Write as JSON, whole or not at all: a column a field, so that 100,000 shards load in a
        second."""
        held = self.shards.columns
        columns: dict[str, list[Any]] = {n: list(held[n]) for n in _TEXT}
        columns |= {n: held[n].tolist() for n in _NUMBERS}
        columns["aspects"] = [a if any(a) else () for a in held["aspects"].tolist()]
        lines = ",\n".join(f'  "{name}": {json.dumps(values)}' for name, values in columns.items())
        text = f'{{\n "schema": {SCHEMA},\n "shards": {{\n{lines}\n }}\n}}\n'
        storage.write_bytes(url, text.encode())


def give_back_memory() -> None:
    """What was parsed or unpickled and is gone, to the system: the C library keeps up to 64 MB of
    it, of 100,000 shards 20 MB in every process."""
    with suppress(OSError, AttributeError):  # not of every C library
        ctypes.CDLL(None).malloc_trim(0)


def _least(values: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The same numbers, as integers of no more bytes than they need."""
    lowest, highest = int(values.min(initial=0)), int(values.max(initial=0))
    return values.astype(np.promote_types(np.min_scalar_type(lowest), np.min_scalar_type(highest)))


def members_of(manifest_url: str) -> str:
    """URL of the member table that belongs to a manifest."""
    return f"{manifest_url.removesuffix('.json')}.members"


def folder_of(url: str) -> str:
    """The folder, path or URL, that holds ``url``."""
    return url.rpartition("/")[0] if "://" in url else str(PurePosixPath(url).parent)


def relative(url: str, folder: str) -> str:
    """``url`` as seen from ``folder``: relative if it lies below it, else absolute."""
    if "://" in url or "://" in folder:
        local = "://" not in url
        return os.path.abspath(url) if local else url.removeprefix(folder.rstrip("/") + "/")
    path = os.path.relpath(url, folder)
    return os.path.abspath(url) if path.startswith("..") else path
