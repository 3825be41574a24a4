"""Bytes by URL: whole or not there, local and remote alike."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pretrain import storage
from pretrain.errors import DataError


@pytest.fixture(params=["local", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder that does not exist yet, on each kind of file system."""
    if request.param == "memory://":
        yield "memory://store/a"
        if fsspec.filesystem("memory").exists("/store"):
            fsspec.filesystem("memory").rm("/store", recursive=True)
        return
    yield f"{'file://' if request.param == 'file://' else ''}{tmp_path}/a"


def test_what_is_written_is_read_and_replaced(folder: str) -> None:
    url = storage.join(folder, "b", "c.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"one")
    assert storage.exists(url) and storage.read_bytes(url) == b"one"
    storage.write_bytes(url, b"a longer second text")
    assert storage.read_bytes(url) == b"a longer second text"
    with storage.open_read(url) as stream:
        assert stream.read(2) == b"a "


def test_hashes_are_of_all_bytes_in_any_chunks(folder: str) -> None:
    url, data = storage.join(folder, "x"), os.urandom(1000)
    storage.write_bytes(url, data)
    expected = hashlib.sha256(data).hexdigest()
    assert storage.sha256_bytes(data) == expected
    assert {storage.sha256(url, chunk) for chunk in (1, 7, 1000, 4096)} == {expected}


def test_what_is_missing_is_an_error_of_its_kind(folder: str) -> None:
    for read in (storage.read_bytes, storage.sha256):
        with pytest.raises(FileNotFoundError):
            read(storage.join(folder, "none"))


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("/a/b", False),
        ("a/b", False),
        ("file:///a", False),
        ("memory://a", True),
        ("s3://bucket/a", True),
        ("https://host/a", True),
    ],
)
def test_remote_is_what_is_not_on_this_machine(url: str, remote: bool) -> None:
    assert storage.is_remote(url) == remote


def test_join_does_not_double_slashes() -> None:
    assert storage.join("s3://b/", "c", "d") == "s3://b/c/d"
    assert storage.join("a", "b") == "a/b"


def test_a_write_that_fails_leaves_the_old_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    storage.write_bytes(str(path), b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(path), b"new, never complete")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_no_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(tmp_path / "x"), b"new")
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_on_disk_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    storage.write_bytes(str(tmp_path / "x"), b"new")
    assert order == ["fsync", "rename"]


def test_ranges_sizes_and_parts(folder: str) -> None:
    url, data = storage.join(folder, "x"), os.urandom(1000)
    storage.write_bytes(url, data)
    assert storage.size(url) == 1000
    for start, end in ((0, 1000), (0, 1), (999, 1000), (400, 700), (5, 5), (1000, 1000)):
        assert storage.read_range(url, start, end) == data[start:end]
    for part in (1, 300, 1000, 5000):
        assert b"".join(storage.read_parts(url, 1000, part_bytes=part)) == data
    with pytest.raises(ValueError, match="start=7"):
        storage.read_range(url, 7, 3)


def test_another_length_than_indexed_is_an_error(folder: str) -> None:
    url = storage.join(folder, "x")
    storage.write_bytes(url, bytes(1000))
    with pytest.raises(DataError, match=r"1000 bytes.*1001"):
        storage.read_range(url, 990, 1001)
    for wrong in (999, 1001):
        with pytest.raises(DataError, match=f"1000 bytes, {wrong} were indexed"):
            list(storage.read_parts(url, wrong))


def test_fetch_copies_and_says_the_hash(folder: str, tmp_path: Path) -> None:
    url, data = storage.join(folder, "x"), os.urandom(1000)
    storage.write_bytes(url, data)
    expected, path = hashlib.sha256(data).hexdigest(), tmp_path / "copy" / "x"
    assert storage.fetch(url, str(path), 1000, part_bytes=64, sha256=expected) == expected
    assert path.read_bytes() == data
    with pytest.raises(FileNotFoundError):
        storage.fetch(storage.join(folder, "none"), str(path))
    with pytest.raises(DataError, match="sha256"):
        storage.fetch(url, str(path), sha256="0" * 64)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1


def test_a_file_is_put_whole(folder: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"some bytes")
    storage.put_file(str(tmp_path / "source"), storage.join(folder, "b", "x"))
    assert storage.read_bytes(storage.join(folder, "b", "x")) == b"some bytes"


def test_a_folder_exists_and_has_no_bytes(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "b", "x"), b"1")
    assert storage.exists(storage.join(folder, "b"))
    with pytest.raises((DataError, IsADirectoryError)):
        storage.read_bytes(storage.join(folder, "b"))
