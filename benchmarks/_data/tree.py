"""A process and its descendants, from /proc itself: a library that lists every process of the
machine would take time from the contestants."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def pids(pid: int) -> Iterator[int]:
    """``pid`` and all below it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            for child in children.read_text().split():
                yield from pids(int(child))


def rss_bytes(pid: int) -> int:
    """Resident memory of all together; what they share counts in each."""
    total = 0
    for one in pids(pid):
        with suppress(OSError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGESIZE")


def cpu_seconds(pid: int) -> float:
    """Processor time of all together so far."""
    ticks = 0
    for one in pids(pid):
        with suppress(OSError):
            # After the name, which may hold spaces: fields 14 and 15 of proc(5).
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def running(pid: int) -> list[int]:
    """Those that do not stand still: a thread of theirs is neither stopped nor dead."""
    found = []
    for one in pids(pid):
        for status in Path(f"/proc/{one}/task").glob("*/stat"):
            with suppress(OSError):
                if status.read_text().rpartition(")")[2].split()[0] not in "TtZX":
                    found.append(one)
                    break
    return found
