"""The shared disk cache: one download for all, never half a file, never above its bound."""

import bz2
import errno
import fcntl
import gzip
import hashlib
import lzma
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.data import cache
from pretrain.data.cache import ShardCache
from pretrain.errors import DataError
from pretrain.storage import Retry
from tests.support.faultproxy import FaultProxy, Weather
from tests.support.web import WebServer

SHARD = 100_000
FILES = {str(n): random.Random(n).randbytes(SHARD) for n in range(12)}
QUICK = Retry(deadline_seconds=20, attempt_seconds=5, first_wait_seconds=0.01)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "tar": lambda data: data,
}


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    with WebServer(dict(FILES)) as web, FaultProxy(web.port) as proxy:
        yield proxy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(shards: ShardCache, url: str, data: bytes, **changes: object) -> bytes:
    """All bytes of an entry; ``data`` is what the manifest says of it."""
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
    descriptor = shards.open(url, **facts)  # type: ignore[arg-type]
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def used(folder: Path) -> int:
    """Bytes of all entries, of those under way too."""
    total = 0
    for path in [*folder.glob("*.shard"), *folder.glob("*.part")]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))


def rubbish(folder: Path) -> list[str]:
    """What is neither an entry nor the lock of the folder."""
    return [p.name for p in folder.iterdir() if p.suffix != ".shard" and p.name != "lock"]


def test_the_second_open_is_from_the_disk(proxy: FaultProxy, folder: Path) -> None:
    shards = ShardCache(folder, 10 * SHARD, QUICK)
    url = f"{proxy.url}/0"
    assert read(shards, url, FILES["0"]) == FILES["0"]
    asked = proxy.counts["GET"]
    proxy.weather = Weather(down=True)
    assert read(ShardCache(folder, 10 * SHARD, QUICK), url, FILES["0"]) == FILES["0"]
    assert proxy.counts["GET"] == asked == 1 and not rubbish(folder)


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_shards_are_kept_unpacked(folder: Path, tmp_path: Path, suffix: str) -> None:
    data = FILES["0"] * 3
    packed = PACKERS[suffix](data[:50_000]) + PACKERS[suffix](data[50_000:])  # as pigz writes
    (tmp_path / "x").write_bytes(packed)
    shards = ShardCache(folder, 10 * SHARD, QUICK)
    for _ in range(2):
        assert read(shards, str(tmp_path / "x"), packed, unpack=True) == data
    assert used(folder) == len(data) and len(entries(folder)) == 1
    assert read(shards, str(tmp_path / "x"), packed) == packed, "another entry: as it is stored"


