"""Ends a rank whose interpreter stands still. A process beside the rank, for no thread of the rank
itself can run while C code holds the GIL.

    python -I -S sentinel.py PID SIGNAL

Each line on stdin is a sign of life: how many seconds may pass until the next. After a longer
silence, process PID gets SIGNAL (its C handler writes the stacks) and a second later SIGKILL. It
ends with the rank, or with its stdin.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress

_SECOND = 1.0


def main(rank: int, number: int) -> None:
    """Watch process ``rank``, the parent."""
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # sent to the whole group; the rank goes on a while
    allowed, silent = float("inf"), 0
    while True:
        heard, _, _ = select.select([0], [], [], _SECOND)
        if os.getppid() != rank:
            return
        if heard:
            lines = os.read(0, 1 << 16).split()
            if not lines:
                return
            allowed, silent = float(lines[-1]), 0
        elif _state(rank) not in "Tt":
            # Turns are counted, not time: a suspended machine, or a stopped rank, is not silent.
            silent += 1
        if silent > allowed:
            break
    text = f"[watchdog] process {rank}: its interpreter stood still for {silent} s; killed\n"
    with suppress(OSError):
        os.write(2, text.encode())
    with suppress(ProcessLookupError):
        os.kill(rank, number)
        time.sleep(_SECOND)
        if os.getppid() == rank:
            os.kill(rank, signal.SIGKILL)


def _state(process: int) -> str:
    with suppress(OSError), open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
    return "?"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
