"""A run that stands still ends by itself, and says where; one that is slow or waits goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import config
from pretrain.__main__ import main
from pretrain.errors import ConfigError
from pretrain.watchdog import (
    HUNG_EXIT_CODE,
    LOOKOUTS,
    Watchdog,
    WatchdogConfig,
    is_lookout,
    read_heartbeats,
)

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 2.0
SETTINGS = {
    "timeout_seconds": LIMIT,
    "start_seconds": LIMIT,
    "save_seconds": LIMIT,
    "heartbeat_seconds": 0.2,
}
PRELUDE = f"""
import ctypes, sys, time
from pathlib import Path
from pretrain.watchdog import Watchdog, WatchdogConfig

folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.02)

dog = Watchdog(folder, rank, world, WatchdogConfig(**{SETTINGS}))
"""


def start(folder: Path, script: str, rank: int = 0, world: int = 1) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PRELUDE + script, str(folder), str(rank), str(world)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(folder: Path, script: str, world: int = 2) -> "list[subprocess.Popen[str]]":
    return [start(folder, script, rank, world) for rank in range(world)]


def finish(process: "subprocess.Popen[str]", seconds: float = 30) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, err


def wait_until(true: Any, seconds: float = 20) -> float:
    """When it became true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return time.monotonic()


def in_phase(folder: Path, phase: str, ranks: int = 1) -> Any:
    return lambda: [h.phase for h in read_heartbeats(folder)] == [phase] * ranks


def stacks(folder: Path, rank: int) -> str:
    path = folder / "stacks" / f"rank-{rank:05d}.txt"
    return path.read_text() if path.exists() else ""


def test_a_hung_main_thread_ends_and_its_stack_names_the_place(tmp_path: Path) -> None:
    script = """
def stuck_here():
    time.sleep(600)

with dog:
    dog.beat("step", 1234)
    stuck_here()
"""
    process = start(tmp_path, script)
    began = wait_until(in_phase(tmp_path, "step"))
    code, err = finish(process)
    assert code == HUNG_EXIT_CODE == 71
    assert LIMIT - 1 < time.monotonic() - began < LIMIT + 5
    assert "stuck_here" in stacks(tmp_path, 0) and "1,234 samples" in stacks(tmp_path, 0)
    assert f"rank 0 ({os.uname().nodename}, process {process.pid}; 'step'" in err


def test_a_thread_that_keeps_the_gil_is_ended_from_outside(tmp_path: Path) -> None:
    script = """
def keeps_the_gil():
    while True:  # the signal that writes the stacks ends one sleep
        ctypes.PyDLL(None).sleep(600)

with dog:
    dog.beat("step", 8)
    time.sleep(0.5)
    keeps_the_gil()
"""
    process = start(tmp_path, script)
    began = wait_until(in_phase(tmp_path, "step"))
    code, err = finish(process)
    assert code == -signal.SIGKILL and "stood still" in err and str(process.pid) in err
    assert time.monotonic() - began < LIMIT + 8
    assert "keeps_the_gil" in stacks(tmp_path, 0)


def test_a_stopped_rank_is_named_by_the_other_and_ends_when_it_wakes(tmp_path: Path) -> None:
    script = """
with dog:
    dog.beat("step", 8)
    wait_for("never")
"""
    waits, stopped = processes = start_all(tmp_path, script)
    try:
        wait_until(in_phase(tmp_path, "step", 2))
        stopped.send_signal(signal.SIGSTOP)
        code, err = finish(waits)
        assert code == HUNG_EXIT_CODE
        suspects = err.partition("suspect: ")[2]
        assert suspects.startswith(f"rank 1 ({os.uname().nodename}, process {stopped.pid};")
        assert "silent for" in suspects and "rank 0" not in suspects
        assert "wait_for" in stacks(tmp_path, 0) and stacks(tmp_path, 1) == ""
        stopped.send_signal(signal.SIGCONT)
        code, err = finish(stopped)
        assert code == HUNG_EXIT_CODE and "asked for by rank 0" in err
        assert "wait_for" in stacks(tmp_path, 1)
    finally:
        for process in processes:
            process.kill()


