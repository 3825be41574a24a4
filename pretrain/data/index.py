"""Manifest and member table of tars that exist, made by reading each once and rewriting none.

A shard is indexed by itself and its result kept beside the manifest until all are done: so the work
runs in parallel, is taken up where it was killed, and can be shared out over machines. A shard that
has not changed since the last index is not read again.
"""

import hashlib
import json
import lzma
import mmap
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
from fsspec.core import url_to_fs

from pretrain import storage
from pretrain.data.manifest import (
    ASPECTS,
    ROW,
    Manifest,
    Shard,
    Shards,
    aspect_of,
    folder_of,
    members_of,
    relative,
)
from pretrain.data.packed import compression, open_unpacked
from pretrain.data.samples import IMAGE_EXTENSIONS, size_of
from pretrain.data.shards import Member, MemberBounds, iter_members
from pretrain.errors import DataError

Rows = npt.NDArray[np.void]
# What a reader would refuse by its own bounds is indexed all the same: bounds are a run's business.
BOUNDS = MemberBounds(max_member_bytes=1 << 32, max_members=1 << 16)
Report = Callable[[int, int, str], None]  # shards done, shards in all, the last one's URL


@dataclass(frozen=True)
class Indexed:
    """What an indexing run found.

    Attributes:
        manifest: as written; None where this run made a part of the work only.
        rejects: members that are no part of any sample, by reason.
        reused: shards that had not changed since the last index.
    """

    manifest: Manifest | None
    rejects: Counter[str]
    reused: int


def expand(patterns: Sequence[str]) -> list[str]:
    """URLs of patterns with braces (``{00000..00099}``) or stars, in order.

    Raises:
        DataError: a star matches nothing.
    """
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    for pattern in patterns:
        for url in expand_urls(pattern):
            if "*" not in url:
                found.append(url)
                continue
            fs, path = url_to_fs(url)
            matches = sorted(fs.glob(path))
            if not matches:
                raise DataError(f"shards={url!r} matches no file; check the pattern")
            found += [fs.unstrip_protocol(m) if storage.is_remote(url) else m for m in matches]
    return found


def build(
    urls: Sequence[str],
    out: str,
    *,
    parallel: int = 1,
    versions: bool = True,
    part: tuple[int, int] = (0, 1),
    retry: storage.Retry | None = None,
    report: Report = lambda done, total, url: None,
) -> Indexed:
    """Index shards and write the manifest ``out`` and its member table.

    Args:
        urls: of the tars, in the order that numbers their samples.
        out: URL of the manifest; shards below its folder are named relative to it.
        parallel: processes.
        versions: keep what the store says of each shard, for the next run; without, the same shards
            give the same manifest to the byte.
        part: (i, n): do the i-th n-th of the shards, and write no manifest: another machine does
            the others, and a run without ``part`` joins them.
        retry: of remote reads.
        report: called after each shard.

    Raises:
        DataError: a shard is missing or no tar, or is listed twice.
    """
    twice = [url for url, n in Counter(urls).items() if n > 1]
    if twice:
        raise DataError(f"shards={twice[0]!r} is listed {Counter(urls)[twice[0]]} times; list once")
    results = _Results(out)
    known = _known(out)
    versions_now = {u: version_of(u) for u in urls} if versions else {}
    todo = []
    reused = 0
    for number, url in enumerate(urls):
        if number % part[1] != part[0] or results.has(url, versions_now.get(url, "")):
            continue
        old = known.get(relative(url, folder_of(out)))
        if old and versions and old[0].version == versions_now[url]:
            results.put(url, old[0], old[1], Counter())
            reused += 1
        else:
            todo.append(url)
    work = partial(index_shard, retry=retry)
    for done, (url, (shard, rows, rejects)) in enumerate(_map(work, todo, parallel), 1):
        results.put(url, replace(shard, version=versions_now.get(url, "")), rows, rejects)
        report(done, len(todo), url)
    if part[1] > 1:
        return Indexed(None, Counter(), reused)
    manifest, rejects = results.join(urls, out)
    results.remove()
    return Indexed(manifest, rejects, reused)


