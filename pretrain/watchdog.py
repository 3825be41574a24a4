"""No run hangs for ever: each rank says where it is, and ends with its stacks if all stand still.

RUN/heartbeats/rank-00003.json   where the rank is, rewritten every few seconds
RUN/stacks/rank-00003.txt        every thread's stack at the time of a hang, appended
RUN/stacks/REQUEST               the rank that noticed asks the others for theirs

Ranks wait for each other, so one that stands still may only be waiting. A run is hung when every
rank that still writes its heartbeat has overstayed its own limit.
"""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import Field, model_validator

from pretrain import sentinel
from pretrain.config import Config

HUNG_EXIT_CODE = 71  # EX_OSERR: no progress for too long; the stacks are in RUN/stacks
START, STEP, SAVE, ENDED, FAILED = "start", "step", "save", "ended", "failed"
LOOKOUTS = 64  # ranks that read the others' files, evenly spread; the others are asked by them
_PATIENCE = 1.25  # limits after which a rank looks for itself: every lookout may be gone
_DUMP_SECONDS = 3.0  # for the other ranks' stacks, before the launcher kills them
_DUMP_SIGNAL = signal.SIGRTMAX - 1  # from the sentinel; no library here uses it


class WatchdogConfig(Config):
    """Attributes:
    timeout_seconds: without progress on any rank, after which the run is hung and ends with exit
        code 71; 0 turns the watchdog off (heartbeats are written all the same).
    start_seconds: the same, until the second step begins: start-up, loading, compilation.
    save_seconds: the same, while a checkpoint is written.
    heartbeat_seconds: between writings of a rank's heartbeat file.
    """

    timeout_seconds: float = Field(600.0, ge=0)
    start_seconds: float = Field(1800.0, gt=0)
    save_seconds: float = Field(1800.0, gt=0)
    heartbeat_seconds: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _agree(self) -> "WatchdogConfig":
        shortest = min(self.timeout_seconds, self.start_seconds, self.save_seconds)
        if self.timeout_seconds and shortest < 4 * self.heartbeat_seconds:
            raise ValueError(
                f"watchdog.heartbeat_seconds={self.heartbeat_seconds:g} is too long for a limit of "
                f"{shortest:g} s; make it {shortest / 4:g} or less"
            )
        return self


@dataclass(frozen=True)
class Heartbeat:
    """What a rank wrote last.

    Attributes:
        rank, world, host, pid: who.
        phase, samples: where in the run.
        position: changes of phase or samples since the start: in step with the other ranks'.
        limit_seconds: that it may stay there.
        age_seconds: since the last beat, when this was written.
        every_seconds: between writings.
        time: of writing, by the rank's own clock, seconds since 1970.
        written_seconds_ago: by the file system's clock and this machine's.
    """

    rank: int
    world: int
    host: str
    pid: int
    phase: str
    samples: int
    position: int
    limit_seconds: float
    age_seconds: float
    every_seconds: float
    time: float
    written_seconds_ago: float = 0.0


