"""Runs one command as a process group, passes stop signals to its ranks, ends what is left.

Signals go to the ranks, not to the `deepspeed` launcher above them: that one dies of a signal and
leaves its ranks alive, and the process below it stops the ranks one after the other, data workers
included, which breaks a last collective save (deepspeed 0.19.8, launcher/runner.py, launch.py).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 120.0  # for the last checkpoint; then the group is terminated
_KILL_SECONDS = 10.0
_POLL_SECONDS = 0.1
# Left over from another launcher, these would make this run's ranks believe they are that one's.
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code as a shell gives it, and the stop signal it got, if any."""

    code: int
    stopped_by: signal.Signals | None = None


def run(
    argv: Sequence[str], env: Mapping[str, str], log: Path, grace_seconds: float = GRACE_SECONDS
) -> Outcome:
    """Run ``argv`` with ``env`` added; its output is appended to ``log`` and copied to stdout.

    It goes through the file, so that ranks which outlive this process never write to a closed pipe.
    No process of the group is left when this returns. A second SIGINT stops without grace.

    Raises:
        FileNotFoundError: there is no such program.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as sink, open(log, "rb") as copy, _stop_signals() as pending:
        copy.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            list(argv),
            env=_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            stopped_by = _watch(process, copy, pending, grace_seconds)
        finally:
            _end_group(process)
            _mirror(copy)
    code = process.returncode
    return Outcome(128 - code if code < 0 else code, stopped_by)


def tail(log: Path, lines: int = 20) -> str:
    """The last ``lines`` of a log, or nothing if it is not there."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _watch(
    process: "subprocess.Popen[bytes]",
    copy: BinaryIO,
    pending: list[signal.Signals],
    grace_seconds: float,
) -> signal.Signals | None:
    stopped_by: signal.Signals | None = None
    deadline = float("inf")
    while process.poll() is None:
        _mirror(copy)
        while pending:
            received = pending.pop(0)
            impatient = received == signal.SIGINT and stopped_by == signal.SIGINT
            ranks = [] if impatient else _ranks(process.pid)
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, received)
            if stopped_by is None:
                stopped_by, deadline = received, time.monotonic() + grace_seconds
            if not ranks:  # none yet, so there is nothing to save
                deadline = 0.0
        if time.monotonic() > deadline:
            return stopped_by
        time.sleep(_POLL_SECONDS)
    return stopped_by


def _ranks(launcher: int) -> list[int]:
    """Process ids of the ranks below ``launcher``: those with LOCAL_RANK whose parent has none.

    Data workers inherit it from their rank and are left alone.
    """
    import psutil

    def ranked(process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return "LOCAL_RANK" in process.environ()
        return False

    with suppress(psutil.Error):
        below = psutil.Process(launcher).children(recursive=True)
        with_rank = {process.pid for process in below if ranked(process)}
        return [
            process.pid
            for process in below
            if process.pid in with_rank and process.ppid() not in with_rank
        ]
    return []


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    for sent, wait_seconds in ((signal.SIGTERM, _KILL_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
        give_up = time.monotonic() + wait_seconds
        if not _signal_group(process.pid, sent):
            break
        while time.monotonic() < give_up and _signal_group(process.pid, 0):
            process.poll()  # reap the leader, or the group never empties
            time.sleep(_POLL_SECONDS)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Send to every process of ``group`` that still runs; whether there was one."""
    import psutil

    alive = False
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            # A zombie that nobody reaps, as in a container without an init, is not alive.
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                alive = True
                if number:
                    process.send_signal(number)
    return alive


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    env.update(extra)
    # ninja stands beside python; that folder is on PATH only in an activated environment.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env


def _mirror(copy: BinaryIO) -> None:
    text = copy.read()
    if text:
        with suppress(BrokenPipeError, ValueError):  # nobody reads us any more: the log goes on
            sys.stdout.buffer.write(text)  # bytes: a read may end inside a character
            sys.stdout.flush()


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect stop signals in the list this yields, instead of dying of them."""
    pending: list[signal.Signals] = []
    before = {
        s: signal.signal(s, lambda number, _: pending.append(signal.Signals(number)))
        for s in STOP_SIGNALS
    }
    try:
        yield pending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