def index_shard(
    url: str, retry: storage.Retry | None = None, bounds: MemberBounds = BOUNDS
) -> tuple[Shard, Rows, Counter[str]]:
    """One shard's entry (its ``url`` as given), its rows, and what was refused by reason.

    A tar that is cut short gives the samples before the cut, and one "truncated tar".

    Raises:
        DataError: it is missing, or no tar at all.
    """
    with _local(url, retry) as (path, size, sha256), _plain(path, url) as (data, packed):
        found = _Samples(url)
        try:
            for member in iter_members(cast(IO[bytes], data), bounds, url):
                found.add(member)
        except DataError:
            if not found.starts:
                raise
            found.rejects["truncated tar"] += 1
        rows = found.rows(data)
        aspects = np.bincount(aspect_of(rows), minlength=len(ASPECTS)) if len(rows) else ()
        unpacked = len(data) if packed else 0
        shard = Shard(url, len(rows), size, sha256, tuple(int(n) for n in aspects), unpacked)
        return shard, rows, found.rejects


class _Samples:
    """Where the samples of a tar begin, while its members go by."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.starts: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.end = 0
        self.rejects: Counter[str] = Counter()
        self._key: str | None = None

    def add(self, member: Member) -> None:
        """The next member. One that is refused stays in the range of the sample before it (of the
        first, where it leads): whoever reads that sample meets and counts it."""
        self.end = member.end
        if member.refused:
            self.rejects[member.refused] += 1
            return
        if member.key != self._key:
            self._key = member.key
            self.starts.append(member.start)
            self.sizes.append((0, 0))
        if member.extension in IMAGE_EXTENSIONS and self.sizes[-1] == (0, 0):
            width, height = size_of(member.data)
            self.sizes[-1] = (width, height) if max(width, height) < 1 << 16 else (0, 0)

    def rows(self, data: memoryview | bytes | mmap.mmap) -> Rows:
        """The member table's rows."""
        rows = np.zeros(len(self.starts), ROW)
        bounds = [0, *self.starts[1:], self.end]
        for row, start, end, size in zip(rows, bounds, bounds[1:], self.sizes, strict=False):
            if end - start >= 1 << 32:
                raise DataError(
                    f"shard={self.url!r}: a sample has {end - start} bytes, 4 GiB is the most"
                )
            row["offset"], row["bytes"] = start, end - start
            row["crc32"] = zlib.crc32(data[start:end])
            row["width"], row["height"] = size
        return rows


@contextmanager
def _local(url: str, retry: storage.Retry | None) -> Iterator[tuple[str, int, str]]:
    """(path, bytes, sha256) of a shard, fetched for the while where it is remote."""
    if not storage.is_remote(url):
        path = url.removeprefix("file://")
        try:
            yield path, os.path.getsize(path), storage.sha256(path)
        except FileNotFoundError:
            raise DataError(f"shard={url!r} does not exist; check the path") from None
        return
    with tempfile.TemporaryDirectory(prefix="diffdis-index-") as folder:
        path = os.path.join(folder, "shard")
        try:
            sha256 = storage.fetch(url, path, retry=retry)
        except FileNotFoundError:
            raise DataError(f"shard={url!r} does not exist; check the URL") from None
        yield path, os.path.getsize(path), sha256


@contextmanager
def _plain(path: str, url: str) -> Iterator[tuple[mmap.mmap | bytes, bool]]:
    """The bytes of a tar, unpacked where it is compressed, and whether it was."""
    with open(path, "rb") as stream, tempfile.TemporaryFile() as unpacked:
        packed = compression(stream.read(6)) is not None
        source: IO[bytes] = stream
        if packed:
            try:
                with open_unpacked(path) as inner:
                    shutil.copyfileobj(inner, unpacked, 1 << 20)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise DataError(
                    f"shard={url!r} is not a whole tar file ({error}); fetch or write it again"
                ) from None
            unpacked.flush()
            source = cast(IO[bytes], unpacked)
        if os.fstat(source.fileno()).st_size == 0:
            raise DataError(f"shard={url!r} is empty; fetch or write it again")
        with mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data, packed