def test_the_rank_that_lags_is_named_and_all_leave_their_stacks(tmp_path: Path) -> None:
    script = """
def reads_for_ever():
    time.sleep(600)

def waits_in_a_collective():
    time.sleep(600)

with dog:
    for samples in (8, 16, 24):
        dog.beat("load", samples)
        if samples == 24 and rank == 1:
            reads_for_ever()
        dog.beat("step", samples)
    waits_in_a_collective()
"""
    ends = [finish(process) for process in start_all(tmp_path, script)]
    assert [code for code, _ in ends] == [HUNG_EXIT_CODE] * 2
    said = "".join(err for _, err in ends)
    suspects = said.partition("suspect: ")[2].splitlines()[0]
    assert suspects.startswith("rank 1 (") and "'load' at 24" in suspects
    assert "rank 0" not in suspects
    assert "waits_in_a_collective" in stacks(tmp_path, 0)
    assert "reads_for_ever" in stacks(tmp_path, 1)


@pytest.mark.parametrize(
    ("end", "phase", "seconds"),
    [("raise RuntimeError", "failed", range(2, 4)), ("os._exit(1)", "save", range(3, 7))],
)
def test_a_rank_that_is_gone_is_named_by_the_one_it_left(
    tmp_path: Path, end: str, phase: str, seconds: range
) -> None:
    """As on another host, whose launcher does not know of it. It ends after the other began to
    look; an error is known at once, a death only when its own limit is over, that of a save."""
    script = f"""
import os
config = WatchdogConfig(**{SETTINGS} | {{"save_seconds": {2 * LIMIT}}})
with Watchdog(folder, rank, world, config) as dog:
    dog.beat("step", 8)
    wait_for("go")
    dog.beat("step", 16)
    if rank == 1:
        dog.beat("save", 16)
        time.sleep({0.9 * LIMIT})
        {end}
    wait_for("never")
"""
    processes = start_all(tmp_path, script)
    wait_until(in_phase(tmp_path, "step", 2))
    (tmp_path / "go").touch()
    (code, err), (failed, _) = [finish(process) for process in processes]
    assert (code, failed) == (HUNG_EXIT_CODE, 1)
    suspects = err.partition("suspect: ")[2]
    assert suspects.startswith("rank 1 (") and f"{phase!r} at 16" in suspects, err
    assert int(err.partition("no progress for ")[2].split()[0]) in seconds, err


def test_a_rank_that_waits_for_one_that_goes_on_is_not_hung(tmp_path: Path) -> None:
    """A long evaluation on one rank: the other stands still for twice the limit."""
    script = f"""
with dog:
    dog.beat("evaluate", 8)
    began = time.monotonic()
    while rank == 0 and time.monotonic() < began + {2 * LIMIT}:
        time.sleep(0.1)
        dog.beat("evaluate", 8)
    (folder / "done").touch() if rank == 0 else wait_for("done")
"""
    ends = [finish(process) for process in start_all(tmp_path, script)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert [h.phase for h in read_heartbeats(tmp_path)] == ["ended", "ended"]
    assert not list((tmp_path / "stacks").iterdir())


def test_a_suspended_machine_is_not_a_hang(tmp_path: Path) -> None:
    script = """
with dog:
    dog.beat("step", 8)
    wait_for("awake")
    time.sleep(0.8)  # the step that was suspended goes on
    dog.beat("step", 16)
"""
    processes = start_all(tmp_path, script)
    wait_until(in_phase(tmp_path, "step", 2))
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    (tmp_path / "awake").touch()
    for process in processes:
        process.send_signal(signal.SIGCONT)
    assert [finish(process)[0] for process in processes] == [0, 0]


def test_the_sentinel_ends_with_its_rank(tmp_path: Path) -> None:
    """Even if a forked worker outlives both and keeps the pipe between them open."""
    script = """
import os
with dog:
    worker = os.fork()
    if worker == 0:
        time.sleep(30)
        os._exit(0)
    (folder / "pids").write_text(f"{dog._sentinel.pid} {worker}")
    dog.beat("step", 8)
    wait_for("never")
"""
    process = start(tmp_path, script)
    wait_until(in_phase(tmp_path, "step"))
    pid, worker = map(int, (tmp_path / "pids").read_text().split())
    sentinel = Path(f"/proc/{pid}/cmdline")
    try:
        assert "sentinel" in sentinel.read_text()
        process.kill()
        process.wait()
        wait_until(lambda: not sentinel.exists() or not sentinel.read_text(), LIMIT)
    finally:
        os.kill(worker, signal.SIGKILL)
        process.communicate()


def test_heartbeats_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    (folder / "rank-00009.json").write_text("{}")  # of a larger run before
    (folder / "rank-00001.json").write_text("{ torn")
    with Watchdog(tmp_path, 0, 2, WatchdogConfig(**SETTINGS)) as dog:
        assert not (folder / "rank-00009.json").exists()
        dog.beat("step", 4_096)
        dog.beat("step", 4_096)
        wait_until(in_phase(tmp_path, "step"))
        (h,) = read_heartbeats(tmp_path)
        assert (h.rank, h.world, h.samples, h.position, h.pid) == (0, 2, 4_096, 1, os.getpid())
        assert main(["status", str(tmp_path)]) == 0
        line = capsys.readouterr().out
        assert line.startswith("rank   0  step") and "4,096 samples" in line
        assert f"{h.host} process {h.pid}" in line and "SILENT" not in line
        sentinel = dog._sentinel
    assert sentinel is not None and sentinel.returncode == 0
    assert in_phase(tmp_path, "ended")()
    assert not (tmp_path / "stacks" / "rank-00000.txt").exists()

    tree = json.loads((folder / "rank-00000.json").read_text()) | {"phase": "step"}
    (folder / "rank-00000.json").write_text(json.dumps(tree))
    os.utime(folder / "rank-00000.json", (time.time() - 100, time.time() - 100))
    assert main(["status", str(tmp_path)]) == 0
    assert "SILENT for 100 s" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "none")]) == 2


