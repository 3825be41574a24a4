"""Is a data set what its manifest says, and can every sample of it be used? Every byte is read.

Shards are checked in parallel, each by itself; only hashes come back from them, so that duplicates
are found among billions of samples in bounded memory.
"""

import hashlib
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pretrain import storage
from pretrain.data import duplicates
from pretrain.data.index import index_shard
from pretrain.data.manifest import Manifest, Shard
from pretrain.data.packed import compression, open_unpacked
from pretrain.data.reader import MemberTable, ReadConfig
from pretrain.data.samples import IMAGE_EXTENSIONS, Bounds, Refused, decode
from pretrain.data.shards import MemberBounds, RawSample, read_sample
from pretrain.errors import DataError
from pretrain.page.show import plain

Rows = npt.NDArray[np.void]
KEPT = 10_000  # problems that are kept one by one; all are counted
PAIRS = 100_000  # likewise of duplicates
_Task = tuple[str, Shard, Rows | None]
Report = Callable[[int, int, str], None]  # shards done, shards in all, problems so far


@dataclass(frozen=True)
class VerifyOptions:
    """What is checked.

    Attributes:
        decode: decode every picture.
        duplicates: look for pictures that are equal, and (with ``decode``) nearly equal.
        near_bits: of 64, by which nearly equal pictures may differ.
        bounds: of pictures, as the trainer's.
    """

    bounds: Bounds
    decode: bool = True
    duplicates: bool = False
    near_bits: int = 3


@dataclass(frozen=True)
class Problem:
    """What is wrong: by what reason, in which shard, with which sample (empty: all of it)."""

    reason: str
    shard: str
    key: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Pair:
    """Two samples that are alike, each as ``shard:key``; `bits` of their dHashes differ."""

    first: str
    second: str
    bits: int = 0


@dataclass
class Verdict:
    """What was found.

    Attributes:
        samples, shards: that were checked.
        counts: problems by reason.
        by_shard: problems by shard.
        problems: the first of them.
        same, near: pairs of equal and nearly equal pictures, the first of them.
        num_same, num_near: of all.
        flat: pictures of one colour, which are not compared.
        skipped: pictures not compared with all that might be near: too many share their look.
    """

    manifest: str
    samples: int
    shards: int
    counts: Counter[str] = field(default_factory=Counter)
    by_shard: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    same: list[Pair] = field(default_factory=list)
    near: list[Pair] = field(default_factory=list)
    num_same: int = 0
    num_near: int = 0
    flat: int = 0
    skipped: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is damaged; pictures that are alike are no damage."""
        return not self.counts

    def add(self, problem: Problem) -> None:
        """Count a problem."""
        self.counts[problem.reason] += 1
        self.by_shard[problem.shard] += 1
        if len(self.problems) < KEPT:
            self.problems.append(problem)


@dataclass
class _Checked:
    """One shard's result: hashes of the samples (by index) that have them."""

    problems: list[Problem] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    near_index: list[int] = field(default_factory=list)
    near: list[int] = field(default_factory=list)
    flat: int = 0


def verify(
    url: str,
    options: VerifyOptions,
    *,
    parallel: int = 1,
    read: ReadConfig | None = None,
    report: Report = lambda done, total, note: None,
) -> Verdict:
    """Check every shard of a manifest.

    Args:
        url: of the manifest.
        options: what is checked.
        parallel: processes; 1 works in this process.
        read: how long remote shards are tried, and the bounds of members.
        report: called after each shard.

    Raises:
        DataError: there is no manifest.
    """
    read = read or ReadConfig()
    manifest = Manifest.load(url, read.retry)
    verdict = Verdict(url, manifest.num_samples, len(manifest.shards))
    try:
        table: MemberTable | None = MemberTable(manifest, read.retry)
    except DataError as error:
        table = None
        verdict.add(Problem("member table", url, detail=str(error)))
    work = partial(check_shard, options=options, read=read)
    tasks = (
        (manifest.url(i), manifest.shards[i], None if table is None else np.array(table.rows(i)))
        for i in range(len(manifest.shards))
    )
    with tempfile.TemporaryDirectory(prefix="pretrain-verify-") as scratch:
        names = _Names(manifest, Path(scratch) / "names")
        keys = duplicates.Spool(Path(scratch) / "keys")
        pictures = duplicates.Spool(Path(scratch) / "pictures")
        near = duplicates.NearSpool(Path(scratch) / "near", options.near_bits)
        for number, checked in enumerate(_in_order(work, tasks, parallel)):
            for problem in checked.problems:
                verdict.add(problem)
            verdict.flat += checked.flat
            names.put(number, checked)
            # Samples are numbered here by shard and place, for a damaged shard may hold more.
            base = number << 32
            keys.add(_u8(checked.keys), _u8([base + i for i in checked.index]))
            if options.duplicates:
                pictures.add(_u8(checked.pictures), _u8([base + i for i in checked.index]))
                near.add(_u8(checked.near), _u8([base + i for i in checked.near_index]))
            report(number + 1, len(manifest.shards), f"{verdict.counts.total():,} problems")
        for first, second in duplicates.repeats(keys):
            shard, key = names.of(second)
            verdict.add(Problem("duplicate key", shard, key, f"also in {names.of(first)[0]}"))
        if options.duplicates:
            _alike(verdict, names, pictures, near)
    return verdict