def version_of(url: str) -> str:
    """What the store says of a file without reading it: it changes when the file does."""
    fs, path = url_to_fs(url)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        raise DataError(f"shard={url!r} does not exist; check the path") from None
    tag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
    return f"{info.get('size')}-{tag}".replace('"', "")


def _known(out: str) -> dict[str, tuple[Shard, Rows]]:
    """Shards of the last index, by URL as written."""
    if not storage.exists(out) or not storage.exists(members_of(out)):
        return {}
    try:
        manifest = Manifest.load(out)
    except DataError:
        return {}
    table = np.frombuffer(storage.read_bytes(manifest.members_url), ROW)
    if len(table) != manifest.num_samples:
        return {}
    starts = manifest.starts
    return {s.url: (s, table[starts[i] : starts[i + 1]]) for i, s in enumerate(manifest.shards)}


class _Results:
    """Finished shards, beside the manifest until it is written: what a killed run leaves, and what
    parts made on other machines are joined from."""

    def __init__(self, out: str) -> None:
        self.folder = f"{out.removesuffix('.json')}.indexing"

    def _url(self, url: str) -> str:
        return storage.join(self.folder, hashlib.sha256(url.encode()).hexdigest()[:24])

    def has(self, url: str, version: str) -> bool:
        """Whether ``url`` was done, and has not changed since."""
        if not storage.exists(self._url(url)):
            return False
        head, _ = self.get(url)
        return bool(head["shard"]["version"] == version)

    def put(self, url: str, shard: Shard, rows: Rows, rejects: Counter[str]) -> None:
        """Keep one shard's result."""
        head = json.dumps({"shard": asdict(shard), "rejects": rejects}).encode()
        storage.write_bytes(self._url(url), head + b"\n" + rows.tobytes())

    def get(self, url: str) -> tuple[dict[str, dict[str, object]], bytes]:
        """Head and rows of one shard."""
        head, _, rows = storage.read_bytes(self._url(url)).partition(b"\n")
        return json.loads(head), rows

    def join(self, urls: Sequence[str], out: str) -> tuple[Manifest, Counter[str]]:
        """Write member table and manifest, the manifest last: it is what a reader looks for."""
        folder, rejects = folder_of(out), Counter[str]()
        shards = []
        with tempfile.TemporaryDirectory(prefix="diffdis-index-") as scratch:
            table = Path(scratch) / "members"
            with table.open("wb") as stream:
                for url in urls:
                    head, rows = self.get(url)
                    fields = {**head["shard"], "url": relative(url, folder)}
                    fields["aspects"] = tuple(cast(list[int], fields["aspects"]))
                    shards.append(Shard(**fields))  # type: ignore[arg-type]
                    rejects.update(cast(dict[str, int], head["rejects"]))
                    stream.write(rows)
            storage.put_file(str(table), members_of(out))
        manifest = Manifest(Shards(shards), folder, members_of(out))
        manifest.save(out)
        return manifest, rejects

    def remove(self) -> None:
        """Forget them: the manifest holds them now."""
        fs, path = url_to_fs(self.folder)
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def _map(
    work: Callable[[str], tuple[Shard, Rows, Counter[str]]], urls: Sequence[str], parallel: int
) -> Iterator[tuple[str, tuple[Shard, Rows, Counter[str]]]]:
    """(url, result) as they are done."""
    if parallel <= 1 or len(urls) <= 1:
        yield from ((url, work(url)) for url in urls)
        return
    # forkserver: a file system made before a fork hangs after it.
    with ProcessPoolExecutor(parallel, mp_context=get_context("forkserver")) as pool:
        # A bounded window of submissions: 100,000 pending results would all be held.
        waiting = iter(urls)
        running = {
            pool.submit(work, url): url
            for _, url in zip(range(2 * parallel), waiting, strict=False)
        }
        while running:
            done = next(as_completed(running))
            url = running.pop(done)
            yield url, done.result()
            for new in waiting:
                running[pool.submit(work, new)] = new
                break
