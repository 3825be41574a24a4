"""`launcher.rank`, the records it leaves, and what `launcher.host` does with them: real ones."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher import host, records, ticket
from launcher.records import End, Process
from tests.conftest import ROOT

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
SAVES = (
    "import signal, sys, time\n"
    "def stop(*_):\n    print('saved', flush=True); sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, stop)\n"
    "print('ready', flush=True); time.sleep(60)\n"
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts a rank that runs a Python text."""
    started = []

    def begin(
        code: str, attempt: str = "0001", grace_seconds: float = 120.0, **env: str
    ) -> "subprocess.Popen[bytes]":
        argv = (sys.executable, "-c", code)
        env["PYTHONPATH"] = str(ROOT)
        ranks = str(tmp_path / "ranks")
        ticket.Ticket(ranks, attempt, argv, env, "node1", 2345, grace_seconds=grace_seconds).write(
            "t"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.rank", "t"],
            env={**os.environ, **PLACE, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def until(path: Path, text: str = "") -> str:
    give_up = time.monotonic() + 20
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < give_up, path
        time.sleep(0.02)
    return path.read_text()


def test_place_log_secret_and_end(
    start: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TOKEN"]
    code = f"import os, sys; print([os.environ[n] for n in {names}]); sys.exit(3)"
    process = start(code, TOKEN="hush")
    path = ticket._path("t")
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert process.wait(30) == 3
    log = records.log(tmp_path / "ranks", "0001", 1).read_text()
    assert log.strip() == "['1', '2', '1', 'node1', '2345', 'hush']"
    (end,) = records.ends(tmp_path / "ranks", "0001")
    assert (end.rank, end.host, end.code) == (1, os.uname().nodename, 3)


def test_a_stop_reaches_the_rank_and_its_code_comes_back(
    start: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    ranks = tmp_path / "ranks"
    process = start(SAVES)
    until(records.log(ranks, "0001", 1), "ready")
    reply = host.answer({"do": "signal", "ranks": str(ranks), "number": int(signal.SIGTERM)})
    assert reply == {"reached": 1}
    assert process.wait(20) == 75
    assert "saved" in records.log(ranks, "0001", 1).read_text()
    assert [e.code for e in records.ends(ranks, "0001")] == [75]


def test_the_grace_is_the_jobs(
    start: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    """One that saves for longer is ended."""
    ranks = tmp_path / "ranks"
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(1)"
    )
    process = start(code, grace_seconds=0.5)
    until(records.log(ranks, "0001", 1), "ready")
    host.answer({"do": "signal", "ranks": str(ranks), "number": int(signal.SIGUSR1)})
    assert process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("grace_seconds", [0, 20])
def test_what_is_left_is_ended_by_its_record(
    start: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path, grace_seconds: float
) -> None:
    """With a grace it saves first; without one it is killed. A process that only has the id of
    one that was recorded is left alone."""
    ranks = tmp_path / "ranks"
    process = start(SAVES)
    until(records.log(ranks, "0001", 1), "ready")
    other = subprocess.Popen(["sleep", "60"])
    mine = Process.of(other.pid)
    assert mine is not None
    stale = Process(mine.pid, mine.ticks - 1, mine.boot)
    tree = {"rank": 0, "world": 2, "host": os.uname().nodename}
    tree["processes"] = [vars(stale), None]
    (ranks / "0001" / "00000.json").write_text(json.dumps(tree))
    (record,) = records.read(ranks, "0001")[1:]
    ended = host.answer({"do": "end", "ranks": str(ranks), "grace_seconds": grace_seconds})
    assert process.pid in ended["ended"] and other.pid not in ended["ended"]
    process.wait(10)
    assert not record.alive() and other.poll() is None
    saved = "saved" in records.log(ranks, "0001", 1).read_text()
    assert saved == (grace_seconds > 0)
    other.kill()
    other.wait()


def test_it_dies_with_what_watches_it(
    start: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    process = start(SAVES)
    until(records.log(tmp_path / "ranks", "0001", 1), "ready")
    (record,) = records.read(tmp_path / "ranks")
    process.kill()
    give_up = time.monotonic() + 5
    while record.alive() and time.monotonic() < give_up:
        time.sleep(0.02)
    process.wait()
    assert not record.alive()


def test_another_attempt_ends_it(
    start: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    """As behind a link that was cut, where nobody can end it."""
    ranks = tmp_path / "ranks"
    records.allow(ranks, "0001")
    process = start(SAVES)
    until(records.log(ranks, "0001", 1), "ready")
    records.allow(ranks, "0002")
    assert process.wait(20) == 137
    late = start(SAVES)
    assert late.wait(20) == 2


def test_started_by_its_path(tmp_path: Path) -> None:
    """As deepspeed does over MPICH; its runner's own accelerator, which mpirun hands on, is not the
    rank's, whose ticket may name one."""
    tell = "import os; print(os.environ.get('DS_ACCELERATOR'))"
    for attempt, env in (("0001", {}), ("0002", {"DS_ACCELERATOR": "xpu"})):
        argv = (sys.executable, "-c", tell)
        ticket.Ticket(str(tmp_path / "ranks"), attempt, argv, env, "node1", 2345).write("t")
        done = subprocess.run(
            [sys.executable, str(ROOT / "launcher/rank.py"), "t"],
            env={**os.environ, **PLACE, "DS_ACCELERATOR": "cpu"},
            cwd=tmp_path,
        )
        assert done.returncode == 0
        said = records.log(tmp_path / "ranks", attempt, 1).read_text()
        assert said.strip() == env.get("DS_ACCELERATOR", "None")


def test_no_ticket_and_no_name(tmp_path: Path) -> None:
    for name, said in (("absent", "is not on this host"), ("../x", "is not a name")):
        done = subprocess.run(
            [sys.executable, "-m", "launcher.rank", name],
            env={**os.environ, **PLACE, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and said in done.stderr


def test_the_first_failure() -> None:
    """The killed one, not the peer whose connection it broke; the code of its own, not the 1."""
    broken, killed = End(0, "a", 1, 10.0), End(1, "b", -9, 10.4)
    assert records.first_failure([broken, killed]) == killed
    assert records.first_failure([broken, End(1, "b", 2, 10.4)]) == End(1, "b", 2, 10.4)
    assert records.first_failure([broken, End(1, "b", -9, 20.0)]) == broken
    assert records.first_failure([End(0, "a", 0, 1.0)]) is None


def test_the_first_traceback_of_a_log_that_ranks_share(tmp_path: Path) -> None:
    log = tmp_path / "log"
    old = "Traceback (most recent call last):\n  of the run before\nError: old\n"
    log.write_text(
        f"{old}step 1\n[rank1]: Traceback (most recent call last):\n[rank1]:   File x\n"
        "[rank0]: Traceback (most recent call last):\n[rank1]:     raise\n[rank0]:   File y\n"
        "[rank1]: ValueError: it was this\n[rank0]: RuntimeError: lost its peer\n"
    )
    found = records.first_traceback(log, len(old)).splitlines()
    assert [line.partition(": ")[0] for line in found] == ["[rank1]"] * 4
    assert found[-1] == "[rank1]: ValueError: it was this"
    assert records.first_traceback(log).splitlines()[1:] == ["  of the run before", "Error: old"]
    assert records.first_traceback(log, log.stat().st_size) == ""
    assert records.first_traceback(tmp_path / "none") == ""


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "a\nTraceback (most recent call last):\n  old\nb\n"
        "Traceback (most recent call last):\n  new\nError: x\n"
    )
    assert records.last_words(log).splitlines()[1:] == ["  new", "Error: x"]
    log.write_text("\n".join(map(str, range(100))))
    assert records.last_words(log, 2) == "98\n99"
    assert records.last_words(tmp_path / "none") == ""


def test_an_answer_to_nonsense_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.host"],
        input='{"do": "dance"}',
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == {"error": "ValueError: do='dance' is unknown"}