def check_shard(task: _Task, options: VerifyOptions, read: ReadConfig) -> _Checked:
    """One shard, read once and whole."""
    url, shard, expected = task
    found = _Checked()

    def problem(reason: str, key: str = "", detail: str = "") -> None:
        found.problems.append(Problem(reason, url, key, detail))

    try:
        with _plain_file(url, read.retry) as (path, size, sha256):
            if size != shard.bytes:
                problem("shard size", detail=f"{size} bytes, {shard.bytes} were indexed")
            if sha256 != shard.sha256:
                problem("shard hash", detail=f"{sha256[:12]}…, {shard.sha256[:12]}… was indexed")
            _, rows, odd = index_shard(path)
            if odd["truncated tar"]:
                problem("truncated tar", detail="its end is missing")
            if expected is not None:
                for reason, index, detail in _differences(rows, expected):
                    problem(reason, "" if index is None else f"#{index}", detail)
            with open(path, "rb") as stream:
                for index, row in enumerate(rows):
                    stream.seek(int(row["offset"]))
                    _check_sample(found, url, index, stream.read(int(row["bytes"])), options, read)
    except FileNotFoundError:
        problem("missing shard")
    except (DataError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        problem("unreadable shard", detail=str(error))
    return found


def _check_sample(
    found: _Checked, url: str, index: int, data: bytes, options: VerifyOptions, read: ReadConfig
) -> None:
    raw, rejects = read_sample(url, data, MemberBounds(read.max_member_bytes, read.max_members))
    found.problems += [Problem(r.reason, r.shard, r.key) for r in rejects]
    if raw is None:
        return
    found.index.append(index)
    found.names.append(raw.key)
    found.keys.append(_hash(raw.key.encode()))
    found.pictures.append(_hash(_encoded(raw) or raw.key.encode()))
    if not options.decode:
        return
    try:
        image, _ = decode(raw, options.bounds)
    except Refused as refused:
        found.problems.append(Problem(refused.reason, url, raw.key))
        return
    if options.duplicates:
        look = duplicates.dhash(image)
        if look is None:
            found.flat += 1
        else:
            found.near.append(look)
            found.near_index.append(index)


def _differences(found: Rows, expected: Rows) -> Iterator[tuple[str, int | None, str]]:
    """(reason, sample, detail) of rows of the member table that are not the shard's."""
    if len(found) != len(expected):
        yield "member table", None, f"{len(expected)} samples, the shard has {len(found)}"
    both = min(len(found), len(expected))
    for index in np.flatnonzero(found[:both] != expected[:both]).tolist():
        row, was = found[index], expected[index]
        if (row["offset"], row["bytes"]) != (was["offset"], was["bytes"]):
            yield "member table", index, f"bytes from {was['offset']}, they are at {row['offset']}"
            return  # so are all that follow
        if row["crc32"] != was["crc32"]:
            yield "sample checksum", index, "other bytes than were indexed"
        else:
            size = f"{row['width']} x {row['height']}"
            yield "member table", index, f"{was['width']} x {was['height']} px, it has {size}"


@contextmanager
def _plain_file(url: str, retry: storage.Retry) -> Iterator[tuple[str, int, str]]:
    """(path of the plain tar, bytes and SHA-256 as stored) of a shard, fetched and unpacked for
    the while where need be."""
    with tempfile.TemporaryDirectory(prefix="pretrain-verify-") as folder:
        if storage.is_remote(url):
            path = os.path.join(folder, "shard")
            sha256 = storage.fetch(url, path, retry=retry)
        else:
            path = url.removeprefix("file://")
            sha256 = storage.sha256(path)
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            packed = compression(stream.read(6)) is not None
        if packed:
            plain = os.path.join(folder, "plain")
            with open_unpacked(path) as source, open(plain, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            path = plain
        yield path, size, sha256


class _Names:
    """Shard and key of samples by number; keys lie on disk, a file a shard."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest, self.folder = manifest, folder
        folder.mkdir()
        self._last: tuple[int, dict[int, str]] = (-1, {})

    def put(self, shard: int, checked: _Checked) -> None:
        """Keep the keys of a shard."""
        named = dict(zip(checked.index, checked.names, strict=True))
        (self.folder / str(shard)).write_text(json.dumps(named), encoding="utf-8")

    def of(self, number: int) -> tuple[str, str]:
        """(URL of the shard, key)."""
        shard, index = number >> 32, number & 0xFFFFFFFF
        if self._last[0] != shard:
            named = json.loads((self.folder / str(shard)).read_text(encoding="utf-8"))
            self._last = shard, {int(i): key for i, key in named.items()}
        return self.manifest.url(shard), self._last[1][index]

    def pair(self, first: int, second: int, bits: int = 0) -> Pair:
        """Two samples by name."""
        return Pair(":".join(self.of(first)), ":".join(self.of(second)), bits)


def _alike(
    verdict: Verdict, names: _Names, pictures: duplicates.Spool, near: duplicates.NearSpool
) -> None:
    """Add the pairs of pictures that are alike."""
    again = []
    for first, second in duplicates.repeats(pictures):
        verdict.num_same += 1
        again.append(second)
        if len(verdict.same) < PAIRS:
            verdict.same.append(names.pair(first, second))
    told = set(again)
    for first, second, bits in near.pairs():
        if first in told or second in told:
            continue  # its first copy is compared
        verdict.num_near += 1
        if len(verdict.near) < PAIRS:
            verdict.near.append(names.pair(first, second, bits))
    verdict.near.sort(key=lambda pair: pair.bits)
    verdict.skipped = near.skipped


def _encoded(raw: RawSample) -> bytes | None:
    return next((raw.files[e] for e in IMAGE_EXTENSIONS if e in raw.files), None)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _u8(values: list[int]) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def _in_order(
    work: Callable[[_Task], _Checked], tasks: Iterator[_Task], parallel: int
) -> Iterator[_Checked]:
    """Results in the order of the shards, a few shards a process under way at a time."""
    if parallel <= 1:
        yield from map(work, tasks)
        return
    running: deque[Future[_Checked]] = deque()
    # Imported once by the server that workers are forked from, not by each worker.
    set_forkserver_preload(["pretrain.data.loader"])
    # forkserver: a file system made before a fork hangs after it.
    with ProcessPoolExecutor(parallel, mp_context=get_context("forkserver")) as pool:
        try:
            for task in tasks:
                running.append(pool.submit(work, task))
                if len(running) > 2 * parallel:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def table(verdict: Verdict, options: VerifyOptions, limit: int) -> str:
    """The verdict as text: a line a reason, with the worst shards and some samples."""
    v = verdict
    size = f"{v.samples:,} samples in {v.shards:,} shards"
    how = "every picture was decoded" if options.decode else "pictures were not decoded"
    lines = []
    if v.clean:
        lines.append(f"{v.manifest}: {size}, all whole; {how}")
    else:
        lines += [f"{v.manifest}: DAMAGED, {v.counts.total():,} problems; {size}; {how}", ""]
        width = max(len(reason) for reason in v.counts)
        for reason, count in v.counts.most_common():
            of_reason = [p for p in v.problems if p.reason == reason]
            lines.append(f"  {reason:<{width}} {count:>9,}")
            lines += [f"  {'':<{width}}           {_told(p)}" for p in of_reason[:limit]]
            if count > limit:
                lines.append(f"  {'':<{width}}           … and {count - limit:,} more")
        lines += ["", "  worst shards"]
        for url, count in v.by_shard.most_common(limit):
            lines.append(f"  {'':<{width}} {count:>9,}  {url}")
    if options.duplicates:
        lines += ["", *_told_pairs(f"{v.num_same:,} equal pictures", v.same, limit)]
        near = (
            f"{v.num_near:,} nearly equal pictures (dHashes differ in <= {options.near_bits} bits)"
        )
        lines += _told_pairs(near, v.near, limit) if options.decode else []
        if v.flat or v.skipped:
            lines.append(f"not compared: {v.flat:,} of one colour, {v.skipped:,} of too many alike")
    return "\n".join(lines)


def _told(problem: Problem) -> str:
    where = f"{problem.shard}:{problem.key}" if problem.key else problem.shard
    return plain(f"{where}  {problem.detail}".rstrip())


def _told_pairs(title: str, pairs: list[Pair], limit: int) -> list[str]:
    lines = [title]
    for pair in pairs[:limit]:
        bits = f"  ({pair.bits} bits)" if pair.bits else ""
        lines.append(plain(f"  {pair.first}  =  {pair.second}{bits}"))
    return lines
