"""Indexing: what a row says of a sample, what is refused, and what a second run does not redo."""

import gzip
import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain import storage
from pretrain.data import index as indexer
from pretrain.data.manifest import ASPECTS, ROW, Manifest, members_of
from pretrain.errors import DataError
from tests.unit.data.conftest import good, png, write_tar


def rows_of(url: str) -> np.ndarray:
    return np.frombuffer(storage.read_bytes(members_of(url)), ROW)


def test_a_row_bounds_exactly_one_samples_members(tmp_path: Path) -> None:
    members = [*good("a"), ("b.txt", b"b"), ("b.png", png(size=(40, 20)))]
    path = write_tar(tmp_path / "0.tar", members)
    out = str(tmp_path / "m.json")
    found = indexer.build([path], out)
    assert found.manifest is not None and found.rejects == {}
    shard = found.manifest.shards[0]
    assert (shard.samples, shard.bytes) == (2, Path(path).stat().st_size)
    assert shard.sha256 == storage.sha256(path)
    data = Path(path).read_bytes()
    first, second = rows_of(out)
    assert first["offset"] == 0 and second["offset"] == first["bytes"]
    for row, names in ((first, ["a.json", "a.png", "a.txt"]), (second, ["b.txt", "b.png"])):
        run = data[row["offset"] : row["offset"] + row["bytes"]]
        assert row["crc32"] == zlib.crc32(run)
        with tarfile.open(fileobj=io.BytesIO(run)) as tar:
            assert tar.getnames() == names
    assert (second["width"], second["height"]) == (40, 20)
    assert shard.aspects[ASPECTS.index(2.0)] == 1 and shard.aspects[ASPECTS.index(1.0)] == 1


