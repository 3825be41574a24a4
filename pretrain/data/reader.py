"""One sample by (data set, shard, index): a row of the member table, one ranged read, its files.

Three ways to the bytes, the same for the caller: a plain local tar is read in place; a remote or
compressed shard comes whole into the node's disk cache first (every rank of the node then shares
it); or each sample is one ranged GET. A sample's CRC is in the member table, so a changed or cut
shard is found at the first sample that differs, whatever the way.
"""

import os
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pretrain import storage
from pretrain.config import Config
from pretrain.data.cache import ShardCache
from pretrain.data.manifest import ROW, Manifest, Shard, aspect_of
from pretrain.data.packed import is_packed
from pretrain.data.shards import MemberBounds, RawSample, read_sample
from pretrain.errors import DataError, UnreadableShard
from pretrain.types import Reject

Rows = npt.NDArray[np.void]
Read = tuple[RawSample | None, list[Reject]]

OPEN_FILES = 256  # of a reader: more shards than its lanes' windows span, as a rule
KNOWN_SHARDS = 256  # shards whose rows a reader keeps
TOGETHER_BYTES = 4 << 20  # of samples that are read before the first of them is used


class ReadConfig(Config):
    """How shards are reached.

    Attributes:
        access: ``shard`` brings remote shards whole into the disk cache; ``ranged`` reads one
            sample a request and needs no disk; ``auto`` is ``shard``.
        cache: folder of the disk cache, shared by all processes of a node; default
            ``$XDG_CACHE_HOME/diffdis-pretrain/shards``.
        cache_gib: its bound.
        ahead_samples: samples ahead of the step whose shards are fetched into the cache.
        deadline_seconds: after which a shard that cannot be read is given up.
        attempt_seconds: after which one request counts as stalled and is tried again.
        on_unreadable: a shard that was given up stops the run, or each of its samples is refused,
            counted and replaced (``skip``).
        max_member_bytes: larger files in a tar are refused.
        max_members: further files of one sample are refused.
    """

    access: Literal["auto", "shard", "ranged"] = "auto"
    cache: str | None = None
    cache_gib: float = Field(64.0, gt=0)
    ahead_samples: int = Field(4096, ge=0)
    deadline_seconds: float = Field(300.0, gt=0)
    attempt_seconds: float = Field(30.0, gt=0)
    on_unreadable: Literal["stop", "skip"] = "stop"
    max_member_bytes: int = Field(256 << 20, ge=1)
    max_members: int = Field(64, ge=1)

    @property
    def retry(self) -> storage.Retry:
        """Of every remote read."""
        return storage.Retry(
            deadline_seconds=self.deadline_seconds, attempt_seconds=self.attempt_seconds
        )

    @property
    def folder(self) -> Path:
        """Of the disk cache."""
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(self.cache or os.path.join(base, "diffdis-pretrain", "shards"))


class MemberTable:
    """The rows of a manifest, a shard at a time.

    Raises:
        DataError: it is missing, or of another manifest.
    """

    def __init__(self, manifest: Manifest, retry: storage.Retry) -> None:
        self.manifest, self.retry = manifest, retry
        url = manifest.members_url
        remedy = "index the shards again (`python -m pretrain data index`)"
        try:
            size = storage.size(url, retry)
        except FileNotFoundError:
            raise DataError(f"member table {url!r} does not exist; {remedy}") from None
        if size != manifest.num_samples * ROW.itemsize:
            raise DataError(
                f"member table {url!r} has {size} bytes, the manifest's {manifest.num_samples} "
                f"samples need {manifest.num_samples * ROW.itemsize}; {remedy}"
            )
        # Mapped, not read: at a billion samples the table has 20 GB and a worker needs a few rows.
        self._local = (
            None if storage.is_remote(url) else np.memmap(url, ROW, mode="r").view(np.ndarray)
        )
        self._kept: OrderedDict[int, Rows] = OrderedDict()

    def rows(self, shard: int) -> Rows:
        """Rows of shard number ``shard``."""
        first, end = self.manifest.starts[shard : shard + 2]
        if self._local is not None:
            return self._local[first:end]
        if shard not in self._kept:
            start, stop = int(first) * ROW.itemsize, int(end) * ROW.itemsize
            data = storage.read_range(self.manifest.members_url, start, stop, self.retry)
            self._kept[shard] = np.frombuffer(data, ROW)
            if len(self._kept) > KNOWN_SHARDS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shard)
        return self._kept[shard]

    def extents(self, shards: Sequence[int], indices: Sequence[int]) -> list[tuple[int, int, int]]:
        """(offset, bytes, CRC) of samples of shards, all looked up at once."""
        if self._local is None:
            rows = [self.rows(s)[i].item() for s, i in zip(shards, indices, strict=True)]
        else:
            rows = self._local[self.manifest.starts[np.array(shards)] + indices].tolist()
        return [row[:3] for row in rows]


