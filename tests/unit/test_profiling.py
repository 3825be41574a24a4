"""What `train --profile` leaves."""

import json
import time
from pathlib import Path

import torch

from pretrain.profiling import Profiler, awaited, phase


def work(folder: Path, steps: int, rank: int = 0) -> Profiler:
    """``steps`` profiled steps of a matrix product."""
    a = torch.randn(64, 64)
    with Profiler(folder, rank, steps=3, warmup=1) as profiler:
        for _ in awaited(slow(steps)):
            with phase("forward"):
                a @ a
            profiler.step()
    return profiler


def slow(n: int):
    for i in range(n):
        time.sleep(0.01)
        yield i


def test_trace_and_table(tmp_path: Path) -> None:
    assert work(tmp_path / "profile", 6).done
    trace = json.loads((tmp_path / "profile/trace-rank0.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert "aten::mm" in names and "phase/forward" in names
    table = (tmp_path / "profile/table.txt").read_text()
    assert "aten::mm" in table and table.startswith("3 steps, ")
    rows = {line.split()[0]: float(line.split()[1]) for line in table.splitlines()[1:4]}
    assert list(rows) == ["data", "forward", "other"]
    # Three steps wait 10 ms each.
    assert 0.02 < rows["data"] < 3 and rows["data"] > rows["forward"]


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path: Path) -> None:
    work(tmp_path, 3)
    assert (tmp_path / "table.txt").read_text().startswith(("2 steps", "3 steps"))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    work(tmp_path, 6, rank=1)
    assert not any(tmp_path.iterdir())
