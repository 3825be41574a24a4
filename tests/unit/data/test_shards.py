"""Manifests and shards: what is damaged or hostile is refused and named."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from pretrain import storage
from pretrain.data import manifest
from pretrain.data.manifest import Manifest
from pretrain.data.shards import ShardCache, read_shard
from pretrain.errors import DataError
from tests.unit.data.conftest import good, write_tar


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of a file system that is not the local one."""
    folder = "memory://corpus"
    yield folder
    fsspec.filesystem("memory").rm("/corpus", recursive=True)


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def test_members_that_leave_the_archive_and_links_are_refused(tmp_path: Path) -> None:
    members = [
        *good("a"),
        ("../x.png", b"x"),
        ("b/../../y.png", b"y"),
        ("/z.png", b"z"),
        link("c.png", tarfile.SYMTYPE),
        link("d.png", tarfile.LNKTYPE),
        *good("e"),
    ]
    url = write_tar(tmp_path / "0.tar", members)
    samples, rejects = read_shard(url, Path(url).read_bytes())
    assert [s.key for s in samples] == ["a", "e"]
    assert {(r.key, r.reason) for r in rejects} == {
        ("../x.png", "unsafe member name"),
        ("b/../../y.png", "unsafe member name"),
        ("/z.png", "unsafe member name"),
        ("c.png", "link"),
        ("d.png", "link"),
    }


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.9])
def test_a_cut_or_foreign_shard_is_an_error_with_its_name(tmp_path: Path, keep: float) -> None:
    url = write_tar(tmp_path / "0.tar.gz", [m for i in range(40) for m in good(f"k{i}")])
    import gzip

    data = gzip.compress(Path(url).read_bytes())
    cut = data[: int(len(data) * keep)] or b"not a tar"
    with pytest.raises(DataError, match=r"0\.tar\.gz.*not a whole tar"):
        read_shard(url, cut)


def test_save_and_load_keep_the_shards(corpus: Callable[..., str], tmp_path: Path) -> None:
    loaded = Manifest.load(corpus([2, 3]))
    assert [s.samples for s in loaded.shards] == [2, 3]
    assert [s.url for s in loaded.shards] == ["0.tar", "1.tar"]
    assert loaded.num_samples == 5
    assert all(storage.sha256(loaded.url(s)) == s.sha256 for s in loaded.shards)


def test_a_moved_corpus_still_loads(corpus: Callable[..., str], tmp_path: Path) -> None:
    before = Manifest.load(corpus([2]))
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    after = Manifest.load(str(moved / "manifest.json"))
    assert after.fingerprint == before.fingerprint
    assert ShardCache(after, 1).get(0, 1)[0].key == "s0-1"


def test_the_fingerprint_is_of_content_and_order(corpus: Callable[..., str]) -> None:
    loaded = Manifest.load(corpus([2, 3]))
    assert Manifest(loaded.shards[::-1], loaded.folder).fingerprint != loaded.fingerprint


@pytest.mark.parametrize("out", ["lists/m.json", "m.json", "./shards/m.json"])
@pytest.mark.parametrize("shard", ["shards/0.tar", "./shards/0.tar"])
def test_an_index_finds_its_shards_wherever_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, shard: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "shards/0.tar", good("a"))
    manifest.build([shard], str(Path(out).parent)).save(out)
    monkeypatch.chdir(tmp_path.parent)
    loaded = Manifest.load(str(tmp_path / out))
    assert ShardCache(loaded, 1).get(0, 0)[0].key == "a"


def test_a_changed_shard_is_named_on_first_read(corpus: Callable[..., str], tmp_path: Path) -> None:
    loaded = Manifest.load(corpus([2, 3]))
    write_tar(tmp_path / "1.tar", good("other"))
    cache = ShardCache(loaded, 2)
    cache.get(0, 0)
    with pytest.raises(DataError, match=r"1\.tar.*sha256.*restore"):
        cache.get(1, 0)


def test_a_missing_shard_is_named(corpus: Callable[..., str], tmp_path: Path) -> None:
    loaded = Manifest.load(corpus([2]))
    (tmp_path / "0.tar").unlink()
    with pytest.raises(DataError, match=r"0\.tar.*does not exist"):
        ShardCache(loaded, 1).get(0, 0)


def test_a_count_that_is_not_the_manifests_is_an_error(
    corpus: Callable[..., str], tmp_path: Path
) -> None:
    url = corpus([3])
    tree = json.loads(Path(url).read_text())
    tree["shards"][0]["samples"] = 4
    Path(url).write_text(json.dumps(tree))
    with pytest.raises(DataError, match="holds 3 samples, the manifest says 4"):
        ShardCache(Manifest.load(url), 1).get(0, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        ('{"schema": 1, "shards": [{"url": "x"}]}', "not a manifest"),
        ('{"schema": 9, "shards": []}', "schema 9"),
        ('{"schema": 1, "shards": []}', "no sample"),
    ],
)
def test_a_bad_manifest_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        Manifest.load(str(path))


def test_a_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data index"):
        Manifest.load(str(tmp_path / "none.json"))


def test_the_cache_keeps_the_last_few_and_reads_each_once(
    corpus: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(Manifest.load(corpus([2, 2, 2])), 2)
    read: list[str] = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda url: read.append(url[-5:]) or real(url))
    for shard in (0, 1, 0, 1, 2, 1, 0):
        cache.get(shard, 0)
    assert read == ["0.tar", "1.tar", "2.tar", "0.tar"]


def test_shards_in_an_object_store_are_read(memory: str, tmp_path: Path) -> None:
    local = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    storage.write_bytes(f"{memory}/0.tar", Path(local).read_bytes())
    manifest.build([f"{memory}/0.tar"], memory).save(f"{memory}/m.json")
    loaded = Manifest.load(f"{memory}/m.json")
    assert loaded.shards[0].url == "0.tar"
    assert ShardCache(loaded, 1).get(0, 1)[0].key == "b"


def test_an_empty_shard_has_no_samples() -> None:
    stream = io.BytesIO()
    tarfile.open(fileobj=stream, mode="w").close()
    assert read_shard("empty.tar", stream.getvalue()) == ([], [])