def test_a_turned_photograph_is_counted_as_it_is_seen(tmp_path: Path) -> None:
    from PIL import Image

    image, exif, stream = Image.new("RGB", (40, 20)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # held upright, sensor lying
    image.save(stream, "JPEG", exif=exif)
    path = write_tar(tmp_path / "0.tar", [("a.jpg", stream.getvalue()), ("a.txt", b"a")])
    indexer.build([path], str(tmp_path / "m.json"))
    (row,) = rows_of(str(tmp_path / "m.json"))
    assert (row["width"], row["height"]) == (20, 40)


@pytest.mark.parametrize("pack", [gzip.compress, __import__("bz2").compress])
def test_rows_of_a_compressed_tar_are_those_of_the_tar_inside(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    plain = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    packed = tmp_path / "0.tar.packed"
    packed.write_bytes(pack(Path(plain).read_bytes()))
    for name, path in (("plain", plain), ("packed", str(packed))):
        indexer.build([path], str(tmp_path / f"{name}.json"))
    a, b = (rows_of(str(tmp_path / f"{name}.json")) for name in ("plain", "packed"))
    assert (a == b).all()
    shard = Manifest.load(str(tmp_path / "packed.json")).shards[0]
    assert shard.unpacked == Path(plain).stat().st_size and shard.bytes == packed.stat().st_size


def test_what_is_no_part_of_a_sample_is_counted(tmp_path: Path) -> None:
    link = tarfile.TarInfo("l.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [("../up.png", png()), *good("a"), link, *good("b"), ("a.txt", b"again")]
    path = write_tar(tmp_path / "0.tar", members)
    found = indexer.build([path], str(tmp_path / "m.json"))
    assert found.manifest is not None and found.manifest.num_samples == 2
    assert found.rejects == {"unsafe member name": 1, "link": 1, "duplicate key": 1}
    first, second = rows_of(str(tmp_path / "m.json"))
    assert first["offset"] == 0  # what leads is met with the first sample
    assert second["offset"] == first["offset"] + first["bytes"]


def test_a_tar_cut_short_gives_what_is_whole(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "0.tar", [*good("a"), *good("b")]))
    cut = path.read_bytes()[: 512 * 7 + 100]  # in the second sample's json
    path.write_bytes(cut)
    found = indexer.build([str(path)], str(tmp_path / "m.json"))
    assert found.manifest is not None and found.manifest.num_samples == 1
    assert found.rejects == {"truncated tar": 1}


@pytest.mark.parametrize(
    "data",
    [b"", b"no tar", b"x" * 4096, gzip.compress(b"x" * 4096)[:-20]],
    ids=["empty", "short", "long", "cut gzip"],
)
def test_what_is_no_tar_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"0\.tar"):
        indexer.build([str(path)], str(tmp_path / "m.json"))


def test_a_missing_shard_and_one_listed_twice_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", good("a"))
    with pytest.raises(DataError, match=r"none\.tar.*does not exist"):
        indexer.build([path, str(tmp_path / "none.tar")], str(tmp_path / "m.json"))
    with pytest.raises(DataError, match="listed 2 times"):
        indexer.build([path, path], str(tmp_path / "m.json"))


def test_processes_parts_and_stops_change_nothing(tmp_path: Path) -> None:
    urls = [
        write_tar(tmp_path / f"{s}.tar", [m for i in range(s) for m in good(f"s{s}-{i}")])
        for s in range(6)
    ]
    alone, several, parts = (str(tmp_path / f"{n}.json") for n in ("alone", "several", "parts"))
    indexer.build(urls, alone, versions=False)
    indexer.build(urls, several, parallel=2, versions=False)
    for number in (1, 0):
        made = indexer.build(urls, parts, part=(number, 2), versions=False)
        assert made.manifest is None and not storage.exists(parts)
    indexer.build(urls, parts, versions=False)
    for other in (several, parts):
        assert Path(other).read_bytes() == Path(alone).read_bytes()
        assert storage.read_bytes(members_of(other)) == storage.read_bytes(members_of(alone))
    assert not list(tmp_path.glob("*.indexing"))


def test_a_second_run_reads_only_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [write_tar(tmp_path / f"{s}.tar", good(f"s{s}")) for s in range(3)]
    out = str(tmp_path / "m.json")
    indexer.build(urls, out)
    write_tar(tmp_path / "1.tar", [*good("new"), *good("more")])
    urls.append(write_tar(tmp_path / "3.tar", good("s3")))
    read: list[str] = []
    real = indexer.index_shard
    monkeypatch.setattr(
        indexer, "index_shard", lambda url, retry=None: read.append(url) or real(url, retry)
    )
    found = indexer.build(urls, out)
    assert read == [urls[1], urls[3]] and found.reused == 2
    assert Manifest.load(out).sizes.tolist() == [1, 2, 1, 1]
    monkeypatch.undo()
    indexer.build(urls, str(tmp_path / "anew.json"))
    assert (rows_of(out) == rows_of(str(tmp_path / "anew.json"))).all()


def test_a_killed_run_is_taken_up_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [write_tar(tmp_path / f"{s}.tar", good(f"s{s}")) for s in range(4)]
    out = str(tmp_path / "m.json")
    real, read = indexer.index_shard, list[str]()

    def dies_at_third(url: str, retry: object = None) -> object:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(url)
        return real(url)

    monkeypatch.setattr(indexer, "index_shard", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        indexer.build(urls, out)
    assert not storage.exists(out)
    monkeypatch.setattr(
        indexer, "index_shard", lambda url, retry=None: read.append(url) or real(url)
    )
    indexer.build(urls, out)
    assert Counter(read) == Counter(urls)  # none twice
    assert Manifest.load(out).num_samples == 4


def test_patterns_name_shards_in_order(tmp_path: Path) -> None:
    for s in (2, 0, 1):
        write_tar(tmp_path / f"{s:05d}.tar", good(f"s{s}"))
    expected = [str(tmp_path / f"{s:05d}.tar") for s in range(3)]
    assert indexer.expand([str(tmp_path / "{00000..00002}.tar")]) == expected
    assert indexer.expand([str(tmp_path / "*.tar")]) == expected
    with pytest.raises(DataError, match="matches no file"):
        indexer.expand([str(tmp_path / "*.zip")])


def test_shards_in_an_object_store_are_indexed_beside_themselves(tmp_path: Path) -> None:
    local = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    storage.write_bytes("memory://indexed/0.tar", Path(local).read_bytes())
    found = indexer.build(["memory://indexed/0.tar"], "memory://indexed/m.json")
    assert found.manifest is not None
    loaded = Manifest.load("memory://indexed/m.json")
    assert loaded.shards[0].url == "0.tar" and loaded.shards[0].sha256 == storage.sha256(local)
    assert len(rows_of("memory://indexed/m.json")) == 2
