"""Members of an unpacked tar as samples; names as webdataset reads them, odd members refused.

Headers are read here and not by tarfile, which takes 20 times as long and treats damage in the
middle of an archive as its end.
"""

import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple

from webdataset.tariterators import base_plus_ext

from pretrain.errors import DataError
from pretrain.types import Reject

MemberReason = Literal[
    "unsafe member name",
    "link",
    "not a file",
    "too many bytes",
    "too many members",
    "no extension",
    "duplicate key",
    "duplicate member",
]
BLOCK = 512
# Of all extension headers of one member: a path has 4 KiB at most, extended attributes a few more.
_MAX_EXTENSION_BYTES = 1 << 16
_DISCARD_BYTES = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
# What unpackers raise on damaged bytes.
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, tarfile.TarError)
_META = re.compile(r"__[^/]*__(?:$|/)")
# A name with nothing to look at twice: parts of letters, digits, dashes, one dot.
_PLAIN_NAME = re.compile(rb"((?:[A-Za-z0-9][\w-]*/)*[A-Za-z0-9][\w-]*)\.(\w+)\0")
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


@dataclass(frozen=True)
class RawSample:
    """One sample's files, by extension in lower case, as bytes."""

    key: str
    shard: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class MemberBounds:
    """Largest file of a sample that is read at all, and the most files a sample may have."""

    max_member_bytes: int = 64 << 20
    max_members: int = 64


class Member(NamedTuple):
    """One file of a tar.

    Attributes:
        name: as stored.
        key, extension: of the sample, and of the file in it; empty where it is refused by its name.
        start: offset of the first header, extension headers included.
        end: offset past the padded data.
        refused: why it is no part of a sample, or None.
        data: the content; empty where it is refused.
    """

    name: str
    key: str
    extension: str
    start: int
    end: int
    refused: MemberReason | None
    data: bytes


def key_of(name: str) -> tuple[str | None, str]:
    """A member's sample key, and its extension in lower case: all that follows the first dot of the
    file's name. The key is None where there is no dot."""
    key, extension = base_plus_ext(name)
    return (None, "") if key is None else (key, extension.lower())


def read_members(
    url: str, data: bytes, bounds: MemberBounds
) -> tuple[list[RawSample], list[Reject]]:
    """All samples in a run of whole tar members, in order, and the members that were refused.

    A sample whose every member was refused does not exist. ``data`` may end with or without the
    blocks that end an archive.

    Raises:
        DataError: the bytes are not whole members.
    """
    return _grouped(url, iter_members(io.BytesIO(data), bounds, url))


def read_sample(
    url: str, data: bytes, bounds: MemberBounds
) -> tuple[RawSample | None, list[Reject]]:
    """The one sample in its own run of members, and what was refused in the run.

    A run ends where the next sample begins, so any other key in it belongs to a sample that came
    before in the shard: a duplicate, just as a walk over the whole shard finds it.

    Raises:
        DataError: the bytes are not whole members.
    """
    plain = _plain_sample(url, data, bounds)
    if plain is not None:
        return plain, []
    members = iter_members(io.BytesIO(data), bounds, url, one_sample=True)
    samples, rejects = _grouped(url, members)
    return (samples[0] if samples else None), rejects


def _plain_sample(url: str, data: bytes, bounds: MemberBounds) -> RawSample | None:
    """The sample of a run without anything odd, in a fifth of the time; None: to be looked at
    closely."""
    at = 0
    key: bytes | None = None
    files: dict[str, bytes] = {}
    while at < len(data):
        name = _PLAIN_NAME.match(data, at, at + 100)
        head = data[at : at + BLOCK]
        if name is None or len(head) < BLOCK or head[156] not in b"0\0" or head[345]:
            return None
        try:
            size = -1 if head[124] & 0x80 or not _sums_up(head) else _octal(head[124:136])
        except ValueError:
            return None
        start, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        extension = name[2].decode().lower()
        if not 0 <= size <= bounds.max_member_bytes or at > len(data) or extension in files:
            return None
        if (key is not None and key != name[1]) or len(files) >= bounds.max_members:
            return None
        key, files[extension] = name[1], data[start : start + size]
    return None if key is None else RawSample(key.decode(), url, files)


