"""Contestants that are all started, stand still, and get the machine in turn for seconds at a time.

A machine that others share changes its speed by a third within seconds, so that whole runs, one
after another, say more about the machine than about the code. Here every contestant is warmed up
once and stopped (SIGSTOP, its whole process tree); then, in rounds whose order turns, each goes on
(SIGCONT) for a slice and is stopped again. Ratios are taken within a round.
"""

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks._data import tree
from benchmarks._data.corpus import ROOT
from benchmarks._data.measure import ARRIVAL, Task
from benchmarks._data.process import Failed

WARM = 8  # deliveries of each lane before a contestant is warm
LEAST = 5  # deliveries of each lane in a slice; it is longer if they take longer
LONGEST = 12  # times the slice's seconds, after which it ends whatever has come
SECONDS_TO_WARM = 300.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Entry:
    """How a contestant is started: ``python -m module`` on a task, whose field ``arrivals`` is
    filled in here, with some more environment variables."""

    name: str
    python: str
    module: str
    task: Task | dict[str, Any]
    lanes: int
    environment: dict[str, str] | None = None


@dataclass(frozen=True)
class Slice:
    """What a contestant did while it had the machine.

    Attributes:
        rate: of what it delivers, a second: in each lane from the first arrival within the slice
            to the last, so that nothing counts that was done in part before, all lanes together.
        cpu_seconds: processor time of all its processes over ``seconds``.
        rss_bytes: at the end, of all its processes; what they share counts in each.
    """

    rate: float
    seconds: float
    cpu_seconds: float
    rss_bytes: int

    @property
    def cpu_ms(self) -> float:
        """Processor time in ms for one of what it delivers."""
        return 1000 * self.cpu_seconds / self.seconds / self.rate


