"""The benchmark's clock: contestants that stand still deliver nothing, and what they deliver in
their slices is counted right."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks._data import slices, tree


def entry(name: str, **task: Any) -> slices.Entry:
    return slices.Entry(name, sys.executable, "tests.support.ticker", task, lanes=2)


def test_a_rate_is_what_came_after_a_lanes_first_arrival_in_any_bunches() -> None:
    second = 10**9
    # Lane 1 waits for lane 0, as workers that deliver in turn do: two come at once.
    bunched = [(n * second, lane, 64) for n in range(3, 7) for lane in (0, 1)]
    assert slices.rate(bunched, 2) == pytest.approx(128)
    slow = [(n * second, 0, 10) for n in range(5)] + [(2 * n * second, 1, 10) for n in range(3)]
    assert slices.rate(sorted(slow), 2) == pytest.approx(15)
    assert slices.rate(bunched[:2], 2) is None  # one arrival is no time
    assert slices.rate([one for one in bunched if one[1]], 2) is None  # a lane without any


def test_a_median_lies_in_its_interval() -> None:
    found = slices.spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found["median"] == 3 and found["from"] < 3 < found["to"]
    assert (found["quarter"], found["three_quarters"], found["count"]) == (2, 4, 5)
    assert slices.spread([2.0])["from"] == slices.spread([2.0])["to"] == 2


def test_who_is_stopped_delivers_nothing_until_its_slice(tmp_path: Path) -> None:
    contender = slices.Contender(entry("ticker", pause=0.005, amount=3), tmp_path)
    try:
        contender.warm_up()
        assert not tree.running(contender.pid) and len(list(tree.pids(contender.pid))) == 2
        before = contender.arrivals.stat().st_size
        time.sleep(0.2)
        assert contender.arrivals.stat().st_size == before
        found = contender.slice(0.3)
        assert found is not None and found.seconds >= 0.3
        assert 300 < found.rate < 2 * 3.5 / 0.005
        after = contender.arrivals.stat().st_size
        assert after > before
        time.sleep(0.1)
        assert contender.arrivals.stat().st_size == after
        pids = list(tree.pids(contender.pid))
    finally:
        contender.end()
    deadline = time.monotonic() + 10  # a killed process takes its moment
    while left := [pid for pid in pids if Path(f"/proc/{pid}/cwd").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_rounds_turn_and_who_fails_is_left_out() -> None:
    race = slices.race(
        [
            entry("one", pause=0.004, amount=10),
            entry("two", pause=0.008, amount=10),
            entry("ends", pause=0.004, amount=10, deliveries=20),
            slices.Entry("never", sys.executable, "tests.support.no_such_module", {}, lanes=1),
        ],
        rounds=3,
        seconds=0.15,
        unit="ticks/s",
    )
    assert "no_such_module" in race.failed["never"]
    assert "has run down" in race.failed["ends"]
    assert all({"one", "two"} <= set(r) for r in race.rounds) and "never" not in race.rounds[0]
    first = [next(iter(r)) for r in race.rounds]
    assert first[0] != first[1] and first[0] != first[2]
    assert 1.3 < slices.spread(race.ratios("one", "two"))["median"] < 2.5
