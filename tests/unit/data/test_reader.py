"""Reading one sample: the same bytes by every way, and damage found whatever the way."""

import gzip
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain import storage
from pretrain.data import index as indexer
from pretrain.data.manifest import Manifest, members_of
from pretrain.data.reader import OPEN_FILES, ReadConfig, ShardReader
from pretrain.errors import DataError, UnreadableShard
from tests.unit.data.conftest import good, png, write_tar


def reader(url: str, **config: object) -> ShardReader:
    return ShardReader([Manifest.load(url)], ReadConfig(**config))  # type: ignore[arg-type]


def everything(url: str, **config: object) -> list[tuple[str, dict[str, bytes]]]:
    manifest, r = Manifest.load(url), reader(url, **config)
    found = []
    for shard, samples in enumerate(manifest.sizes.tolist()):
        for i in reversed(range(samples)):  # in no order that a stream could serve
            raw, rejects = r.read(0, shard, i)
            assert raw is not None and rejects == []
            found.append((raw.key, raw.files))
    r.close()
    return found


def test_every_way_gives_the_same_bytes(tmp_path: Path) -> None:
    members = [m for i in range(5) for m in good(f"k{i}", (i, 0, 0))]
    plain = write_tar(tmp_path / "0.tar", members)
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    for name in ("0.tar", "0.tar.gz"):
        storage.write_bytes(f"memory://ways/{name}", (tmp_path / name).read_bytes())
    places = [str(tmp_path / "0.tar"), str(tmp_path / "0.tar.gz")]
    places += ["memory://ways/0.tar", "memory://ways/0.tar.gz"]
    expected = None
    for number, place in enumerate(places):
        out = f"{place.rpartition('/')[0]}/{number}.json"
        indexer.build([place], out)
        for access in ("shard", "ranged"):
            found = everything(out, access=access, cache=str(tmp_path / "cache"))
            expected = expected or found
            assert found == expected, (place, access)
    assert expected is not None and len(expected) == 5
    assert dict(expected)["k3"]["txt"] == b"k3"


