"""Bytes by URL: every path may be local or remote (file, s3, gs, https), through fsspec alone.

Remote reads and writes are tried again until a deadline (remote.py). File systems are opened where
they are used, never at import: s3fs made before a fork hangs after it.
"""

import hashlib
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import IO, Any, cast

import fsspec
from fsspec.core import split_protocol, url_to_fs

from pretrain.errors import DataError
from pretrain.remote import SLOWEST_BYTES_PER_SECOND, Remote, ends_early
from pretrain.remote import Retry as Retry
from pretrain.remote import shown as shown

PART_BYTES = 16 << 20  # a request costs as much processor time as receiving a few hundred KB
PARALLEL_PARTS = 2


def is_remote(url: str) -> bool:
    """Whether ``url`` names something other than the local file system."""
    protocol, _ = split_protocol(url)
    return protocol not in (None, "file", "local")


def join(base: str, *parts: str) -> str:
    """``base/part/...`` for local paths and URLs alike."""
    return "/".join([base.rstrip("/"), *parts])


def open_read(url: str) -> IO[bytes]:
    """A binary stream of ``url``, sequential or seekable as its file system allows: the one read
    that is not tried again.

    Raises:
        FileNotFoundError: there is no such object.
    """
    return cast(IO[bytes], fsspec.open(url, "rb").open())


def size(url: str, retry: Retry | None = None) -> int:
    """Bytes at ``url``.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: it stays unreachable, or its server does not tell.
    """
    if not is_remote(url):
        return os.path.getsize(_local(url))
    found = Remote(url, retry).size()
    if found is None:
        raise DataError(f"{shown(url)}: its server does not tell its size (no Content-Length)")
    return found


def exists(url: str, retry: Retry | None = None) -> bool:
    """Whether an object or folder is at ``url``.

    Raises:
        DataError: it stays unreachable, which is not the same as missing.
    """
    if not is_remote(url):
        return os.path.exists(_local(url))
    remote = Remote(url, retry)
    try:
        remote.tried(remote.info)
    except FileNotFoundError:
        return False
    return True


def read_range(url: str, start: int, end: int, retry: Retry | None = None) -> bytes:
    """Exactly the bytes ``start`` to ``end`` (exclusive) of ``url``.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: it ends before ``end``, or stays unreachable.
    """
    if not 0 <= start <= end:
        raise ValueError(f"start={start}, end={end} is not a range of bytes")
    if is_remote(url):
        return Remote(url, retry).range(start, end)[0]
    with open(_local(url), "rb") as stream:
        stream.seek(start)
        data = stream.read(end - start)
    if len(data) < end - start:
        raise ends_early(url, os.path.getsize(_local(url)), end)
    return data


def read_bytes(url: str, retry: Retry | None = None) -> bytes:
    """All bytes of ``url``.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: it stays unreachable.
    """
    return b"".join(read_parts(url, retry=retry))


def read_parts(
    url: str,
    bytes: int | None = None,
    retry: Retry | None = None,
    part_bytes: int = PART_BYTES,
    stop: threading.Event | None = None,
) -> Iterator[bytes]:
    """The bytes of ``url`` in order, a few parts ahead in threads, each tried again by itself.

    Args:
        bytes: what the object must have; None takes it as it is.
        part_bytes: of one request; about four parts are in memory.
        stop: ends the reading with a DataError once it is set.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: it has another size, or a part stays unreachable until its deadline.
    """
    if is_remote(url):
        yield from _remote_parts(url, bytes, retry, part_bytes, (stop,) if stop else ())
        return
    with open(_local(url), "rb") as stream:
        _check_size(url, os.fstat(stream.fileno()).st_size, bytes)
        while data := stream.read(part_bytes):
            yield data


def fetch(
    url: str,
    path: str,
    bytes: int | None = None,
    retry: Retry | None = None,
    part_bytes: int = PART_BYTES,
    sha256: str | None = None,
) -> str:
    """Copy ``url`` to the local file ``path``, which is there complete or not at all.

    Args:
        bytes: what the object must have; None takes it as it is.
        sha256: likewise.

    Returns:
        Its hex SHA-256.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: it stays unreachable, or is another one than expected.
        OSError: ``path`` cannot be written.
    """
    digest = hashlib.sha256()
    with _replacing(path) as stream:
        for part in read_parts(url, bytes, retry, part_bytes):
            digest.update(part)
            stream.write(part)
        check_sha256(url, digest.hexdigest(), sha256)
    return digest.hexdigest()


