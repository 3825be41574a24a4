"""The node's disk cache of whole shards: shared by all its processes, bounded, never half a file.

An entry is `KEY.shard`; while it comes it is `KEY.part`, and whoever comes holds its lock. The lock
is on the file that is being written, so a process that was killed leaves no lock, and a `.part`
that nobody holds is rubbish. A `.part` has its full length from the start: what is under way
counts against the bound. Evicted files are unlinked; who has one open reads on.
"""

import bz2
import fcntl
import gzip
import hashlib
import io
import lzma
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from pretrain import storage
from pretrain.data.packed import compression
from pretrain.errors import DataError

T = TypeVar("T")

FULL = {ENOSPC, EDQUOT}
GROWTH_BYTES = 16 << 20  # of a tar whose unpacked size nobody knows
OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gz": lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"),
    "bz2": lambda stream: bz2.BZ2File(stream, "rb"),
    "xz": lambda stream: lzma.LZMAFile(stream, "rb"),  # noqa: SIM115
}


class ShardCache:
    """Whole shards on the local disk.

    Args:
        folder: on a local disk, for this cache alone; made if it is missing.
        limit_bytes: of all entries, those under way included; the least recently opened go first.
            (Tars whose unpacked size is still growing may exceed it together for a while.)
        retry: of the downloads.
        longest_ratio: unpacked to packed bytes above which a shard is taken for a bomb.
    """

    def __init__(
        self,
        folder: str | Path,
        limit_bytes: int,
        retry: storage.Retry | None = None,
        *,
        longest_ratio: float = 100.0,
    ) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self.retry, self.longest_ratio = retry or storage.Retry(), longest_ratio
        self._stop = threading.Event()

    def open(self, url: str, bytes: int, sha256: str | None = None, unpack: bool = False) -> int:
        """A descriptor, the caller's to close, of the bytes of ``url``, from the disk if they are
        there. Processes and threads that want the same shard at once download it once.

        Args:
            bytes: of the object as it is stored.
            sha256: of the object as it is stored; None trusts it.
            unpack: keep what is inside a gz, bz2 or xz file; a plain one is kept as it is.

        Raises:
            FileNotFoundError: there is no such object.
            DataError: it stays unreachable, is another one than expected or damaged; or the cache
                cannot hold it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = self._path(_Wanted(url, bytes, sha256, unpack))
        part = entry.with_suffix(".part")
        length = None if unpack else bytes
        while True:
            if (found := _hit(entry, length)) is not None:
                return found
            writer = self._claim(part, url)
            if writer is None:
                continue  # somebody else ended with it in the meantime: look again
            try:
                found = _hit(entry, length)
                if found is None:
                    found = self._download(_Wanted(url, bytes, sha256, unpack), writer, part, entry)
                else:
                    part.unlink()
                return found
            except BaseException:
                if _is_at(writer, part):
                    part.unlink()
                raise
            finally:
                fcntl.flock(writer, fcntl.LOCK_UN)  # a forked child may hold a copy of it
                os.close(writer)

    def drop(self, descriptor: int, url: str, bytes: int, sha256: str | None, unpack: bool) -> None:
        """Have the next `open` of these arguments download again, if the entry is still the file
        ``descriptor``: for who found other bytes in it than were indexed."""
        entry = self._path(_Wanted(url, bytes, sha256, unpack))
        if _is_at(descriptor, entry):
            entry.unlink(missing_ok=True)

    def close(self) -> None:
        """End downloads under way in other threads, with a DataError each, within a second."""
        self._stop.set()

    def _path(self, wanted: "_Wanted") -> Path:
        # Content is part of the name: a shard that was indexed anew is another entry.
        text = "\n".join(map(str, wanted))
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.shard"

    def _claim(self, part: Path, url: str) -> int | None:
        """The ``.part`` of an entry, locked; None if another process ended with it meanwhile."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        writer = self._evicting_when_full(lambda: os.open(part, flags, 0o644))
        try:
            self._lock(writer, part, url)
            if _is_at(writer, part):
                return writer
        except BaseException:
            os.close(writer)
            raise
        os.close(writer)
        return None

    def _download(self, wanted: "_Wanted", writer: int, part: Path, entry: Path) -> int:
        """Fill the locked ``part`` and make it the entry; a descriptor of it, to read."""
        os.ftruncate(writer, 0)  # a killed process may have left something
        self._reserve(wanted.url, writer, wanted.bytes, wait=True)
        digest = hashlib.sha256()
        parts = storage.read_parts(wanted.url, wanted.bytes, self.retry, stop=self._stop)
        try:
            if not wanted.unpack:
                for data in parts:
                    digest.update(data)
                    self._write(writer, data)
            else:
                stream = io.BufferedReader(_Hashed(parts, digest), 1 << 20)
                self._unpack(wanted, stream, writer)
        except _Damaged as error:
            while stream.read(1 << 20):
                pass
            storage.check_sha256(wanted.url, digest.hexdigest(), wanted.sha256)
            raise DataError(f"{storage.shown(wanted.url)}: {error}") from None
        finally:
            parts.close()  # type: ignore[attr-defined]  # a generator: its threads end here
        storage.check_sha256(wanted.url, digest.hexdigest(), wanted.sha256)
        # Not synced, which would take as long as the download: what a power cut tears is found by
        # its samples' CRCs, and `drop` has it fetched again.
        found = os.open(part, os.O_RDONLY | os.O_CLOEXEC)  # before it may be evicted again
        try:
            os.replace(part, entry)
        except BaseException:
            os.close(found)
            raise
        return found

    def _unpack(self, wanted: "_Wanted", stream: Any, writer: int) -> None:
        kind = compression(stream.peek(6)[:6])
        source = OPENERS[kind](stream) if kind else stream
        written, reserved = 0, wanted.bytes
        # A tar is padded to 10 KiB: of a tiny one, the ratio says nothing.
        bound = max(wanted.bytes * self.longest_ratio, 1 << 20) if kind else wanted.bytes
        while data := _read(source, kind):
            written += len(data)
            if written > bound:
                raise _Damaged(
                    f"{wanted.bytes} bytes of {kind} hold more than {self.longest_ratio:g} times "
                    "as many; this is not a tar of pictures"
                )
            if written > reserved:
                reserved = min(written + GROWTH_BYTES, max(self.limit_bytes, written))
                self._reserve(wanted.url, writer, reserved, wait=False)
            self._write(writer, data)
        while stream.read(1 << 20):
            pass  # what follows the packed stream: the hash is of it too
        os.ftruncate(writer, written)

    def _write(self, writer: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = self._evicting_when_full(lambda view=view: os.write(writer, view))  # type: ignore[misc]
            view = view[done:]

    def _reserve(self, url: str, writer: int, total: int, wait: bool) -> None:
        """Give a ``.part`` its length, evicting others; ``wait`` for those under way to end if they
        leave no room."""
        self._check_fits(url, total)
        begun = time.monotonic()
        while True:
            with self._alone(url):
                others = self._under_way(os.fstat(writer).st_ino)
                if others + total <= self.limit_bytes or not wait:
                    self._evict(self.limit_bytes - others - total)
                    try:
                        if total:  # fallocate: a full disk is met here and not half-way
                            self._evicting_when_full(lambda: os.posix_fallocate(writer, 0, total))
                        return
                    except DataError:
                        if not (others and wait):
                            raise
            if time.monotonic() - begun > self.retry.deadline_seconds:
                raise DataError(
                    f"{storage.shown(url)} needs {total} bytes of the shard cache {self.folder}, "
                    f"and downloads under way hold {others} of {self.limit_bytes}; raise "
                    "data.read.cache_gib"
                )
            os.utime(writer)  # a sign of life for who waits for this entry
            self._pause(0.1, url)

    def _under_way(self, own_inode: int) -> int:
        """Bytes that other downloads take; what killed processes left is removed."""
        total = 0
        for part in self.folder.glob("*.part"):
            with suppress(FileNotFoundError):
                other = os.open(part, os.O_RDWR | os.O_CLOEXEC)
                try:
                    status = os.fstat(other)
                    if status.st_ino == own_inode:
                        continue
                    if _locked(other):
                        part.unlink()
                    else:
                        total += status.st_size
                finally:
                    os.close(other)
        return total

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of the last opening, bytes, file) of all entries, the oldest first."""
        found = []
        for entry in self.folder.glob("*.shard"):
            with suppress(FileNotFoundError):
                status = entry.stat()
                found.append((status.st_mtime_ns, status.st_size, entry))
        return sorted(found)

    def _evict(self, keep_bytes: int) -> None:
        """Unlink the entries opened longest ago, until at most ``keep_bytes`` are left."""
        entries = self._entries()
        total = sum(length for _, length, _ in entries)
        for _, length, entry in entries:
            if total <= keep_bytes:
                return
            entry.unlink(missing_ok=True)
            total -= length

    def _evicting_when_full(self, call: Callable[[], T]) -> T:
        """What ``call`` returns once enough entries were evicted for it to find room on the
        disk."""
        while True:
            try:
                return call()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if entries := self._entries():
                    entries[0][2].unlink(missing_ok=True)
                else:
                    raise DataError(
                        f"data.read.cache={str(self.folder)!r} is on a full disk, and nothing is "
                        "left to evict; free some space, or set data.read.cache to a larger disk"
                    ) from None

    def _check_fits(self, url: str, total: int) -> None:
        if total > self.limit_bytes:
            raise DataError(
                f"{storage.shown(url)} needs {total} bytes of the shard cache, "
                f"data.read.cache_gib={self.limit_bytes / (1 << 30):g} allows {self.limit_bytes}; "
                "raise it, or set data.read.access=ranged"
            )

    @contextmanager
    def _alone(self, url: str) -> Iterator[None]:
        """No other process counts and reserves meanwhile."""
        path = self.folder / "lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = self._evicting_when_full(lambda: os.open(path, flags, 0o644))
        try:
            self._lock(descriptor, path, url)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _lock(self, descriptor: int, path: Path, url: str) -> None:
        """Wait for the lock of a file for as long as its holder gives signs of life."""
        patience = 2 * self.retry.deadline_seconds + self.retry.attempt_seconds
        changed, since, wait = 0, time.monotonic(), 0.005
        while not _locked(descriptor):
            if (now := os.fstat(descriptor).st_mtime_ns) != changed:
                changed, since = now, time.monotonic()
            if time.monotonic() - since > patience:
                raise DataError(
                    f"{storage.shown(url)}: another process has held {str(path)!r} for "
                    f"{patience:.0f} s and written nothing; end that process"
                )
            self._pause(wait, url)
            wait = min(2 * wait, 0.2)

    def _pause(self, seconds: float, url: str) -> None:
        if self._stop.wait(seconds):
            raise DataError(f"{storage.shown(url)}: reading was stopped")


class _Wanted(NamedTuple):
    url: str
    bytes: int
    sha256: str | None
    unpack: bool


class _Damaged(Exception):
    """A packed shard that cannot be unpacked; the message says why."""


class _Hashed(io.RawIOBase):
    """Parts as one stream, hashed as they are read."""

    def __init__(self, parts: Iterator[bytes], digest: Any) -> None:
        self._parts, self._digest, self._rest = parts, digest, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._digest.update(part)
            self._rest = memoryview(part)
        length = min(len(buffer), len(self._rest))
        buffer[:length] = self._rest[:length]
        self._rest = self._rest[length:]
        return length


def _read(source: IO[bytes], kind: str | None) -> bytes:
    try:
        return source.read(1 << 20)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if kind is None:
            raise
        raise _Damaged(f"is not a whole {kind} file ({error}); restore it") from error


def _hit(entry: Path, length: int | None) -> int | None:
    """A descriptor of an entry, which is now the one opened last; None if it is not there."""
    try:
        found = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if length not in (None, os.fstat(found).st_size):  # somebody cut it
        os.close(found)
        entry.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # another user's
        os.utime(found)
    return found


def _locked(descriptor: int) -> bool:
    """Take the lock of an open file, if nobody holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
