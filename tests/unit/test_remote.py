"""Remote reads through a bad network: they arrive whole, or end in a clear error in time."""

import errno
import hashlib
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain import remote, storage
from pretrain.errors import DataError
from pretrain.storage import Retry
from tests.support.faultproxy import FaultProxy, Weather
from tests.support.web import WebServer

DATA = random.Random(0).randbytes(300_000)
QUICK = Retry(deadline_seconds=20, attempt_seconds=0.3, first_wait_seconds=0.01)
PART = 20_000
BAD = Weather(p_503=0.3, p_reset=0.2, p_truncate=0.2, p_stall=0.05, stall_seconds=0.6)


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer({"x": DATA, "empty": b""}) as server:
        yield server


@pytest.fixture
def proxy(web: WebServer) -> Iterator[FaultProxy]:
    with FaultProxy(web.port) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_log", remote._Log())


def test_every_byte_arrives_through_bad_weather(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.weather = BAD
    url, path = f"{proxy.url}/x", tmp_path / "folder" / "x"
    found = storage.fetch(url, str(path), len(DATA), QUICK, PART, hashlib.sha256(DATA).hexdigest())
    assert path.read_bytes() == DATA
    assert found == hashlib.sha256(DATA).hexdigest()
    assert storage.read_range(url, 1000, 7000, QUICK) == DATA[1000:7000]
    assert b"".join(storage.read_parts(url, None, QUICK, PART)) == DATA
    assert storage.size(url, QUICK) == len(DATA) and storage.exists(url, QUICK)
    for fault in ("503", "reset", "truncate", "stall"):
        assert proxy.counts[fault], f"no {fault} was injected: {proxy.counts}"
    assert [p.name for p in path.parent.iterdir()] == ["x"]


def test_a_body_cut_half_the_time_arrives_in_parts(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.weather = Weather(p_truncate=0.5)
    storage.fetch(f"{proxy.url}/x", str(tmp_path / "x"), None, QUICK, PART)
    assert (tmp_path / "x").read_bytes() == DATA
    # Each part is tried again by itself: of 15, some 15 more. All over again would need thousands.
    assert proxy.counts["GET"] < 60 and proxy.counts["truncate"] >= 5


@pytest.mark.parametrize("read", [storage.read_bytes, storage.size, storage.exists])
def test_a_server_that_is_down_is_an_error_within_the_deadline(
    proxy: FaultProxy, read: Callable[..., object]
) -> None:
    proxy.weather = Weather(down=True)
    begun = time.monotonic()
    with pytest.raises(
        DataError, match=rf"{proxy.url}/x .*[1-5]\.\d s and \d+ tries; .*last error"
    ):
        read(f"{proxy.url}/x", replace(QUICK, deadline_seconds=1.0))
    assert 1.0 <= time.monotonic() - begun < 6


def test_a_stall_is_an_error_within_the_deadline(proxy: FaultProxy) -> None:
    proxy.weather = Weather(p_stall=1.0, stall_seconds=10)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"\d tries"):
        storage.read_range(f"{proxy.url}/x", 0, PART, replace(QUICK, deadline_seconds=0.7))
    assert time.monotonic() - begun < 6
    assert proxy.counts["stall"] >= 2, "one stalled try took all the time there was"


def test_a_trickle_is_a_stall(proxy: FaultProxy) -> None:
    """Some bytes every 0.1 s: no socket times out, and the part would need minutes."""
    proxy.weather = Weather(bytes_per_second=100)

    def clear_up() -> None:
        proxy.wait("GET", 2)
        proxy.weather = Weather()

    thread = threading.Thread(target=clear_up)
    thread.start()
    assert storage.read_range(f"{proxy.url}/x", 0, PART, QUICK) == DATA[:PART]
    thread.join()


def test_a_server_that_comes_back_in_time_is_waited_for(
    proxy: FaultProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.weather = Weather(down=True)

    def come_back() -> None:
        proxy.wait("down", 8)
        proxy.weather = Weather()

    thread = threading.Thread(target=come_back)
    thread.start()
    assert storage.read_bytes(f"{proxy.url}/x", QUICK) == DATA
    thread.join()
    lines = [line for line in capfd.readouterr().err.splitlines() if "storage: " in line]
    assert len(lines) == 1, "one line says why it waits, not one for each try"
    assert f"{proxy.url}/x" in lines[0] and "trying for" in lines[0]


def test_the_last_try_is_made_at_the_deadline(proxy: FaultProxy) -> None:
    """With waits of 10 s the server is back unseen, unless the last wait is cut."""
    proxy.weather = Weather(down=True)

    def come_back() -> None:
        proxy.wait("down", 2)  # aiohttp itself asks twice
        proxy.weather = Weather()

    threading.Thread(target=come_back).start()
    patient = Retry(deadline_seconds=1.0, first_wait_seconds=10, longest_wait_seconds=10)
    begun = time.monotonic()
    assert storage.read_range(f"{proxy.url}/x", 0, 10, patient) == DATA[:10]
    assert time.monotonic() - begun < 4


def test_what_is_missing_is_told_from_what_is_down(web: WebServer) -> None:
    """fsspec's HTTP says FileNotFoundError to both."""
    for read in (storage.read_bytes, storage.size, lambda u: storage.read_range(u, 0, 4)):
        with pytest.raises(FileNotFoundError, match="/none"):
            read(f"{web.url}/none")
    assert not storage.exists(f"{web.url}/none")
    web.status = 503
    with pytest.raises(DataError, match="HTTP 503"):
        storage.exists(f"{web.url}/x", replace(QUICK, deadline_seconds=0.2))


@pytest.mark.parametrize("status", [400, 401, 403, 410])
def test_a_refusal_is_not_tried_again(web: WebServer, status: int) -> None:
    web.status = status
    begun = time.monotonic()
    with pytest.raises((DataError, FileNotFoundError)) as caught:
        storage.read_range(f"{web.url}/x", 0, 4)
    assert time.monotonic() - begun < 20
    assert ("credentials" in str(caught.value)) == (status in (401, 403))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("lengths", [True, False])
def test_simple_servers_serve_too(ranges: bool, lengths: bool, tmp_path: Path) -> None:
    """`python -m http.server` ignores ranges; others do not tell a length."""
    with WebServer({"x": DATA, "empty": b""}, ranges=ranges, lengths=lengths) as web:
        url = f"{web.url}/x"
        assert storage.read_range(url, 5, 50) == DATA[5:50]
        assert storage.read_range(url, 7, 7) == b""
        assert storage.read_bytes(url) == DATA and storage.read_bytes(f"{web.url}/empty") == b""
        storage.fetch(url, str(tmp_path / "x"), len(DATA), QUICK, PART)
        assert (tmp_path / "x").read_bytes() == DATA


def test_a_range_past_the_end_is_another_object(web: WebServer) -> None:
    begun = time.monotonic()
    with pytest.raises(DataError, match="300000 bytes"):
        storage.read_range(f"{web.url}/x", len(DATA) - 10, len(DATA) + 10)
    assert time.monotonic() - begun < 20, "trying again does not make it longer"


@pytest.mark.parametrize("change", [{"bytes": 7}, {"sha256": "0" * 64}])
def test_another_object_than_indexed_is_not_kept(
    web: WebServer, tmp_path: Path, change: dict[str, object]
) -> None:
    with pytest.raises(DataError, match="index again"):
        storage.fetch(f"{web.url}/x", str(tmp_path / "x"), **change)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_reading_can_be_stopped(proxy: FaultProxy) -> None:
    proxy.weather = Weather(down=True)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(DataError, match="stopped"):
        list(storage.read_parts(f"{proxy.url}/x", None, Retry(), PART, stop))
    assert time.monotonic() - begun < 20


def test_a_reader_that_is_left_ends_its_threads(web: WebServer) -> None:
    web.before = lambda start: time.sleep(5 if start >= 2 * PART else 0)
    parts = storage.read_parts(f"{web.url}/x", None, Retry(), PART)
    assert next(parts) + next(parts) == DATA[: 2 * PART]
    begun = time.monotonic()
    parts.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 3, "it waited for parts that nobody wants"
    assert not [t for t in threading.enumerate() if t.name.startswith("read-parts")]


def test_secrets_of_a_url_do_not_reach_messages(
    proxy: FaultProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    assert remote.shown("https://me:pw@host/a?sig=1") == "https://host/a?…"
    assert remote.shown("/a/b?c@d") == "/a/b?c@d"
    proxy.weather = Weather(p_503=1.0)
    with pytest.raises(DataError) as caught:
        storage.read_bytes(f"{proxy.url}/x?signature=abc", replace(QUICK, deadline_seconds=0.3))
    assert "abc" not in str(caught.value) + capfd.readouterr().err
    one = remote.Remote("https://host/x?signature=abc")
    assert "abc" not in one._words(OSError(f"cannot open {one.url}"))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(DataError, match="needs the package gcsfs"):
        storage.read_bytes("gs://bucket/x")
    with pytest.raises(DataError, match="nosuch"):
        storage.read_bytes("nosuch://bucket/x")


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EBUSY, "SlowDown"), True),
        (EOFError(), True),
        (OSError(errno.EINVAL, "InvalidRange"), False),
        (PermissionError(), False),
        (FileNotFoundError(), False),
        (ValueError(), False),
        (ImportError(), False),
        (DataError("x"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_may_pass_by_itself(error: BaseException, transient: bool) -> None:
    assert remote.is_transient(error) == transient


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.Remote, "_sleep", lambda _, seconds: waits.append(seconds))
    one = remote.Remote("memory://x", Retry(first_wait_seconds=1, longest_wait_seconds=8))

    def attempt(_: float) -> None:
        if len(waits) < 40:
            raise ConnectionError

    one.tried(attempt)
    for n, seconds in enumerate(waits):
        full = min(2.0**n, 8.0)
        assert full / 2 <= seconds <= full
    assert len(set(waits)) > 30


def test_lines_are_ten_seconds_apart(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(remote.time, "monotonic", lambda: now)
    log = remote._Log()
    for second in range(25):
        now = float(second)
        log.say(f"second {second}")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "storage: second 0",
        "storage: second 10",
        "storage: second 20",
    ]
    assert "(9 such lines kept back)" in lines[1]


def _hash_of(url: str, results: "multiprocessing.Queue[str]") -> None:
    results.put(storage.sha256(url))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_children_read_after_their_parent_did(web: WebServer, method: str) -> None:
    """A file system that was opened before a fork hangs after it."""
    url = f"{web.url}/x"
    expected = storage.sha256(url)  # the parent's own connections and loop are up
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=_hash_of, args=(url, results))
    child.start()
    try:
        assert results.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()


def test_threads_read_at_once(proxy: FaultProxy) -> None:
    proxy.weather = Weather(p_503=0.2, p_reset=0.2)
    found: list[bool] = []

    def read(start: int) -> None:
        got = storage.read_range(f"{proxy.url}/x", start, start + 5000, QUICK)
        found.append(got == DATA[start : start + 5000])

    threads = [threading.Thread(target=read, args=(i * 6000,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 16