def check_sha256(url: str, found: str, expected: str | None) -> None:
    """Raise a DataError if the bytes of ``url`` have another hash than ``expected``."""
    if expected is not None and found != expected:
        raise DataError(
            f"{shown(url)} has sha256 {found[:12]}…, {expected[:12]}… was indexed; restore it, or "
            "index again (sample numbers then mean other samples)"
        )


def write_bytes(url: str, data: bytes, retry: Retry | None = None) -> None:
    """Write ``data`` so that a reader sees all of it or none: locally by a rename, remotely by one
    PUT."""
    if is_remote(url):
        remote = Remote(url, retry)
        remote.tried(
            lambda seconds: remote.call(seconds, len(data), "pipe_file", remote.path, data)
        )
        return
    with _replacing(_local(url)) as stream:
        stream.write(data)


def put_file(path: str, url: str, retry: Retry | None = None) -> None:
    """Copy the local file ``path`` to ``url``, whole or not at all, through little memory."""
    if not is_remote(url):
        with open(path, "rb") as source, _replacing(_local(url)) as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
        return
    # The file system cuts it into parts and tries each again by itself; all together may need more
    # than the deadline of one request.
    retry, length = retry or Retry(), os.path.getsize(path)
    longest = retry.deadline_seconds + length / SLOWEST_BYTES_PER_SECOND
    remote = Remote(url, replace(retry, deadline_seconds=longest), inner_tries=5)
    remote.tried(lambda seconds: remote.call(seconds, length, "put_file", path, remote.path))


def remove(url: str, retry: Retry | None = None) -> None:
    """Delete what is at ``url``, if anything is."""
    if not is_remote(url):
        with suppress(FileNotFoundError):
            os.unlink(_local(url))
        return
    remote = Remote(url, retry)
    with suppress(FileNotFoundError):
        remote.tried(lambda seconds: remote.call(seconds, 0, "rm_file", remote.path))


def sha256(url: str, chunk_bytes: int = PART_BYTES) -> str:
    """Hex SHA-256 of the bytes at ``url``, read in chunks."""
    digest = hashlib.sha256()
    for data in read_parts(url, part_bytes=chunk_bytes):
        digest.update(data)
    return digest.hexdigest()


def sha256_bytes(data: bytes | Any) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def _remote_parts(
    url: str,
    expected: int | None,
    retry: Retry | None,
    part_bytes: int,
    stops: tuple[threading.Event, ...],
) -> Iterator[bytes]:
    remote = Remote(url, retry, stops)
    found = remote.size()
    if found is None:
        data = remote.whole()
        _check_size(url, len(data), expected)
        yield data
        return
    _check_size(url, found, expected)
    ranges = deque((at, min(at + part_bytes, found)) for at in range(0, found, part_bytes))
    # An HTTP server may ignore ranges and send all: find out before four threads get it all each.
    if ranges and (len(ranges) == 1 or remote.protocol.startswith("http")):
        data, whole = remote.range(*ranges.popleft())
        yield data if whole is None else whole
        if whole is not None:
            return
    failed = threading.Event()  # an error in one part ends the others
    parts = Remote(url, retry, (*stops, failed))
    ahead: deque[Future[tuple[bytes, bytes | None]]] = deque()
    with ThreadPoolExecutor(PARALLEL_PARTS, "read-parts") as pool:  # its threads start at need
        try:
            while ranges or ahead:
                while ranges and len(ahead) <= PARALLEL_PARTS:
                    ahead.append(pool.submit(parts.range, *ranges.popleft()))
                yield ahead.popleft().result()[0]
        finally:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _check_size(url: str, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise DataError(
            f"{shown(url)} has {found} bytes, {expected} were indexed; restore it, or index again "
            "(sample numbers then mean other samples)"
        )


def _local(url: str) -> str:
    """The path of a local URL."""
    return str(url_to_fs(url)[1])


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes are at ``path``, on disk, once the block has ended well; else what was
    there before."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)  # a full disk must not fill further at every try
        raise
