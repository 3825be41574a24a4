"""Samples from a real S3 server through a network that fails: all of them, none twice, or a clear
error."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain import config as configs
from pretrain.data import index as indexer
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.manifest import Manifest
from pretrain.data.reader import ReadConfig, ShardReader
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError, UnreadableShard
from tests.support.faultproxy import FaultProxy, Weather
from tests.support.s3 import S3Server
from tests.unit.data.conftest import ROOT, good, write_tar
from tests.unit.data.conftest import small_tokenizer as small_tokenizer

pytestmark = pytest.mark.cluster

STORM = Weather(p_503=0.3, p_reset=0.2, p_truncate=0.2, p_stall=0.03, stall_seconds=1.5)
QUICK = {"deadline_seconds": 60, "attempt_seconds": 0.7}
SIZES = [5, 0, 9, 3, 7, 1, 6, 4, 8, 2, 5, 6, 4, 4]


@pytest.fixture(scope="module")
def shards(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """(s3 URL, local path) of each shard."""
    folder = tmp_path_factory.mktemp("shards")
    made = []
    for s, n in enumerate(SIZES):
        path = write_tar(folder / f"{s:05d}.tar", [m for i in range(n) for m in good(f"s{s}-{i}")])
        made.append((s3.put(f"loader/{s:05d}.tar", Path(path).read_bytes()), path))
    return made


def hashes(url: str, read: ReadConfig) -> dict[str, str]:
    """Key -> SHA-256 of a sample's files, for every sample of a manifest."""
    manifest = Manifest.load(url, read.retry)
    reader, found = ShardReader([manifest], read), {}
    for shard, samples in enumerate(manifest.sizes.tolist()):
        for i in range(samples):
            raw, rejects = reader.read(0, shard, i)
            assert raw is not None and not rejects and raw.key not in found
            text = b"\0".join(name.encode() + data for name, data in sorted(raw.files.items()))
            found[raw.key] = hashlib.sha256(text).hexdigest()
    return found


@pytest.mark.parametrize("access", ["ranged", pytest.param("shard", marks=pytest.mark.soak)])
def test_every_sample_arrives_through_a_storm_with_its_own_bytes(
    proxy: FaultProxy, shards: Sequence[tuple[str, str]], tmp_path: Path, access: str
) -> None:
    if access == "ranged":
        shards = shards[:5]  # a request a sample
    local = str(tmp_path / "local.json")
    indexer.build([path for _, path in shards], local)
    expected = hashes(local, ReadConfig())
    proxy.weather = STORM
    read = ReadConfig(**QUICK, access=access, cache=str(tmp_path / "cache"))  # type: ignore[arg-type]
    out = f"s3://{S3Server.BUCKET}/loader/{access}.json"
    # Indexing goes through the storm too, and finds what it finds on disk.
    made = indexer.build([url for url, _ in shards], out, retry=read.retry)
    assert made.manifest is not None
    assert made.manifest.fingerprint == Manifest.load(local).fingerprint
    assert hashes(out, read) == expected and len(expected) == sum(SIZES[: len(shards)])
    assert proxy.counts["503"] > 3 and proxy.counts["reset"] > 1 and proxy.counts["truncate"] > 0


def test_an_epoch_through_a_storm_is_exact_on_ranks_and_workers(
    proxy: FaultProxy, shards: Sequence[tuple[str, str]], tmp_path: Path, small_tokenizer: str
) -> None:
    out = f"s3://{S3Server.BUCKET}/loader/epoch.json"
    indexer.build([url for url, _ in shards], out)
    proxy.weather = STORM
    tree = {
        "train": out,
        "tokenizer": small_tokenizer,
        "size": 8,
        "tokens": 8,
        "workers": 2,
        "read": {**QUICK, "cache": str(tmp_path / "cache")},
        "order": {"lanes": 2, "window": 32},
    }
    batch, world = 8, 2
    steps = sum(SIZES) // batch
    assert steps * batch == sum(SIZES)
    # A process of its own: workers get the environment (the proxy's address) of the fork server,
    # which an earlier test may have started here.
    script = f"""
import json
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.tokenizer import Tokenizer
config = DataConfig(**{tree!r})
keys = []
for rank in range({world}):
    batches = iter(Loader(config, Tokenizer(config.tokenizer), 3, {batch}, rank, {world}))
    keys += [key for _ in range({steps}) for key in next(batches).keys]
print(json.dumps(keys))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    keys = json.loads(done.stdout.splitlines()[-1])
    assert sorted(keys) == sorted(f"s{s}-{i}" for s, n in enumerate(SIZES) for i in range(n))


def test_a_server_that_is_down_is_named_within_the_deadline_and_waited_for_inside_it(
    proxy: FaultProxy, shards: Sequence[tuple[str, str]], tmp_path: Path, small_tokenizer: str
) -> None:
    out = f"s3://{S3Server.BUCKET}/loader/down.json"
    indexer.build([url for url, _ in shards], out)
    tree = {"train": out, "tokenizer": small_tokenizer, "size": 8, "tokens": 8}

    def loader(folder: str, deadline: float) -> Loader:
        read = {"deadline_seconds": deadline, "attempt_seconds": 1, "cache": str(tmp_path / folder)}
        config = configs.build(DataConfig, {**tree, "read": read, "workers": 0})
        return Loader(config, Tokenizer(small_tokenizer), 3, 4, 0, 1)

    impatient, patient = loader("a", 3), loader("b", 60)
    proxy.weather = Weather(down=True)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"s3://bucket/loader/\S+ was not to be had in 3"):
        next(iter(impatient))
    assert time.monotonic() - began < 3 + 12
    back = threading.Timer(4, lambda: setattr(proxy, "weather", Weather()))
    back.start()
    assert len(next(iter(patient)).keys) == 4
    assert proxy.counts["down"] > 1
    back.join()


def test_a_shard_that_is_gone_stops_the_run_or_is_counted_and_replaced(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path, small_tokenizer: str
) -> None:
    urls = []
    for s, n in enumerate([6, 6]):
        path = write_tar(tmp_path / f"{s}.tar", [m for i in range(n) for m in good(f"s{s}-{i}")])
        urls.append(s3.put(f"gone/{s}.tar", Path(path).read_bytes()))
    out = f"s3://{S3Server.BUCKET}/gone/m.json"
    indexer.build(urls, out)
    s3.client().delete_object(Bucket=S3Server.BUCKET, Key="gone/1.tar")
    tree = {"train": out, "tokenizer": small_tokenizer, "size": 8, "tokens": 8, "workers": 0}

    def epoch(policy: str) -> list[object]:
        read = {**QUICK, "on_unreadable": policy, "cache": str(tmp_path / policy)}
        config = configs.build(DataConfig, {**tree, "read": read})
        batches = iter(Loader(config, Tokenizer(small_tokenizer), 3, 4, 0, 1))
        return [next(batches) for _ in range(3)]

    with pytest.raises(UnreadableShard, match=r"gone/1\.tar"):
        epoch("stop")
    batches = epoch("skip")
    rejects = [r for b in batches for r in b.rejects]  # type: ignore[attr-defined]
    assert [(r.reason, r.shard) for r in rejects] == [("unreadable shard", urls[1])] * 6
    assert {r.key for r in rejects} == {f"#{i}" for i in range(6)}
    keys = [key for b in batches for key in b.keys]  # type: ignore[attr-defined]
    assert len(keys) == 12 and set(keys) == {f"s0-{i}" for i in range(6)}
