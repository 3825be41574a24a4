"""What each rank of a run leaves on disk: who it is, how it ended, what it printed.

    RANKS/attempt           name of the attempt that may run; ranks of any other end themselves
                            (empty: none may)
    RANKS/NAME/00003.json   host, process ids and when they started, written at the start
    RANKS/NAME/00003.end    exit code, written at the end
    RANKS/NAME/00003.log    what the rank printed

RANKS is `OUTPUT/ranks` on storage that all hosts see. Standard library only: it is imported on
every host, by every rank.
"""

import json
import os
import re
import socket
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

REQUEUE_EXIT_CODE = 75  # of the trainer: stopped by a signal, its state is saved
_TRACEBACK = "Traceback (most recent call last)"
_LOG_BYTES = 256 * 1024


@dataclass(frozen=True)
class Process:
    """A process of a host, told apart from a later one of the same id by when it started.

    ticks: since boot, of field 22 in /proc/PID/stat. boot: of the host.
    """

    pid: int
    ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The one that has this id now."""
        with suppress(OSError, ValueError, IndexError):
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if after_name[0] not in ("Z", "X"):
                boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                return cls(pid, int(after_name[19]), boot)
        return None

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return Process.of(self.pid) == self


@dataclass(frozen=True)
class Record:
    """A rank under way.

    processes: the rank, the one that watches it, and deepspeed's launcher above that; None for one
    that was not there when this was written.
    """

    rank: int
    world: int
    host: str
    processes: tuple[Process | None, ...]

    def alive(self) -> list[Process]:
        """Those that still run, on the host itself."""
        return [p for p in self.processes if p is not None and p.alive()]


@dataclass(frozen=True)
class End:
    """How a rank ended. code: -N for signal N. at: by the file system's clock."""

    rank: int
    host: str
    code: int
    at: float

    def exit_code(self) -> int:
        """As a shell gives it."""
        return 128 - self.code if self.code < 0 else self.code


def folder(output: str) -> Path:
    """Where the ranks of a run with this output leave their records."""
    if "://" in output:  # an object store can neither be appended to nor watched
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", output.rstrip("/").rpartition("/")[2]) or "run"
        return Path("runs", name, "ranks").absolute()
    return Path(output, "ranks").absolute()


def next_attempt(ranks: Path) -> str:
    """A name that no attempt has yet."""
    numbers = [int(p.name) for p in ranks.glob("[0-9]*") if p.name.isdigit()]
    return f"{max(numbers, default=0) + 1:04d}"


def allow(ranks: Path, attempt: str) -> None:
    """From now on only ``attempt`` may run."""
    if attempt:
        (ranks / attempt).mkdir(parents=True, exist_ok=True)
    _replace(ranks / "attempt", attempt)


def current(ranks: Path) -> str:
    """Name of the newest attempt; "" if there is none."""
    found = [path for path in ranks.glob("*") if path.is_dir()]
    return max(found, key=lambda p: p.stat().st_mtime).name if found else ""


def allowed(ranks: Path, attempt: str) -> bool:
    """Whether it may; True where that cannot be read."""
    try:
        return (ranks / "attempt").read_text(encoding="utf-8") == attempt
    except OSError:
        return True


def begin(ranks: Path, attempt: str, rank: int, world: int, pids: Sequence[int]) -> None:
    """Record a rank of this host."""
    record = Record(rank, world, socket.gethostname(), tuple(map(Process.of, pids)))
    _replace(ranks / attempt / f"{rank:05d}.json", json.dumps(asdict(record)))


def end(ranks: Path, attempt: str, rank: int, code: int) -> None:
    """Record how it ended."""
    tree = {"host": socket.gethostname(), "code": code}
    _replace(ranks / attempt / f"{rank:05d}.end", json.dumps(tree))


def forget_ends(ranks: Path, attempt: str, which: Sequence[int]) -> None:
    """Of an attempt of the same name before."""
    for rank in which:
        (ranks / attempt / f"{rank:05d}.end").unlink(missing_ok=True)


def log(ranks: Path, attempt: str, rank: int) -> Path:
    """What the rank printed."""
    return ranks / attempt / f"{rank:05d}.log"


def read(ranks: Path, attempt: str = "*") -> list[Record]:
    """Of an attempt, or of all."""
    found = []
    for path in sorted(ranks.glob(f"{attempt}/[0-9]*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            tree = json.loads(path.read_text(encoding="utf-8"))
            tree["processes"] = tuple(Process(**p) if p else None for p in tree["processes"])
            found.append(Record(**tree))
    return found


def ends(ranks: Path, attempt: str, old: Collection[End] = ()) -> list[End]:
    """Of an attempt, the first one first; without those ``old`` ones that were there before it."""
    found = []
    for path in ranks.glob(f"{attempt}/[0-9]*.end"):
        with suppress(OSError, ValueError, KeyError):
            tree = json.loads(path.read_text(encoding="utf-8"))
            at = path.stat().st_mtime
            found.append(End(int(path.stem), str(tree["host"]), int(tree["code"]), at))
    return sorted((e for e in found if e not in old), key=lambda e: (e.at, e.rank))


def first_failure(ended: Sequence[End]) -> End | None:
    """The end that the others followed from: the first that is not 0. One by a signal, and one with
    a code of the trainer's own, go before a plain error within a second of it: of ranks that lose
    each other in the same moment, those were hit."""
    failed = [e for e in ended if e.code]
    near = [e for e in failed if e.at - failed[0].at <= 1.0]
    return min(near, key=lambda e: (e.code == 1, e.at), default=None)


def first_traceback(path: Path, since: int = 0) -> str:
    """The first traceback in a log that several ranks share, from byte ``since`` on; "" if there is
    none. torch begins each line of one with its rank's number, which tells them apart."""
    lines: list[str] = []
    with suppress(OSError), open(path, "rb") as file:
        file.seek(since)
        for raw in file:
            line = raw.decode(errors="replace").rstrip()
            if not lines:
                before, found, _ = line.partition(_TRACEBACK)
                lines = [line] if found else []
            elif line.startswith(before):
                lines.append(line)
                inner = line.removeprefix(before)
                if len(lines) == 80 or (inner and not inner.startswith(" ")):
                    break  # its last line says what was raised
    return "\n".join(lines)


def last_words(path: Path, lines: int = 20) -> str:
    """The last traceback of a log, or its last lines where it holds none."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
        text = file.read().decode(errors="replace").splitlines()
        starts = [i for i, line in enumerate(text) if _TRACEBACK in line]
        return "\n".join(text[starts[-1] :][:80] if starts else text[-lines:])
    return ""


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