def test_what_was_refused_within_a_range_comes_with_its_sample(tmp_path: Path) -> None:
    link = tarfile.TarInfo("l.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [("../up.png", png()), *good("a"), link, *good("b"), ("a.txt", b"again")]
    out = str(tmp_path / "m.json")
    indexer.build([write_tar(tmp_path / "0.tar", members)], out)
    r = reader(out)
    first, rejects = r.read(0, 0, 0)
    assert first is not None and first.key == "a"
    assert sorted((x.reason, x.key) for x in rejects) == [
        ("link", "l.png"),
        ("unsafe member name", "../up.png"),
    ]
    second, rejects = r.read(0, 0, 1)
    assert second is not None and second.key == "b" and second.files["txt"] == b"b"
    assert [(x.reason, x.key) for x in rejects] == [("duplicate key", "a.txt")]


@pytest.mark.parametrize("access", ["shard", "ranged"])
@pytest.mark.parametrize("remote", [False, True])
def test_bytes_that_are_not_those_indexed_are_an_error(
    tmp_path: Path, access: str, remote: bool
) -> None:
    folder = "memory://changed-" + access if remote else str(tmp_path)
    local = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    data = bytearray(Path(local).read_bytes())
    storage.write_bytes(f"{folder}/0.tar", bytes(data))
    out = f"{folder}/m.json"
    indexer.build([f"{folder}/0.tar"], out)
    data[600] ^= 1  # within the first sample's first file; the size stays
    storage.write_bytes(f"{folder}/0.tar", bytes(data))
    r = reader(
        out, access=access, cache=str(tmp_path / "cache"), deadline_seconds=1, attempt_seconds=1
    )
    with pytest.raises(UnreadableShard, match=r"0\.tar") as caught:
        r.read(0, 0, 0)
    assert caught.value.url.endswith("0.tar")


def test_a_shard_of_another_size_or_none_is_named(
    corpus: Callable[..., str], tmp_path: Path
) -> None:
    url = corpus([2, 3])
    write_tar(tmp_path / "1.tar", [m for i in range(40) for m in good(f"x{i}")])
    r = reader(url)
    assert r.read(0, 0, 0)[0] is not None
    with pytest.raises(UnreadableShard, match=r"1\.tar.*bytes.*restore"):
        r.read(0, 1, 0)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(UnreadableShard, match=r"0\.tar.*does not exist"):
        reader(url).read(0, 0, 0)


def test_a_shard_once_given_up_is_not_waited_for_again(
    corpus: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = corpus([2])
    (tmp_path / "0.tar").unlink()
    r = reader(url)
    for _ in range(2):
        with pytest.raises(UnreadableShard):
            r.read(0, 0, 1)
        monkeypatch.setattr(r, "_file", lambda place: pytest.fail("it was tried again"))


def test_a_member_table_that_is_missing_or_of_another_manifest_is_named(
    corpus: Callable[..., str],
) -> None:
    url = corpus([2])
    table = Path(members_of(url))
    table.write_bytes(table.read_bytes() * 2)
    with pytest.raises(DataError, match=r"member table.*has 80 bytes.*need 40.*index"):
        reader(url)
    table.unlink()
    with pytest.raises(DataError, match=r"member table.*does not exist.*index"):
        reader(url)


def test_few_files_are_held_open(tmp_path: Path) -> None:
    urls = [write_tar(tmp_path / f"{s}.tar", good(f"s{s}")) for s in range(OPEN_FILES + 20)]
    out = str(tmp_path / "m.json")
    indexer.build(urls, out)
    before = len(os.listdir("/proc/self/fd"))
    r = reader(out)
    for shard in range(len(urls)):
        r.read(0, shard, 0)
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES + 1  # and the member table
    r.close()
    assert len(os.listdir("/proc/self/fd")) - before <= 1


def test_shards_come_into_the_cache_ahead_of_their_use(tmp_path: Path) -> None:
    local = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    storage.write_bytes("memory://ahead/0.tar", Path(local).read_bytes())
    indexer.build(["memory://ahead/0.tar"], "memory://ahead/m.json")
    r = reader("memory://ahead/m.json", cache=str(tmp_path / "cache"))
    r.ahead([(0, 0)])
    assert r._ahead._pool is not None
    r._ahead._pool.shutdown(wait=True)
    storage.write_bytes("memory://ahead/0.tar", b"gone")
    raw, _ = r.read(0, 0, 1)
    assert raw is not None and raw.key == "b"


def test_a_file_of_the_cache_that_a_power_cut_tore_is_fetched_again(tmp_path: Path) -> None:
    local = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    storage.write_bytes("memory://torn/0.tar", Path(local).read_bytes())
    indexer.build(["memory://torn/0.tar"], "memory://torn/m.json")
    cache = tmp_path / "cache"

    def rank() -> ShardReader:
        return reader("memory://torn/m.json", cache=str(cache))

    first = rank()
    assert first.read(0, 0, 0)[0] is not None
    (entry,) = cache.glob("*.shard")
    with entry.open("r+b") as stream:
        stream.write(bytes(entry.stat().st_size))  # as long as it was, of nothing but zeros
    others = [rank(), rank()]
    for other in others:
        other._file((0, 0))  # both have the torn file open
    torn, fetched = os.stat(entry).st_ino, set()
    for other in others:
        raw, _ = other.read(0, 0, 1)
        assert raw is not None and raw.key == "b"
        inode = os.stat(entry).st_ino
        assert inode != torn
        fetched.add(inode)
    assert len(fetched) == 1  # the second found what the first had fetched


def test_a_sample_that_is_not_the_indexed_one_is_fetched_again_once_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    storage.write_bytes("memory://wrong/0.tar", Path(local).read_bytes())
    indexer.build(["memory://wrong/0.tar"], "memory://wrong/m.json")
    table = bytearray(storage.read_bytes("memory://wrong/m.members"))
    table[12] ^= 1  # the first sample's CRC
    storage.write_bytes("memory://wrong/m.members", bytes(table))
    r = reader("memory://wrong/m.json", cache=str(tmp_path / "cache"))
    fetched = []
    parts = storage.read_parts
    monkeypatch.setattr(storage, "read_parts", lambda *a, **k: fetched.append(1) or parts(*a, **k))
    for _ in range(2):
        with pytest.raises(UnreadableShard, match="other bytes than were indexed"):
            r.read(0, 0, 0)
    assert len(fetched) == 2


def test_many_read_together_are_those_read_one_by_one(
    corpus: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = reader(corpus([3, 2, 4]))
    places = [(0, 2, 3), (0, 0, 0), (0, 1, 1), (0, 2, 0), (0, 2, 3)]
    expected = [r.read(*place) for place in places]
    for together in (1, 3000, 1 << 20):
        monkeypatch.setattr("pretrain.data.reader.TOGETHER_BYTES", together)
        assert list(r.read_many(places)) == expected
        assert len(list(r.read_groups(places))) == (1 if together == 1 << 20 else len(places))
    assert list(r.read_many([])) == []