def _grouped(url: str, members: Iterator[Member]) -> tuple[list[RawSample], list[Reject]]:
    samples: list[RawSample] = []
    rejects: list[Reject] = []
    for member in members:
        if member.refused is not None:
            rejects.append(Reject(member.refused, url, printable(member.name)))
        elif not samples or samples[-1].key != member.key:
            samples.append(RawSample(member.key, url, {member.extension: member.data}))
        else:
            samples[-1].files[member.extension] = member.data
    return samples, rejects


def iter_members(
    stream: IO[bytes], bounds: MemberBounds, url: str = "", *, one_sample: bool = False
) -> Iterator[Member]:
    """Every file of the unpacked tar that ``stream`` gives, read forward to the end of the archive.

    Directories, hidden files and webdataset's own ``__name__`` files are passed over. One member's
    bytes are held at a time, and of a refused member none. A key that returns after another key is
    refused ("duplicate key"), and so is an extension that a sample has already ("duplicate
    member"): the first stands. With ``one_sample`` any key but the first is a duplicate.

    Raises:
        DataError: the stream is not a tar, is damaged, or is cut short; it names ``url``.
    """
    seen: set[str] = set()
    current = ""
    extensions: set[str] = set()
    for name, start, data_start, size, kind in iter_headers(stream, url):
        end = data_start + (0 if kind in _WITHOUT_DATA else -(-size // BLOCK) * BLOCK)
        refused: MemberReason | None = None
        wanted, key, extension = True, "", ""
        if kind == b"5":
            wanted = False
        elif _unsafe(name):
            refused = "unsafe member name"
        elif kind in _LINKS:
            refused = "link"
        elif kind not in _REGULAR:
            refused = "not a file"
        elif size > bounds.max_member_bytes:
            refused = "too many bytes"
        elif _META.match(name) or name.rpartition("/")[2].startswith("."):
            wanted = False
        else:
            found, extension = key_of(name)
            key = found or ""
            if found is None:
                refused = "no extension"
            elif key != current and (key in seen or (one_sample and current)):
                refused = "duplicate key"
            elif key == current and extension in extensions:
                refused = "duplicate member"
            elif key == current and len(extensions) >= bounds.max_members:
                refused = "too many members"
        if not wanted or refused:
            _skip(stream, end - data_start, url)
            if refused:
                yield Member(name, key, extension, start, end, refused, b"")
            continue
        if key != current:
            current, extensions = key, set()
            seen.add(key)
        extensions.add(extension)
        data = _exactly(stream, size, url)
        _exactly(stream, end - data_start - size, url)
        yield Member(name, key, extension, start, end, None, data)


def _unsafe(name: str) -> bool:
    """Absolute, with a drive, a backslash, a NUL or a `..` part, or of bytes that are not UTF-8."""
    if name.startswith("/") or "\\" in name or "\0" in name:
        return True
    if ".." in name and ".." in name.split("/"):
        return True
    if name[1:2] == ":" and name[0].isalpha():
        return True
    return not name.isascii() and name != printable(name)


def iter_headers(stream: IO[bytes], url: str = "") -> Iterator[tuple[str, int, int, int, bytes]]:
    """(name, offset of the first header, offset of the data, size in bytes, type) of every member.

    Whoever takes a header reads the member's padded data from ``stream`` before the next; links,
    devices and directories (types 1 to 6) have none. Names of extension headers (GNU, pax) are
    applied; a pax file of global fields is passed over, and a sparse file has type ``S``.

    Raises:
        DataError: as `iter_members`.
    """
    at = 0
    while True:
        start = at
        name, size = None, None
        sparse, extension_bytes = False, 0
        while True:
            block = _read(stream, BLOCK, url)
            if not block and start == at:
                return  # no blocks at the end: so is a run of members, and many a writer's tar
            if len(block) < BLOCK:
                raise _damaged(url, f"it ends in a header at byte {at:,}")
            if block[0] == 0 and block.count(0) == BLOCK:
                return
            at += BLOCK
            short_name, own_size, kind = _parse(block, url, at - BLOCK)
            if kind == b"g":
                at += _skip(stream, -(-own_size // BLOCK) * BLOCK, url)
                start = at if not extension_bytes else start
                continue
            if kind not in (b"x", b"X", b"L", b"K"):
                break
            extension_bytes += BLOCK + own_size
            if extension_bytes > _MAX_EXTENSION_BYTES:
                raise _damaged(url, f"the extension headers at byte {start:,} are too long")
            payload = _exactly(stream, own_size, url)
            at += own_size + _skip(stream, -own_size % BLOCK, url)
            if kind == b"L":
                name = payload.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif kind != b"K":
                fields = _pax(payload, url, start)
                name = fields.get("path", name)
                sparse = sparse or any(f.startswith("GNU.sparse.") for f in fields)
                if "size" in fields:
                    size = _number(fields["size"], url, start)
        if kind == b"S":
            extended = block[482]
            while extended:
                extended = _exactly(stream, BLOCK, url)[504]
                at += BLOCK
        elif sparse:
            kind = b"S"
        size = own_size if size is None else size
        yield name if name is not None else short_name, start, at, size, kind
        at += 0 if kind in _WITHOUT_DATA else -(-size // BLOCK) * BLOCK


def _parse(block: bytes, url: str, at: int) -> tuple[str, int, bytes]:
    """Name, size in bytes and type of a header block."""
    try:
        if not _sums_up(block):
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # old sums: signed bytes
        size = tarfile.nti(block[124:136]) if block[124] & 0x80 else _octal(block[124:136])  # type: ignore[attr-defined]
    except (ValueError, tarfile.TarError):
        raise _damaged(url, f"byte {at:,} is no header") from None
    if size < 0:  # tarfile before 3.11.14 goes round in circles
        raise _damaged(url, f"the header at byte {at:,} gives a size below zero")
    name = block[:100].split(b"\0", 1)[0]
    kind = block[156:157]
    # GNU's own kind of header ("ustar ") keeps times where ustar keeps the start of a long name.
    if block[345] and block[257:263] != b"ustar ":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    if kind == b"\0" and name.endswith(b"/"):
        kind = b"5"
    return name.decode("utf-8", "surrogateescape"), size, kind


def _sums_up(block: bytes) -> bool:
    """Whether a header's sum is that of its bytes; ValueError if it is no number."""
    stored = int(block[148:156].rstrip(b" \0"), 8)
    # Of all bytes, with blanks for its own field. The low half of Adler's check is one more than
    # their sum, modulo a prime; it takes a tenth of the time of sum().
    expected = stored - 8 * 32 + sum(block[148:156]) + 1
    return expected % 65_521 == zlib.adler32(block) & 0xFFFF


def _octal(field: bytes) -> int:
    return int(field.strip(b" \0") or b"0", 8)


def _pax(payload: bytes, url: str, at: int) -> dict[str, str]:
    """The records ``LENGTH FIELD=VALUE\\n`` of a pax header."""
    fields: dict[str, str] = {}
    place = 0
    while place < len(payload) and payload[place]:
        record = _PAX_RECORD.match(payload, place)
        end = place + int(record[1]) if record else 0
        if record is None or end <= record.end() or payload[end - 1 : end] != b"\n":
            raise _damaged(url, f"the pax header at byte {at:,} is malformed")
        field = record[2].decode("utf-8", "surrogateescape")
        fields[field] = payload[record.end() : end - 1].decode("utf-8", "surrogateescape")
        place = end
    return fields


def _number(text: str, url: str, at: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _damaged(url, f"the pax header at byte {at:,} gives size {text[:20]!r}")
    return int(text)


def _read(stream: IO[bytes], count: int, url: str) -> bytes:
    """``count`` bytes, or what is left."""
    try:
        data = stream.read(count)
        while 0 < len(data) < count and (more := stream.read(count - len(data))):
            data += more
        return data
    except _DAMAGE as error:
        raise _damaged(url, str(error)) from error


def _exactly(stream: IO[bytes], count: int, url: str) -> bytes:
    if not count:
        return b""
    data = _read(stream, count, url)
    if len(data) < count:
        raise _damaged(url, "it is cut short in a member")
    return data


def _skip(stream: IO[bytes], count: int, url: str) -> int:
    """Read past ``count`` bytes, in pieces; returns ``count``."""
    left = count
    while left:
        left -= len(_exactly(stream, min(left, _DISCARD_BYTES), url))
    return count


def _damaged(url: str, why: str) -> DataError:
    return DataError(f"shard={url!r} is not a whole tar file ({why}); fetch or write it again")


def printable(name: str) -> str:
    """A member's name as UTF-8 can write it."""
    return name.encode("utf-8", "backslashreplace").decode()
