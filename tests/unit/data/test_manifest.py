"""Manifests: what is kept, what is refused, and how large they may become."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain import storage
from pretrain.data import index as indexer
from pretrain.data.manifest import ASPECTS, ROW, Manifest, Shard, Shards, aspect_of
from pretrain.errors import DataError
from tests.unit.data.conftest import ROOT, good, write_tar


def test_save_and_load_keep_every_field(tmp_path: Path) -> None:
    aspects = tuple(range(len(ASPECTS)))
    shards = [
        Shard("a.tar", 36, 10_240, "0" * 64, aspects, 0, "10240-abc"),
        Shard("s3://b/ü {x}.tar.gz", 0, 1 << 40, "f" * 64, (0,) * len(ASPECTS), 1 << 41, ""),
        Shard("c.tar", 5, 7, "1" * 64, (0,) * len(ASPECTS)),
    ]
    url = str(tmp_path / "m.json")
    Manifest(Shards(shards), str(tmp_path)).save(url)
    loaded = Manifest.load(url)
    assert list(loaded.shards) == shards and len(loaded.shards) == 3
    assert loaded.shards[-1] == shards[-1] and loaded.shards[:2] == shards[:2]
    assert loaded.sizes.tolist() == [36, 0, 5] and loaded.starts.tolist() == [0, 36, 36, 41]
    assert loaded.num_samples == 41
    assert [loaded.url(i) for i in range(3)] == [
        str(tmp_path / "a.tar"),
        "s3://b/ü {x}.tar.gz",
        str(tmp_path / "c.tar"),
    ]


def test_the_fingerprint_is_of_content_and_order(corpus: Callable[..., str]) -> None:
    loaded = Manifest.load(corpus([2, 3]))
    turned = Manifest(Shards(loaded.shards[::-1]), loaded.folder)
    assert turned.fingerprint != loaded.fingerprint
    moved = Manifest(loaded.shards, "/elsewhere")
    assert moved.fingerprint == loaded.fingerprint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        ('{"schema": 2, "shards": [{"url": "x"}]}', "not a manifest"),
        ('{"schema": 1, "shards": []}', "schema 1.*data index"),
        ('{"schema": 2, "shards": {"url": ["a"]}}', "not a manifest"),
    ],
)
def test_a_bad_manifest_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        Manifest.load(str(path))


def test_columns_of_unequal_length_are_no_manifest(corpus: Callable[..., str]) -> None:
    url = corpus([2, 3])
    tree = json.loads(Path(url).read_text())
    tree["shards"]["bytes"].pop()
    Path(url).write_text(json.dumps(tree))
    with pytest.raises(DataError, match="columns differ in length"):
        Manifest.load(url)


def test_a_manifest_of_empty_shards_lists_no_sample(tmp_path: Path) -> None:
    url = str(tmp_path / "m.json")
    Manifest(Shards([Shard("a.tar", 0, 10_240, "0" * 64)]), str(tmp_path)).save(url)
    with pytest.raises(DataError, match="lists no sample"):
        Manifest.load(url)


def test_a_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data index"):
        Manifest.load(str(tmp_path / "none.json"))


@pytest.mark.parametrize("out", ["lists/m.json", "m.json", "./shards/m.json"])
@pytest.mark.parametrize("shard", ["shards/0.tar", "./shards/0.tar"])
def test_an_index_finds_its_shards_wherever_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, shard: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "shards/0.tar", good("a"))
    indexer.build([shard], out)
    monkeypatch.chdir(tmp_path.parent)
    loaded = Manifest.load(str(tmp_path / out))
    assert storage.sha256(loaded.url(0)) == loaded.shards[0].sha256


@pytest.mark.parametrize(
    ("width", "height", "aspect"),
    [(0, 0, 1.0), (64, 64, 1.0), (128, 64, 2.0), (9000, 10, 2.0), (30, 40, 3 / 4), (16, 9, 16 / 9)],
)
def test_a_picture_is_counted_under_the_nearest_aspect(
    width: int, height: int, aspect: float
) -> None:
    rows = np.zeros(1, ROW)
    rows["width"], rows["height"] = width, height
    assert ASPECTS[int(aspect_of(rows)[0])] == aspect


def test_a_hundred_thousand_shards_load_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """Measured here: 1.0 s and 130 MiB at the peak of parsing, 40 MiB kept (two slow cores)."""
    url = tmp_path / "m.json"
    n = 100_000
    columns = {
        "url": [f"s3://bucket/some/prefix/{i:06d}.tar" for i in range(n)],
        "sha256": [f"{i:064x}" for i in range(n)],
        "version": [f"1073741824-{i:032x}" for i in range(n)],
        "samples": [10_000] * n,
        "bytes": [1 << 30] * n,
        "unpacked": [0] * n,
        "aspects": [[1_000, 1_000, 1_000, 1_000, 2_000, 1_000, 1_000, 1_000, 1_000]] * n,
    }
    url.write_text(json.dumps({"schema": 2, "shards": columns}))
    script = f"""
import resource, time
from pretrain.data.manifest import Manifest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
m = Manifest.load({str(url)!r})
assert m.num_samples == 10**9 and m.fingerprint
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time() - began, (after - before) / 1024)
import pickle
print(len(pickle.dumps(m)) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, peak_mib, kept_mib = map(float, done.stdout.split())
    assert seconds < 5
    assert peak_mib < 400 and kept_mib < 60
