"""Bytes by URL: every path may be local or remote (file, s3, gs, https), through fsspec alone.

File systems are opened where they are used, never at import: s3fs made before a fork hangs after
it.
"""

import hashlib
import os
import uuid
from contextlib import suppress
from typing import IO, Any, cast

import fsspec
from fsspec.core import split_protocol, url_to_fs


def is_remote(url: str) -> bool:
    """Whether ``url`` names something other than the local file system."""
    protocol, _ = split_protocol(url)
    return protocol not in (None, "file", "local")


def join(base: str, *parts: str) -> str:
    """``base/part/...`` for local paths and URLs alike."""
    return "/".join([base.rstrip("/"), *parts])


def open_read(url: str) -> IO[bytes]:
    """A binary stream of ``url``, sequential or seekable as its file system allows.

    Raises:
        FileNotFoundError: there is no such object.
    """
    return cast(IO[bytes], fsspec.open(url, "rb").open())


def read_bytes(url: str) -> bytes:
    """All bytes of ``url``."""
    with open_read(url) as stream:
        return stream.read()


def exists(url: str) -> bool:
    """Whether an object or folder is at ``url``."""
    fs, path = url_to_fs(url)
    return bool(fs.exists(path))


def write_bytes(url: str, data: bytes) -> None:
    """Write ``data`` so that a reader sees all of it or none: locally by a rename, remotely by one
    PUT."""
    fs, path = url_to_fs(url)
    if is_remote(url):
        fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)  # a full disk must not fill further at every try
        raise


def sha256(url: str, chunk_bytes: int = 1 << 20) -> str:
    """Hex SHA-256 of the bytes at ``url``, read in chunks."""
    digest = hashlib.sha256()
    with open_read(url) as stream:
        while chunk := stream.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_bytes(data: bytes | Any) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()
