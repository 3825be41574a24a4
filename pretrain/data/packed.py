"""Compressed shards: what they are told by, and how they are opened."""

import bz2
import gzip
import lzma
from typing import IO, cast

MAGIC = {"gz": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00"}


def compression(head: bytes) -> str | None:
    """How a file that begins with ``head`` (6 bytes) is compressed; None for a plain tar."""
    return next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)


def is_packed(url: str) -> bool:
    """Whether the name of ``url`` says that it is compressed."""
    return url.endswith((".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz"))


def open_unpacked(path: str) -> IO[bytes]:
    """The unpacked bytes of the local file ``path``; read errors are OSError, EOFError or
    LZMAError."""
    with open(path, "rb") as stream:
        kind = compression(stream.read(6))
    if kind == "gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if kind == "bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if kind == "xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    return open(path, "rb")