def read_heartbeats(folder: str | Path) -> list[Heartbeat]:
    """The heartbeats of the run in ``folder``, by rank. A file that cannot be read is left out."""
    found = []
    for path in Path(folder).glob("heartbeats/rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            ago = max(0.0, time.time() - path.stat().st_mtime)
            tree = json.loads(path.read_text(encoding="utf-8"))
            found.append(Heartbeat(**{**tree, "written_seconds_ago": ago}))
    return sorted(found, key=lambda h: h.rank)


def is_lookout(rank: int, world: int) -> bool:
    """Whether a rank that stands still reads the files of all others at once. If all did, what they
    read together would grow with the square of the ranks: a million files every half minute on
    1,024 ranks, of a file system that may be what stands still."""
    return rank % -(-world // LOOKOUTS) == 0


class Watchdog:
    """Watches this rank from a thread, and the other ranks through their files. Enter it in the
    main thread; one at a time in a process.

    Args:
        folder: of the run; on storage that every rank sees.
        rank, world: this rank of how many.
        config: limits.
    """

    def __init__(self, folder: str | Path, rank: int, world: int, config: WatchdogConfig) -> None:
        self.folder, self.rank, self.world, self.config = Path(folder), rank, world, config
        self._heartbeat = self.folder / "heartbeats" / f"rank-{rank:05d}.json"
        self._stacks = self.folder / "stacks"
        self._host = socket.gethostname()
        self._place = (START, 0)
        self._position = 0
        self._steps = 0
        self._beaten = time.monotonic()
        self._granted = self._beaten  # after a suspension, time counts anew from here
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._peers = _Peers(self)

    def beat(self, phase: str, samples: int) -> None:
        """This rank goes on: it is in ``phase``, ``samples`` into the run. Main thread; about a
        microsecond.

        Args:
            phase: a word for people, but for "step" (an optimizer step begins) and "save", which
                have a meaning for the limits.
        """
        if (phase, samples) != self._place:
            self._place = (phase, samples)
            self._position += 1
            self._steps += phase == STEP
        self._beaten = time.monotonic()

    def limit_seconds(self) -> float:
        """What this rank may stay where it is without progress."""
        limit = self.config.save_seconds if self._place[0] == SAVE else self.config.timeout_seconds
        return limit if self._steps > 1 else max(limit, self.config.start_seconds)

    def __enter__(self) -> "Watchdog":
        self._heartbeat.parent.mkdir(parents=True, exist_ok=True)
        self._stacks.mkdir(parents=True, exist_ok=True)
        self._beaten = self._granted = time.monotonic()
        self._old_request = self._request()
        self._forget_larger_run()
        self._file = open(self._stacks / f"rank-{self.rank:05d}.txt", "a")
        self._sentinel = self._start_sentinel() if self.config.timeout_seconds else None
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(5.0)
        self.beat(FAILED if error else ENDED, self._place[1])
        self._write()
        if self._sentinel is not None and self._sentinel.stdin is not None:
            with suppress(OSError):
                self._sentinel.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._sentinel.wait(5.0)
            faulthandler.unregister(_DUMP_SIGNAL)
        self._file.close()
        with suppress(OSError):
            if not os.path.getsize(self._file.name):
                os.unlink(self._file.name)

    def _watch(self) -> None:
        tick = min(1.0, self.config.heartbeat_seconds)
        before, write_at, watching = time.monotonic(), 0.0, bool(self.config.timeout_seconds)
        while not self._ended.wait(tick):
            now = time.monotonic()
            if now - before > 3 * self.config.heartbeat_seconds + tick:
                # This thread was not run either: a stopped process, a suspended machine.
                self._granted = now
            before = now
            if now >= write_at:
                self._write()
                write_at = now + self.config.heartbeat_seconds - tick / 2
            if watching:
                self._ping()
                request = self._request()
                if request not in (None, self._old_request):
                    self._die(f"asked for by {request}")
                if self._expired(now):
                    self._ask_and_die()

    def _expired(self, now: float) -> bool:
        limit = self.limit_seconds()
        since = max(self._beaten, self._granted)
        begin = 1 / 2 if is_lookout(self.rank, self.world) else _PATIENCE
        if now - since < limit * begin:
            self._peers.forget()
            return False
        self._peers.look(now, limit / 20)
        # Read after the look: the rank may have gone on meanwhile. Half a limit of looking tells
        # which ranks are alive, and how long they may stay where they are.
        own = max(self._granted, self._beaten) + limit * (begin + 1 / 2)
        return now > own and now > self._peers.deadline()

    def _ask_and_die(self) -> None:
        phase, samples = self._place
        seconds = time.monotonic() - self._beaten
        self._say(
            f"no progress for {seconds:.0f} s in {phase!r} at {samples:,} samples; "
            f"suspect: {self._peers.suspects()}; stacks in {self._stacks}"
        )
        paths = [self._stacks / f"rank-{rank:05d}.txt" for rank in self._peers.alive()]
        sizes = {path: _size(path) for path in paths}
        _replace(
            self._stacks / "REQUEST",
            f"rank {self.rank} ({self._host}, process {os.getpid()}) at {time.time():.3f}",
        )
        self._dump("no progress")
        give_up = time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < give_up and any(_size(p) == n for p, n in sizes.items()):
            self._ping()
            time.sleep(0.05)
        os._exit(HUNG_EXIT_CODE)

    def _die(self, reason: str) -> None:
        self._dump(reason)
        self._say(f"the run is hung; stacks {reason}")
        os._exit(HUNG_EXIT_CODE)

    def _dump(self, reason: str) -> None:
        phase, samples = self._place
        with suppress(OSError, ValueError):
            self._file.write(
                f"== {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}, {self._host}, process "
                f"{os.getpid()}: in {phase!r} at {samples:,} samples, last progress "
                f"{time.monotonic() - self._beaten:.0f} s ago; {reason}\n"
            )
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)

    def _say(self, text: str) -> None:
        # Not through sys.stderr: the thread that hangs may hold its lock.
        with suppress(OSError):
            os.write(2, f"[watchdog] rank {self.rank}: {text}\n".encode())

    def _request(self) -> str | None:
        with suppress(OSError):
            return (self._stacks / "REQUEST").read_text(encoding="utf-8")
        return None

    def _write(self) -> None:
        phase, samples = self._place
        tree = {
            "rank": self.rank,
            "world": self.world,
            "host": self._host,
            "pid": os.getpid(),
            "phase": phase,
            "samples": samples,
            "position": self._position,
            "limit_seconds": self.limit_seconds(),
            "age_seconds": round(time.monotonic() - self._beaten, 3),
            "every_seconds": self.config.heartbeat_seconds,
            "time": time.time(),
        }
        _replace(self._heartbeat, json.dumps(tree))

    def _forget_larger_run(self) -> None:
        for path in self._heartbeat.parent.glob("rank-*.json") if self.rank == 0 else ():
            with suppress(OSError, ValueError):
                if int(path.stem.removeprefix("rank-")) >= self.world:
                    path.unlink()

    def _start_sentinel(self) -> "subprocess.Popen[bytes]":
        faulthandler.register(_DUMP_SIGNAL, self._file, all_threads=True)
        command = (sys.executable, "-I", "-S", sentinel.__file__, str(os.getpid()))
        process = subprocess.Popen(
            [*command, str(int(_DUMP_SIGNAL))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _ping(self) -> None:
        if self._sentinel is not None and self._sentinel.stdin is not None:
            allowed = self.limit_seconds() + 3 * self.config.heartbeat_seconds
            with suppress(OSError):  # it may have been killed; this thread still watches
                self._sentinel.stdin.write(b"%f\n" % allowed)


class _Peers:
    """What the files of the other ranks say, compared between looks: no two clocks are compared."""

    def __init__(self, own: Watchdog) -> None:
        self._own = own
        self._look_at = self._every = 0.0
        self._written: dict[int, tuple[Any, ...]] = {}
        self._heard: dict[int, float] = {}  # when a file was last seen to have changed
        self._deadlines: dict[int, float] = {}

    def forget(self) -> None:
        """Begin anew: what is known is too old."""
        if self._written:
            self._written, self._heard, self._deadlines, self._look_at = {}, {}, {}, 0.0

    def look(self, now: float, every_seconds: float) -> None:
        """Read the files, if the last look was ``every_seconds`` ago."""
        if self._own.world == 1 or now < self._look_at:
            return
        self._look_at, self._every = now + every_seconds, every_seconds
        for h in read_heartbeats(self._own.folder):
            written = (h.time, h.pid, h.host)
            changed = self._written.get(h.rank, written) != written
            self._written[h.rank] = written
            if h.phase in (ENDED, FAILED):
                self._heard.pop(h.rank, None)
                self._deadlines.pop(h.rank, None)
            elif changed:  # its watchdog writes, so it is alive
                self._heard[h.rank] = now
                self._deadlines[h.rank] = now - h.age_seconds + h.limit_seconds

    def deadline(self) -> float:
        """When the last rank that is alive will have overstayed."""
        return max(self._deadlines.values(), default=0.0)

    def alive(self) -> set[int]:
        """Other ranks whose files change."""
        longest = 3 * (self._every + self._own.config.heartbeat_seconds)
        now = time.monotonic()
        return {r for r, at in self._heard.items() if now - at < longest and r != self._own.rank}

    def suspects(self) -> str:
        """The ranks that hold the others up, with host and process."""
        own = self._own
        known = {h.rank: h for h in read_heartbeats(own.folder) if h.rank < own.world}
        others = [rank for rank in range(own.world) if rank != own.rank]
        alive = self.alive()
        silent = [known[r] for r in others if r in known and r not in alive]
        missing = [r for r in others if r not in known]
        if silent or missing:
            names = [f"{_name(h)}, silent for {h.written_seconds_ago:.0f} s" for h in silent]
            return _join([*names, *(f"rank {r}, which has written no heartbeat" for r in missing)])
        behind = min((h.position for h in known.values()), default=0)
        return _join([_name(h) for h in known.values() if h.position == behind]) or "unknown"


def _name(h: Heartbeat) -> str:
    return f"rank {h.rank} ({h.host}, process {h.pid}; {h.phase!r} at {h.samples:,} samples)"


def _join(names: Sequence[str], most: int = 8) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return "; ".join([*names[:most], *more])


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return -1


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, but not synced to disk: it is written every few seconds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # a full disk does not stop the run here
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
