"""How a run is asked to stop, and how every rank of it learns that one of them was asked.

Top-level imports of the standard library only: the handlers must stand before torch is imported,
which takes seconds.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal, nothing is lost; start it again
GIVE_UP_SECONDS = 25.0  # below the 30 s that Kubernetes and the deepspeed launcher grant
FLAG = "stop"
_POLL_SECONDS = 1.0


class Stopped(Exception):
    """Work was left because the run stops; raised on all ranks alike, or on none.

    Not an error of the user's: the trainer catches it, saves, and ends with REQUEUE_EXIT_CODE.
    """


class _State:
    """One of a process, as its signal handlers are."""

    def __init__(self) -> None:
        self.asked = False
        self.joined = False  # whether the ranks have once agreed: from then on they stop together
        self.flag: Path | None = None
        self.wakeup = -1


_state = _State()


def install(give_up_seconds: float | None = None) -> None:
    """Let SIGTERM, SIGINT and SIGUSR1 ask this process to stop, instead of ending it. Main thread
    only; a second call puts back handlers that a library has replaced.

    Args:
        give_up_seconds: if the ranks have not met in `Stop.agreed` by so long after a signal, as
            when the others never come to the rendezvous, end with REQUEUE_EXIT_CODE at once: there
            is nothing to save. None waits for ever. Only the first call's counts.
    """
    for number in SIGNALS:
        signal.signal(number, _ask)
    if _state.wakeup < 0:
        read, _state.wakeup = os.pipe()
        os.set_blocking(_state.wakeup, False)
        threading.Thread(
            target=_listen, args=(read, give_up_seconds), name="stop", daemon=True
        ).start()
        os.register_at_fork(after_in_child=_leave_parent_alone)
    signal.set_wakeup_fd(_state.wakeup, warn_on_full_buffer=False)


class Stop:
    """The question whether to stop, which all ranks answer alike. Installs the handlers."""

    def __init__(self) -> None:
        install()
        self._told = False
        self._next_poll = 0.0

    def share(self, folder: str | Path) -> None:
        """Let ranks tell each other through a file in ``folder``, which all see, so that `seen`
        knows of a signal to any of them. Collective."""
        from pretrain import comm

        flag = Path(folder) / FLAG
        if comm.is_main():
            flag.parent.mkdir(parents=True, exist_ok=True)
            flag.unlink(missing_ok=True)  # of the run before
        comm.barrier()
        _state.flag = flag
        if _state.asked:
            _tell()

    def agreed(self) -> bool:
        """True on every rank as soon as one rank was asked. Collective."""
        from pretrain import comm

        agreed = comm.agree_any(_state.asked)
        _state.joined = True
        return agreed

    def seen(self) -> bool:
        """Whether this rank was asked, or another has told it (see `share`). Not collective, and
        ranks may learn of it a second apart: for loops that hold no collective. Cheap: it looks
        once a second."""
        if _state.asked or self._told:
            return True
        now = time.monotonic()
        if _state.flag is not None and now >= self._next_poll:
            self._next_poll = now + _POLL_SECONDS
            with contextlib.suppress(OSError):
                # Listed, not looked up: NFS keeps "no such file" for up to a minute.
                self._told = _state.flag.name in os.listdir(_state.flag.parent)
        return self._told


def tolerate_closed_output() -> None:
    """Let printing never fail: a launcher that was killed leaves closed pipes behind, and the run
    must save all the same. The exit code stays what it is."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # Else the next file that is opened takes this number, and C code prints into it.
            _to_nowhere(fd)
        stream = getattr(sys, name)
        if stream is None:
            stream = open(fd, "w", closefd=False)  # noqa: SIM115
        if not isinstance(stream, _Tolerant):
            setattr(sys, name, _Tolerant(stream, fd))


class _Tolerant:
    """A text stream whose writes do not fail. Once its reader is gone it leads nowhere."""

    def __init__(self, stream: Any, fd: int) -> None:
        self._stream, self._fd = stream, fd

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As of the stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        # A full disk may have room again. A pipe or terminal that is gone stays gone, and what
        # stands in the buffer would fail once more at exit and change the exit code.
        if error.errno in (errno.EPIPE, errno.EBADF, errno.EIO):
            _to_nowhere(self._fd)


def _to_nowhere(fd: int) -> None:
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != fd:
            os.dup2(nowhere, fd)
            os.close(nowhere)


def _ask(number: int, frame: FrameType | None) -> None:
    _state.asked = True  # nothing is printed here: the pipe may be gone


def _listen(read: int, give_up_seconds: float | None) -> None:
    """Reads the numbers of signals that the interpreter's C handler writes. `_ask` runs only when
    the main thread is back in Python; this thread knows while it still waits in a collective."""
    while data := os.read(read, 64):
        if not set(data) & set(SIGNALS):
            continue
        _state.asked = True
        _tell()
        if give_up_seconds is not None:
            deadline = time.monotonic() + give_up_seconds
            while not _state.joined and time.monotonic() < deadline:
                time.sleep(0.05)
            if not _state.joined:
                with contextlib.suppress(OSError):
                    os.write(2, b"[stop] asked to stop before training began\n")
                os._exit(REQUEUE_EXIT_CODE)


def _tell() -> None:
    if _state.flag is not None:
        with contextlib.suppress(OSError):  # the others learn of it at the next step
            _state.flag.touch()


def _leave_parent_alone() -> None:
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
