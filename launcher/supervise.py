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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 120.0  # for the last checkpoint; then the group is terminated
_KILL_SECONDS = 10.0
_POLL_SECONDS = 0.1
_WATCH_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Left over from another launcher, these would make this run's ranks believe they are that one's.
RANK_VARIABLES = (
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
    """How a command ended: exit code as a shell gives it, the stop signal it got, if any, and why
    the watch ended it, if it did."""

    code: int
    stopped_by: signal.Signals | None = None
    ended: str | None = None


Deliver = Callable[[int, signal.Signals], bool]
"""Passes a stop signal to the ranks below a process; whether there was one to save its state."""


def run(
    argv: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    grace_seconds: float = GRACE_SECONDS,
    *,
    deliver: Deliver | None = None,
    watch: Callable[[], str | None] | None = None,
    started: Callable[[int], None] | None = None,
    inherit: Callable[[str], bool] | None = None,
    tied: bool = False,
    ignored: Sequence[signal.Signals] = (),
    cwd: str | None = None,
) -> Outcome:
    """Run ``argv`` with ``env`` added; its output is appended to ``log`` and copied to stdout.

    It goes through the file, so that ranks which outlive this process never write to a closed pipe.
    No process of the group is left when this returns. A second SIGINT stops without grace.

    Args:
        deliver: passes a stop signal on; without one, to the ranks on this machine.
        watch: asked about once a second; a text is why the group must end now, by SIGKILL.
        started: is told the process's id.
        inherit: which of this process's variables the command gets; None for all but ranks' own.
        tied: let the command die with this process, however that dies.
        ignored: signals that leave the command alone, and its children that have no handler.
        cwd: its working directory; None for this process's.

    Raises:
        FileNotFoundError: there is no such program.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as sink, open(log, "rb") as copy, stop_signals() as pending:
        copy.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            list(argv),
            env=_environment(env, inherit),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_before_start(tied, ignored),
            cwd=cwd,
        )
        ended: str | None = None
        stopped_by: signal.Signals | None = None
        try:
            if started is not None:
                started(process.pid)
            watcher = _Watcher(process, copy, pending, grace_seconds, deliver or _to_ranks, watch)
            stopped_by, ended = watcher.wait()
        finally:
            _end_group(process, (signal.SIGKILL,) if ended else (signal.SIGTERM, signal.SIGKILL))
            _mirror(copy)
    code = process.returncode
    return Outcome(128 - code if code < 0 else code, stopped_by, ended)


def tail(log: Path, lines: int = 20) -> str:
    """The last ``lines`` of a log, or nothing if it is not there."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


class _Watcher:
    """Waits for a process, and passes signals on meanwhile."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        copy: BinaryIO,
        pending: list[signal.Signals],
        grace_seconds: float,
        deliver: Deliver,
        watch: Callable[[], str | None] | None,
    ) -> None:
        self.process, self.copy, self.pending = process, copy, pending
        self.grace_seconds, self.deliver, self.watch = grace_seconds, deliver, watch
        self.stopped_by: signal.Signals | None = None
        self.deadline = float("inf")

    def wait(self) -> tuple[signal.Signals | None, str | None]:
        """The stop signal that came, and why ``watch`` ended it; until the process or its time is
        over."""
        look_at = 0.0
        while self.process.poll() is None:
            _mirror(self.copy)
            while self.pending:
                self._pass_on(self.pending.pop(0))
            if self.watch is not None and time.monotonic() >= look_at:
                why = self.watch()
                if why is not None:
                    return self.stopped_by, why
                look_at = time.monotonic() + _WATCH_SECONDS
            if time.monotonic() > self.deadline:
                break
            time.sleep(_POLL_SECONDS)
        return self.stopped_by, None

    def _pass_on(self, received: signal.Signals) -> None:
        impatient = received == signal.SIGINT and self.stopped_by == signal.SIGINT
        reached = not impatient and self.deliver(self.process.pid, received)
        if self.stopped_by is None:
            self.stopped_by, self.deadline = received, time.monotonic() + self.grace_seconds
        if not reached:  # there is nothing to save
            self.deadline = 0.0


def _to_ranks(launcher: int, number: signal.Signals) -> bool:
    ranks = _ranks(launcher)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, number)
    return bool(ranks)


def to_process(process: int, number: signal.Signals) -> bool:
    """Deliver to the process itself."""
    with suppress(ProcessLookupError):
        os.kill(process, number)
    return True


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


def _end_group(process: "subprocess.Popen[bytes]", signals: Sequence[signal.Signals]) -> None:
    for sent in signals:
        give_up = time.monotonic() + _KILL_SECONDS
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


def _before_start(tied: bool, ignored: Sequence[signal.Signals]) -> Callable[[], None] | None:
    """What the child does before it becomes the command."""
    if not tied and not ignored:
        return None
    import ctypes

    libc = ctypes.CDLL(None)  # before the fork: loading it there could wait on a lock for ever

    def prepare() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        if tied:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))

    return prepare


def _environment(
    extra: Mapping[str, str], inherit: Callable[[str], bool] | None = None
) -> dict[str, str]:
    wanted = inherit or (lambda name: name not in RANK_VARIABLES)
    env = {name: value for name, value in os.environ.items() if wanted(name)}
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
def stop_signals() -> Iterator[list[signal.Signals]]:
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