def test_the_hash_is_of_what_is_stored_to_its_last_byte(folder: Path, tmp_path: Path) -> None:
    packed = bz2.compress(FILES["0"]) + bytes(9 << 20)  # padding, longer than any buffer
    (tmp_path / "x").write_bytes(packed)
    found = read(ShardCache(folder, 16 << 20), str(tmp_path / "x"), packed, unpack=True)
    assert found == FILES["0"]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_damaged_and_changed_shards_are_told_apart(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    packed = PACKERS[suffix](FILES["0"])
    half = packed[: len(packed) // 2]
    (tmp_path / "x").write_bytes(half)
    shards = ShardCache(folder, 1 << 20)
    with pytest.raises(DataError, match=f"not a whole {suffix}"):
        read(shards, str(tmp_path / "x"), half, unpack=True)
    (tmp_path / "y").write_bytes(half + bytes(len(packed) - len(half)))
    with pytest.raises(DataError, match="sha256"):
        read(shards, str(tmp_path / "y"), packed, unpack=True)
    assert not entries(folder) and not rubbish(folder)


def test_a_bomb_is_refused_before_it_fills_the_disk(folder: Path, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    (tmp_path / "x").write_bytes(bomb)
    highest = 0

    class Watched(ShardCache):
        def _write(self, writer: int, data: bytes) -> None:
            nonlocal highest
            super()._write(writer, data)
            highest = max(highest, os.fstat(writer).st_blocks * 512)

    with pytest.raises(DataError, match="more than 100 times"):
        read(Watched(folder, 1 << 30), str(tmp_path / "x"), bomb, unpack=True)
    assert highest < 40 << 20 and not entries(folder) and not rubbish(folder)
    with pytest.raises(DataError, match=r"data\.read\.cache_gib"):
        read(ShardCache(folder, 1 << 20, longest_ratio=1e6), str(tmp_path / "x"), bomb, unpack=True)
    assert not entries(folder) and not rubbish(folder)


def test_other_bytes_than_indexed_are_not_kept(proxy: FaultProxy, folder: Path) -> None:
    shards = ShardCache(folder, 10 * SHARD, QUICK)
    for wrong in ({"sha256": "0" * 64}, {"bytes": SHARD - 1}):
        with pytest.raises(DataError, match="index again"):
            read(shards, f"{proxy.url}/0", FILES["0"], **wrong)
    with pytest.raises(FileNotFoundError):
        read(shards, f"{proxy.url}/none", FILES["0"])
    assert not entries(folder) and not rubbish(folder)


def test_a_shard_that_was_indexed_anew_is_another_entry(folder: Path, tmp_path: Path) -> None:
    shards = ShardCache(folder, 10 * SHARD)
    for data in (FILES["0"], FILES["1"]):
        (tmp_path / "x").write_bytes(data)
        assert read(shards, str(tmp_path / "x"), data) == data


def test_the_least_recently_opened_goes_first(proxy: FaultProxy, folder: Path) -> None:
    shards = ShardCache(folder, 3 * SHARD + 10, QUICK)
    for name in "0120":
        read(shards, f"{proxy.url}/{name}", FILES[name])
        time.sleep(0.02)  # times of files have a grain
    read(shards, f"{proxy.url}/3", FILES["3"])
    proxy.weather, downloads = Weather(down=True), proxy.counts["GET"]
    for name in "023":
        assert read(shards, f"{proxy.url}/{name}", FILES[name]) == FILES[name]
    assert proxy.counts["GET"] == downloads == 4 and len(entries(folder)) == 3
    hurried = ShardCache(folder, 3 * SHARD, Retry(deadline_seconds=0.1))
    with pytest.raises(DataError):
        read(hurried, f"{proxy.url}/1", FILES["1"])


def test_an_evicted_file_is_read_to_its_end_by_who_has_it(proxy: FaultProxy, folder: Path) -> None:
    shards = ShardCache(folder, SHARD, QUICK)
    first = shards.open(f"{proxy.url}/0", SHARD)
    os.close(shards.open(f"{proxy.url}/1", SHARD))
    assert len(entries(folder)) == 1
    assert os.pread(first, SHARD, 0) == FILES["0"]
    os.close(first)


def test_a_shard_above_the_bound_is_a_clear_error(folder: Path) -> None:
    with pytest.raises(DataError, match=r"100000 bytes.*data\.read\.cache_gib=.* raise"):
        ShardCache(folder, SHARD - 1).open("https://host/x", SHARD)


def test_a_cut_entry_is_fetched_again(proxy: FaultProxy, folder: Path) -> None:
    shards = ShardCache(folder, 10 * SHARD, QUICK)
    read(shards, f"{proxy.url}/0", FILES["0"])
    os.truncate(entries(folder)[0], 10)
    assert read(shards, f"{proxy.url}/0", FILES["0"]) == FILES["0"]


def test_an_empty_shard(proxy: FaultProxy, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert read(ShardCache(folder, 10), str(tmp_path / "x"), b"") == b""


def _open_all(
    folder: str, url: str, names: str, limit: int, results: "multiprocessing.Queue[object]"
) -> None:
    """In a process of its own: read these shards, say how many were right."""
    shards = ShardCache(folder, limit, QUICK)
    right = sum(read(shards, f"{url}/{n}", FILES[n]) == FILES[n] for n in names)
    results.put(right)


def _processes(
    folder: Path, url: str, orders: list[str], limit: int
) -> tuple[list[multiprocessing.process.BaseProcess], "multiprocessing.Queue[object]"]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=_open_all, args=(str(folder), url, names, limit, results))
        for names in orders
    ]
    for child in children:
        child.start()
    return list(children), results  # type: ignore[return-value]


def test_processes_that_want_the_same_download_it_once(proxy: FaultProxy, folder: Path) -> None:
    proxy.weather = Weather(bytes_per_second=500_000)  # long enough that all of them meet
    children, results = _processes(folder, proxy.url, ["01", "01", "01", "10"], 10 * SHARD)
    assert [results.get(timeout=30) for _ in children] == [2] * 4
    for child in children:
        child.join()
    assert proxy.counts["GET"] == 2 and len(entries(folder)) == 2 and not rubbish(folder)


def test_an_entry_that_came_between_two_looks_is_not_fetched_again(
    proxy: FaultProxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, hit, looks = ShardCache(folder, 10 * SHARD, QUICK), cache._hit, []
    read(shards, f"{proxy.url}/0", FILES["0"])

    def late(entry: Path, length: int | None) -> int | None:
        looks.append(entry)
        return None if len(looks) == 1 else hit(entry, length)

    monkeypatch.setattr(cache, "_hit", late)
    assert read(shards, f"{proxy.url}/0", FILES["0"]) == FILES["0"]
    assert proxy.counts["GET"] == 1 and not rubbish(folder)


def test_threads_of_a_process_download_it_once(proxy: FaultProxy, folder: Path) -> None:
    proxy.weather = Weather(bytes_per_second=500_000)
    shards, found = ShardCache(folder, 10 * SHARD, QUICK), []

    def one() -> None:
        found.append(read(shards, f"{proxy.url}/0", FILES["0"]) == FILES["0"])

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6 and proxy.counts["GET"] == 1


def test_the_bound_holds_at_every_moment(proxy: FaultProxy, folder: Path) -> None:
    """Four processes, twelve shards, room for three, in bad weather."""
    proxy.weather = Weather(p_503=0.1, p_truncate=0.1, bytes_per_second=4e6)
    names, limit = "0123456789", 3 * SHARD + SHARD // 2
    orders = ["".join(random.Random(seed).sample(names, 10)) for seed in range(4)]
    children, results = _processes(folder, proxy.url, orders, limit)
    highest = 0
    while any(child.is_alive() for child in children) and results.qsize() < 4:
        highest = max(highest, used(folder))
        time.sleep(0.002)
    assert [results.get(timeout=30) for _ in children] == [10] * 4
    for child in children:
        child.join()
    assert 2 * SHARD < highest <= limit
    assert used(folder) <= limit and not rubbish(folder)


def test_a_killed_download_is_taken_over(proxy: FaultProxy, folder: Path) -> None:
    proxy.weather = Weather(bytes_per_second=50_000)
    children, _ = _processes(folder, proxy.url, ["0", "1"], 10 * SHARD)
    ends = time.monotonic() + 10
    while len(rubbish(folder) if folder.exists() else []) < 2 or proxy.counts["GET"] < 2:
        assert time.monotonic() < ends
        time.sleep(0.01)
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert len(rubbish(folder)) == 2 and not entries(folder), "it was not killed half-way"
    proxy.weather = Weather()
    begun = time.monotonic()
    shards = ShardCache(folder, 10 * SHARD, QUICK)
    assert read(shards, f"{proxy.url}/0", FILES["0"]) == FILES["0"]
    assert time.monotonic() - begun < 15
    assert not rubbish(folder), "what the other one left was removed too"


def test_who_waits_for_a_process_that_stands_still_is_told(proxy: FaultProxy, folder: Path) -> None:
    hurried = Retry(deadline_seconds=0.2, attempt_seconds=0.2)
    proxy.weather = Weather(bytes_per_second=20_000)
    children, _ = _processes(folder, proxy.url, ["0"], 10 * SHARD)
    proxy.wait("GET", 1)
    assert children[0].pid is not None
    os.kill(children[0].pid, signal.SIGSTOP)
    try:
        with pytest.raises(DataError, match="another process has held"):
            ShardCache(folder, 10 * SHARD, hurried).open(
                f"{proxy.url}/0", SHARD, hashlib.sha256(FILES["0"]).hexdigest()
            )
    finally:
        children[0].kill()
        children[0].join()


def test_closing_ends_a_download(proxy: FaultProxy, folder: Path) -> None:
    proxy.weather = Weather(p_stall=1, stall_seconds=20)
    shards = ShardCache(folder, 10 * SHARD)
    threading.Timer(0.3, shards.close).start()
    begun = time.monotonic()
    with pytest.raises(DataError, match="stopped"):
        shards.open(f"{proxy.url}/0", SHARD)
    assert time.monotonic() - begun < 15 and not rubbish(folder)


def test_a_full_disk_evicts_and_then_says_so(
    proxy: FaultProxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for two shards, under a bound that allows ten."""
    reserve = os.posix_fallocate

    def reserve_little(descriptor: int, start: int, length: int) -> None:
        if used(folder) + length > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, start, length)

    room = 2 * SHARD
    monkeypatch.setattr(cache.os, "posix_fallocate", reserve_little)
    shards = ShardCache(folder, 10 * SHARD, QUICK)
    for name in "0123":
        assert read(shards, f"{proxy.url}/{name}", FILES[name]) == FILES[name]
    assert len(entries(folder)) == 2
    room = SHARD - 1
    with pytest.raises(DataError, match=r"data\.read\.cache=.*full disk"):
        read(shards, f"{proxy.url}/4", FILES["4"])
    assert not rubbish(folder)


def test_other_files_in_the_folder_are_left_alone(proxy: FaultProxy, folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_bytes(bytes(SHARD))
    shards = ShardCache(folder, SHARD, QUICK)
    for name in "01":
        read(shards, f"{proxy.url}/{name}", FILES[name])
    assert (folder / "mine.txt").exists() and len(entries(folder)) == 1


def test_a_held_lock_of_the_folder_is_waited_for(proxy: FaultProxy, folder: Path) -> None:
    folder.mkdir()
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, (lock,)).start()
    begun = time.monotonic()
    assert read(ShardCache(folder, SHARD, QUICK), f"{proxy.url}/0", FILES["0"]) == FILES["0"]
    assert time.monotonic() - begun > 0.25