class ShardReader:
    """Samples of several data sets; one reader a process, made where it is used.

    Args:
        manifests: the data sets, by number.
        config: how shards are reached.
    """

    def __init__(self, manifests: Sequence[Manifest], config: ReadConfig) -> None:
        self.manifests, self.config = manifests, config
        self.tables = [MemberTable(m, config.retry) for m in manifests]
        self.cache = ShardCache(config.folder, int(config.cache_gib * (1 << 30)), config.retry)
        self.bounds = MemberBounds(config.max_member_bytes, config.max_members)
        self._files: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._given_up: dict[tuple[int, int], UnreadableShard] = {}
        self._ahead = _ReadAhead(self)

    def read(self, dataset: int, shard: int, index: int) -> tuple[RawSample | None, list[Reject]]:
        """Sample ``index`` of a shard, and the members refused within its range; no sample where
        all of them were.

        Raises:
            UnreadableShard: its bytes cannot be had, or are not those that were indexed.
        """
        (found,) = self.read_many([(dataset, shard, index)])
        if isinstance(found, UnreadableShard):
            raise found
        return found

    def read_many(
        self, samples: Sequence[tuple[int, int, int]]
    ) -> Iterator[Read | UnreadableShard]:
        """What `read` gives or raises for each (data set, shard, index), in order."""
        for group in self.read_groups(samples):
            yield from group

    def read_groups(
        self, samples: Sequence[tuple[int, int, int]]
    ) -> Iterator[list[Read | UnreadableShard]]:
        """The same in groups, at most `TOGETHER_BYTES` each unless one sample has more.

        A group is read before the first of it is used: between one picture's decoding and the next,
        the same code takes three times as long, for it is in no cache of the processor any more.
        """
        extents: list[tuple[int, int, int]] = [(0, 0, 0)] * len(samples)
        for dataset, table in enumerate(self.tables):
            at = [n for n, sample in enumerate(samples) if sample[0] == dataset]
            if at:
                shards, indices = zip(*(samples[n][1:] for n in at), strict=True)
                for n, extent in zip(at, table.extents(shards, indices), strict=True):
                    extents[n] = extent
        ready: list[Read | UnreadableShard] = []
        ready_bytes = 0
        for (dataset, shard, index), extent in zip(samples, extents, strict=True):
            if ready and ready_bytes + extent[1] > TOGETHER_BYTES:
                yield ready
                ready, ready_bytes = [], 0
            ready.append(self._read((dataset, shard), index, *extent))
            ready_bytes += extent[1]
        if ready:
            yield ready

    def _read(
        self, place: tuple[int, int], index: int, offset: int, length: int, crc32: int
    ) -> Read | UnreadableShard:
        if place in self._given_up:
            return self._given_up[place]  # the deadline was spent once
        url = self.manifests[place[0]].url(place[1])
        try:
            data = self._bytes(place, offset, length)
            if zlib.crc32(data) != crc32 and self._drop(place):
                data = self._bytes(place, offset, length)
            if zlib.crc32(data) != crc32:
                self._forget(place)
                raise UnreadableShard(
                    f"shard={url!r}: sample {index} has other bytes than were indexed; restore the "
                    "shard, or index it again (sample numbers then mean other samples)",
                    url,
                )
        except UnreadableShard as error:
            self._given_up[place] = error
            return error
        return read_sample(url, data, self.bounds)

    @cached_property
    def uses_cache(self) -> bool:
        """Whether any shard is read through the disk cache."""
        return (
            any(
                storage.is_remote(m.folder)
                or bool(m.shards.columns["unpacked"].any())
                or any("://" in url for url in m.shards.columns["url"][:1])
                for m in self.manifests
            )
            and self.config.access != "ranged"
        )

    def aspect_member(self, dataset: int, shard: int, aspect: int, nth: int) -> int:
        """Index in its shard of the ``nth`` sample of an aspect bucket."""
        of_aspect = np.flatnonzero(aspect_of(self.tables[dataset].rows(shard)) == aspect)
        return int(of_aspect[nth])

    def ahead(self, places: Iterable[tuple[int, int]]) -> None:
        """Fetch these (data set, shard) into the cache while others are being read."""
        self._ahead.want([p for p in places if p not in self._given_up and self._cached(p)])

    def close(self) -> None:
        """Close files and stop reading ahead."""
        self._ahead.close()
        self.cache.close()  # ends what is still being fetched
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _cached(self, place: tuple[int, int]) -> bool:
        """Whether a shard is read through the disk cache."""
        url, entry = self._entry(place)
        remote = storage.is_remote(url) and self.config.access != "ranged"
        return remote or bool(entry.unpacked) or is_packed(url)

    def _entry(self, place: tuple[int, int]) -> tuple[str, Shard]:
        manifest = self.manifests[place[0]]
        return manifest.url(place[1]), manifest.shards[place[1]]

    def _bytes(self, place: tuple[int, int], offset: int, length: int) -> bytes:
        if place not in self._files:  # once a sample: what is open needs no look at its entry
            url = self._entry(place)[0]
            if not self._cached(place) and storage.is_remote(url):
                try:
                    return storage.read_range(url, offset, offset + length, self.config.retry)
                except (FileNotFoundError, DataError) as error:
                    raise UnreadableShard(f"shard={url!r}: {error}", url) from None
        data = os.pread(self._file(place), length, offset)
        while len(data) < length:  # a signal or the 2 GiB limit of one call
            more = os.pread(self._file(place), length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _file(self, place: tuple[int, int]) -> int:
        if place not in self._files:
            self._files[place] = self.open(place)
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(place)
        return self._files[place]

    def open(self, place: tuple[int, int]) -> int:
        """A descriptor of the plain tar of a shard, the caller's to close.

        Raises:
            UnreadableShard: it is missing, of another size, or stays unreachable.
        """
        url, entry = self._entry(place)
        try:
            if self._cached(place):
                return self.cache.open(url, entry.bytes, entry.sha256, bool(entry.unpacked))
            descriptor = os.open(url.removeprefix("file://"), os.O_RDONLY | os.O_CLOEXEC)
        except UnreadableShard:
            raise
        except FileNotFoundError:
            raise UnreadableShard(
                f"shard={url!r} is in the manifest and does not exist; restore it or index again",
                url,
            ) from None
        except (DataError, OSError) as error:
            raise UnreadableShard(f"shard={url!r}: {error}", url) from None
        size = os.fstat(descriptor).st_size
        if size != entry.bytes:
            os.close(descriptor)
            raise UnreadableShard(
                f"shard={url!r} has {size} bytes, the manifest says {entry.bytes}; restore the "
                "shard, or index it again (sample numbers then mean other samples)",
                url,
            )
        return descriptor

    def _drop(self, place: tuple[int, int]) -> bool:
        """Have a shard of the cache fetched again: a power cut may have torn the file, which was
        not synced, and the store has it whole. False where it is no file of the cache."""
        descriptor = self._files.get(place)
        if descriptor is None or not self._cached(place):
            return False
        url, entry = self._entry(place)
        self.cache.drop(descriptor, url, entry.bytes, entry.sha256, bool(entry.unpacked))
        self._forget(place)
        return True

    def _forget(self, place: tuple[int, int]) -> None:
        descriptor = self._files.pop(place, None)
        if descriptor is not None:
            os.close(descriptor)


class _ReadAhead:
    """A few threads that bring shards into the disk cache before they are needed."""

    THREADS = 2

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self._pool: ThreadPoolExecutor | None = None
        self._recent: deque[tuple[int, int]] = deque(maxlen=4 * KNOWN_SHARDS)

    def want(self, places: list[tuple[int, int]]) -> None:
        """Fetch in this order what was not fetched lately."""
        for place in places:
            if place in self._recent:
                continue
            self._recent.append(place)
            self._pool = self._pool or ThreadPoolExecutor(self.THREADS, "read-ahead")
            self._pool.submit(self._fetch, place)

    def _fetch(self, place: tuple[int, int]) -> None:
        # What is wrong here is met again, and told, by whoever reads the shard.
        with suppress(DataError, OSError):
            os.close(self.reader.open(place))

    def close(self) -> None:
        """Wait for what is under way, drop the rest."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