class Contender:
    """One contestant's processes, a session of their own."""

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.entry, self._folder = entry, folder
        self.arrivals = folder / "arrivals"
        self.arrivals.touch()
        given = {"arrivals": str(self.arrivals)}
        task = entry.task
        fields = asdict(replace(task, **given)) if is_dataclass(task) else task | given
        (folder / "task").write_text(json.dumps(fields))
        self.started = time.monotonic_ns()
        with (folder / "log").open("wb") as stream:
            self._process = subprocess.Popen(
                [entry.python, "-m", entry.module, str(folder / "task"), str(folder / "result")],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (entry.environment or {}),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.pid = self._process.pid  # and the number of its group
        self.first_seconds = 0.0

    def warm_up(self) -> None:
        """Wait until every lane has delivered a few times, and stop it.

        Raises:
            Failed: it ended or did not deliver in time.
        """
        ends = time.monotonic() + SECONDS_TO_WARM
        while not self._enough(0, WARM):
            if time.monotonic() > ends:
                raise Failed(f"not warm in {SECONDS_TO_WARM:.0f} s; {self._last_words()}")
            self._check_alive()
            time.sleep(POLL_SECONDS)
        self.first_seconds = (self._since(0)[0][0] - self.started) / 1e9
        self._halt()

    def slice(self, seconds: float) -> Slice | None:
        """Let it have the machine; None if too little arrived.

        Raises:
            Failed: it ended.
        """
        place = self.arrivals.stat().st_size
        cpu_before, start = tree.cpu_seconds(self.pid), time.monotonic()
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        while not self._enough(place, LEAST) and time.monotonic() - start < LONGEST * seconds:
            time.sleep(POLL_SECONDS)
        self._halt()
        took = time.monotonic() - start
        cpu = tree.cpu_seconds(self.pid) - cpu_before
        self._check_alive()
        found = rate(self._since(place), self.entry.lanes)
        return found and Slice(found, took, cpu, tree.rss_bytes(self.pid))

    def end(self) -> None:
        """Kill all of it."""
        others = list(tree.pids(self.pid))
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _halt(self) -> None:
        """Stop every process, and return when all stand still."""
        ends = time.monotonic() + 5
        self._signal(signal.SIGSTOP)
        while tree.running(self.pid):
            if time.monotonic() > ends:
                raise Failed("a process could not be stopped")
            time.sleep(0.002)
            self._signal(signal.SIGSTOP)  # one that was just being started

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)  # all at once
        for pid in tree.pids(self.pid):
            with suppress(ProcessLookupError):
                if os.getpgid(pid) != self.pid:  # one that made a group of its own
                    os.kill(pid, number)

    def _since(self, place: int) -> list[tuple[int, int, int]]:
        with self.arrivals.open("rb") as stream:
            stream.seek(place)
            data = stream.read()
        return list(ARRIVAL.iter_unpack(data[: len(data) // ARRIVAL.size * ARRIVAL.size]))

    def _enough(self, place: int, count: int) -> bool:
        if (self.arrivals.stat().st_size - place) // ARRIVAL.size < count * self.entry.lanes:
            return False
        lanes = [lane for _, lane, _ in self._since(place)]
        return all(lanes.count(lane) >= count for lane in range(self.entry.lanes))

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise Failed(self._last_words())

    def _last_words(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-2000:]


def rate(arrivals: Sequence[tuple[int, int, int]], lanes: int) -> float | None:
    """Amount a second of (nanoseconds, lane, amount): in each lane from its first to its last
    arrival, all lanes together; None if one has fewer than two."""
    by_lane = defaultdict(list)
    for at, lane, amount in arrivals:
        by_lane[lane].append((at, amount))
    if len(by_lane) < lanes or any(len(found) < 2 for found in by_lane.values()):
        return None
    return sum(
        1e9 * sum(amount for _, amount in found[1:]) / (found[-1][0] - found[0][0])
        for found in by_lane.values()
    )


@dataclass(frozen=True)
class Race:
    """What came of it: ``rounds``, each with the slices by name; ``first_seconds`` from a process's
    start to its first delivery; ``failed`` with a contestant's last words."""

    rounds: list[dict[str, Slice]]
    first_seconds: dict[str, float]
    failed: dict[str, str]

    def ratios(self, one: str, other: str, *, cpu: bool = False) -> list[float]:
        """Rate of ``one`` over that of ``other`` in each round that has both; with ``cpu``, the
        processor time of ``other`` over that of ``one``."""
        pairs = [(r[one], r[other]) for r in self.rounds if one in r and other in r]
        return [b.cpu_ms / a.cpu_ms if cpu else a.rate / b.rate for a, b in pairs]


def race(entries: Sequence[Entry], rounds: int, seconds: float, unit: str) -> Race:
    """Start all, one after the other, then give each its slices.

    Every two rounds the order turns by one, and the second of them runs it backwards: each
    contestant comes before and after each other equally often.
    """
    found: list[dict[str, Slice]] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running: dict[str, Contender] = {}
        for number, entry in enumerate(entries):
            (Path(folder) / str(number)).mkdir()
            contender = Contender(entry, Path(folder) / str(number))
            stack.callback(contender.end)
            try:
                contender.warm_up()
                running[entry.name] = contender
                print(f"{entry.name}: warm after {contender.first_seconds:.1f} s", flush=True)
            except Failed as error:
                failed[entry.name] = str(error)
                print(f"{entry.name} failed:\n{error}", flush=True)
        for number in range(rounds):
            names = list(running)
            turn = number // 2 % max(1, len(names))
            order = names[turn:] + names[:turn]
            slices = {}
            for name in order[:: -1 if number % 2 else 1]:
                try:
                    one = running[name].slice(seconds)
                    if one is not None:
                        slices[name] = one
                except Failed as error:
                    failed[name] = str(error)
                    del running[name]
                    print(f"{name} failed:\n{error}", flush=True)
            found.append(slices)
            line = ", ".join(f"{n} {slices[n].rate:.0f}" for n in names if n in slices)
            print(f"round {number + 1}/{rounds}, {unit}: {line}", flush=True)
        first = {name: one.first_seconds for name, one in running.items()}
    return Race(found, first, failed)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, the 95% interval of it (bootstrap: medians of as many drawn with replacement,
    10,000 times), the quartiles, and how many there are."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(10_000))
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "median": median(values),
        "from": medians[250],
        "to": medians[9_749],
        "quarter": low,
        "three_quarters": high,
        "count": len(values),
    }