def test_an_error_is_the_phase_of_its_rank(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        Watchdog(tmp_path, 0, 1, WatchdogConfig(timeout_seconds=0)) as dog,
    ):
        assert dog._sentinel is None  # off
        dog.beat("step", 8)
        raise RuntimeError
    (h,) = read_heartbeats(tmp_path)
    assert (h.phase, h.samples) == ("failed", 8)


def test_an_old_request_is_not_ours(tmp_path: Path) -> None:
    """The folder of a run that hung once is used again."""
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "REQUEST").write_text("rank 3 at 1.0")
    process = start(tmp_path, "with dog:\n    time.sleep(0.8)\n")
    assert finish(process)[0] == 0


def test_a_heartbeat_that_is_too_slow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"make it 2\.5 or less"):
        config.build(WatchdogConfig, {"timeout_seconds": 10})
    config.build(WatchdogConfig, {"timeout_seconds": 0, "start_seconds": 1})  # off


def test_the_limit_is_that_of_the_start_until_the_second_step(tmp_path: Path) -> None:
    settings = WatchdogConfig(timeout_seconds=100, save_seconds=200, start_seconds=300)
    dog = Watchdog(tmp_path, 0, 1, settings)
    limits = [dog.limit_seconds()]
    for phase, samples in (
        *(("resume", 0), ("evaluate", 0), ("step", 0), ("step", 0), ("step", 8)),
        *(("save", 16), ("evaluate", 16), ("step", 16)),
    ):
        dog.beat(phase, samples)
        limits.append(dog.limit_seconds())
    assert limits == [300, 300, 300, 300, 300, 100, 200, 100, 100]


def test_of_many_ranks_a_few_look_after_the_others() -> None:
    """What all read together in a hang grows with the ranks, not with their square."""
    for world in (1, 2, 63, 64, 65, 100, 1000, 1024, 4096):
        lookouts = [rank for rank in range(world) if is_lookout(rank, world)]
        assert lookouts[0] == 0 and min(world, LOOKOUTS // 2) <= len(lookouts) <= LOOKOUTS
        gaps = [b - a for a, b in zip(lookouts, [*lookouts[1:], world], strict=True)]
        assert max(gaps) == -(-world // LOOKOUTS)


def test_a_rank_that_is_no_lookout_waits_longer_and_then_looks_itself(tmp_path: Path) -> None:
    """Rank 1 of 65: its lookouts are gone, it ends all the same, and later."""
    script = "with dog:\n    dog.beat('load', 0)\n    time.sleep(60)\n"
    began = time.monotonic()
    process = start(tmp_path, script, rank=1, world=65)
    code, err = finish(process)
    assert code == HUNG_EXIT_CODE and "rank 0, which has written no heartbeat" in err
    assert time.monotonic() - began > 1.7 * LIMIT
