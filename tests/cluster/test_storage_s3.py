"""Objects of a real S3 server, through a network that fails: all arrive, or a clear error does."""

import gzip
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain import storage
from pretrain.data.cache import ShardCache
from pretrain.errors import DataError
from pretrain.storage import Retry
from tests.support.faultproxy import FaultProxy, Weather
from tests.support.s3 import S3Server

pytestmark = pytest.mark.cluster

QUICK = Retry(deadline_seconds=30, attempt_seconds=0.7, first_wait_seconds=0.02)
PART = 64 << 10
STORM = Weather(p_503=0.3, p_reset=0.2, p_truncate=0.2, p_stall=0.03, stall_seconds=1.5)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def objects(s3: S3Server) -> dict[str, bytes]:
    """URL -> bytes of a few objects, of one part and of many."""
    draw = random.Random(0)
    sizes = [
        0,
        1,
        1000,
        PART,
        PART + 1,
        3 * PART - 1,
        *(draw.randrange(400_000) for _ in range(18)),
    ]
    return {s3.put(f"objects/{n}", d): d for n, d in enumerate(map(draw.randbytes, sizes))}


def test_every_object_arrives_through_a_storm(
    proxy: FaultProxy, objects: dict[str, bytes], tmp_path: Path
) -> None:
    proxy.weather = STORM

    def fetch(item: tuple[int, tuple[str, bytes]]) -> bool:
        number, (url, data) = item
        path, expected = tmp_path / str(number), hashlib.sha256(data).hexdigest()
        found = storage.fetch(url, str(path), len(data), QUICK, PART, expected)
        return found == expected and path.read_bytes() == data

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fetch, enumerate(objects.items())))
    for url, data in list(objects.items())[:6]:
        assert storage.read_bytes(url, QUICK) == data
    for fault in ("503", "reset", "truncate", "stall"):
        assert proxy.counts[fault] >= 2, proxy.counts
    assert len(list(tmp_path.iterdir())) == len(objects)


def test_ranges_are_exact_through_a_storm(proxy: FaultProxy, objects: dict[str, bytes]) -> None:
    url, data = max(objects.items(), key=lambda item: len(item[1]))
    proxy.weather = STORM
    draw = random.Random(1)
    for _ in range(20):
        start, end = sorted(draw.randrange(len(data)) for _ in range(2))
        assert storage.read_range(url, start, end, QUICK) == data[start:end]


@pytest.mark.parametrize(
    "read",
    [
        storage.read_bytes,
        storage.size,
        storage.exists,
        lambda url, retry: storage.read_range(url, 0, 10, retry),
        lambda url, retry: storage.write_bytes(url, b"new", retry),
    ],
    ids=["read_bytes", "size", "exists", "read_range", "write_bytes"],
)
def test_down_is_an_error_within_the_deadline(
    proxy: FaultProxy, objects: dict[str, bytes], read: Callable[..., object]
) -> None:
    url = max(objects, key=lambda u: len(objects[u]))
    proxy.weather = Weather(down=True)
    begun = time.monotonic()
    with pytest.raises(DataError, match=rf"{url} .*\d tries; the last error"):
        read(url, replace(QUICK, deadline_seconds=1.5))
    assert 1.4 < time.monotonic() - begun < 8


def test_down_in_mid_download_and_back_in_time(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path
) -> None:
    data = os.urandom(1_000_000)
    url = s3.put("slow", data)
    proxy.weather = Weather(bytes_per_second=300_000)

    def weather_changes() -> None:
        proxy.wait("GET", 6)
        proxy.weather = Weather(down=True)
        proxy.wait("down", 8)
        proxy.weather = Weather()

    thread = threading.Thread(target=weather_changes)
    thread.start()
    storage.fetch(url, str(tmp_path / "x"), len(data), QUICK, PART)
    thread.join()
    assert (tmp_path / "x").read_bytes() == data


def test_missing_and_forbidden_are_told_at_once(
    proxy: FaultProxy, objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.monotonic()
    for read in (storage.read_bytes, storage.size, lambda u: storage.read_range(u, 0, 1)):
        with pytest.raises(FileNotFoundError, match="s3://bucket/none"):
            read("s3://bucket/none")
    assert not storage.exists("s3://bucket/none") and storage.exists("s3://bucket/objects")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for read in (storage.read_bytes, storage.size, storage.exists):
        with pytest.raises(DataError, match="credentials"):
            read(next(iter(objects)))
    assert time.monotonic() - begun < 30, "none of these passes by waiting"


def test_writes_go_through_a_storm(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.weather = Weather(p_503=0.3, p_reset=0.3)
    for n in range(5):
        storage.write_bytes(f"s3://bucket/written/{n}", b"%d" % n * 1000, QUICK)
    (tmp_path / "x").write_bytes(b"from a file")
    storage.put_file(str(tmp_path / "x"), "s3://bucket/written/file", QUICK)
    proxy.weather = Weather()
    assert [storage.read_bytes(f"s3://bucket/written/{n}") for n in range(5)] == [
        b"%d" % n * 1000 for n in range(5)
    ]
    assert storage.read_bytes("s3://bucket/written/file") == b"from a file"


def _sum_of(url: str, environment: dict[str, str], results: "multiprocessing.Queue[str]") -> None:
    os.environ.update(environment)  # a fork server has the one of its own start
    results.put(storage.sha256(url))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_read_after_the_parent_did(
    proxy: FaultProxy, objects: dict[str, bytes], method: str
) -> None:
    """s3fs that was opened before a fork hangs after it."""
    url, data = max(objects.items(), key=lambda item: len(item[1]))
    expected = hashlib.sha256(data).hexdigest()
    assert storage.sha256(url) == expected
    context = multiprocessing.get_context(method)
    results = context.Queue()
    facts = (url, dict(os.environ), results)
    workers = [context.Process(target=_sum_of, args=facts) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        assert [results.get(timeout=60) for _ in workers] == [expected] * 2
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


# A process of its own, as a rank is: opens shards through the cache, prints the hash of each.
OPEN = """
import hashlib, os, sys
from pretrain.data.cache import ShardCache
from pretrain.storage import Retry
cache = ShardCache(sys.argv[1], int(sys.argv[2]), Retry(30, 10, 0.02))
print("ready", flush=True)
sys.stdin.readline()
for fact in sys.argv[3:]:
    url, length, sha256, unpack = fact.split()
    with os.fdopen(cache.open(url, int(length), sha256, unpack == "True"), "rb") as stream:
        print(hashlib.sha256(stream.read()).hexdigest(), flush=True)
"""


def _rank(folder: Path, limit: int, *facts: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN, str(folder), str(limit), *facts],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process


def _go(*ranks: "subprocess.Popen[str]") -> None:
    """Let them begin all at once, when all have imported what they need."""
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()


def test_ranks_of_a_node_download_a_shard_once(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path
) -> None:
    plain, inner = os.urandom(400_000), os.urandom(300_000)
    packed = gzip.compress(inner)
    facts = [
        f"{s3.put(f'shards/{name}', d)} {len(d)} {hashlib.sha256(d).hexdigest()} {unpack}"
        for name, d, unpack in (("a.tar", plain, False), ("b.tar.gz", packed, True))
    ]
    # One request a shard: what is asked twice was downloaded twice.
    proxy.weather = Weather(bytes_per_second=400_000)
    ranks = [_rank(tmp_path, 1 << 20, *facts) for _ in range(2)]
    _go(*ranks)
    expected = [hashlib.sha256(d).hexdigest() for d in (plain, inner)]
    for rank in ranks:
        assert rank.communicate(timeout=60)[0].split() == expected
    assert proxy.counts["GET"] - proxy.counts["upstream"] == 2, proxy.counts


def test_a_rank_goes_on_where_another_was_killed(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path
) -> None:
    data = os.urandom(400_000)
    expected = hashlib.sha256(data).hexdigest()
    fact = f"{s3.put('shards/killed.tar', data)} {len(data)} {expected} False"
    proxy.weather = Weather(bytes_per_second=100_000)
    killed, waiting = _rank(tmp_path, 1 << 20, fact), _rank(tmp_path, 1 << 20, fact)
    _go(killed)
    proxy.wait("GET", 1)
    _go(waiting)
    time.sleep(0.3)  # it waits for the lock now
    assert proxy.counts["GET"] == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    proxy.weather = Weather()
    assert waiting.communicate(timeout=30)[0].split() == [expected]
    assert proxy.counts["GET"] == 2 and not list(tmp_path.glob("*.part"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, mounted for the test."""
    folder, reason = tmp_path / "disk", "only root may mount a small disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount") is not None
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "small-disk", str(folder)],
            capture_output=True,
        ).returncode
        == 0
    )
    if not mounted and os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    if not mounted:
        pytest.skip(reason)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_evicts_and_then_says_so(
    proxy: FaultProxy, s3: S3Server, small_disk: Path
) -> None:
    """The bound allows 16 MiB, the disk has 1: three shards of 300 KB, and then one of 2 MB."""
    cache = ShardCache(small_disk / "cache", 16 << 20, QUICK)
    for n in range(6):
        data = random.Random(n).randbytes(300_000)
        with os.fdopen(cache.open(s3.put(f"disk/{n}", data), len(data)), "rb") as stream:
            assert stream.read() == data
    assert len(list((small_disk / "cache").glob("*.shard"))) == 3
    large = s3.put("disk/large", bytes(2_000_000))
    with pytest.raises(DataError, match="full disk"):
        cache.open(large, 2_000_000)
    assert not list((small_disk / "cache").glob("*.part"))
    # Packed it has room, unpacked it has not: the disk fills while it is being written.
    packed = gzip.compress(bytes(60_000) + os.urandom(20_000)) * 20
    with pytest.raises(DataError, match="full disk"):
        cache.open(s3.put("disk/packed", packed), len(packed), unpack=True)
    with os.fdopen(cache.open("s3://bucket/disk/0", 300_000), "rb") as stream:
        assert stream.read() == random.Random(0).randbytes(300_000)
