"""`train --profile`: what a step's time goes to, as a trace and a table."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function, schedule

T = TypeVar("T")

PHASE = "phase/"
ROWS = 40


def phase(name: str) -> AbstractContextManager[Any]:
    """Mark what runs inside as a phase of the step. Some microseconds where nothing is profiled."""
    return record_function(PHASE + name)


def awaited(items: Iterable[T]) -> Iterator[T]:
    """``items``, the wait for each marked as the phase "data"."""
    iterator = iter(items)
    while True:
        with phase("data"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


class Profiler:
    """Profiles ``steps`` steps after ``warmup`` ones on the main rank; nothing on the others.

    Writes ``folder/trace-rank0.json`` (for chrome://tracing or Perfetto) and ``folder/table.txt``:
    seconds by phase, then the operations with most time of their own. A run that ends before leaves
    what there is.

    Args:
        folder: made when it is written.
        rank: of this process.
        steps, warmup: how many; the first step of a run is unlike the others.
    """

    def __init__(self, folder: str | Path, rank: int = 0, steps: int = 5, warmup: int = 2) -> None:
        self.folder, self.rank, self.steps = Path(folder), rank, steps
        self.done = False
        self._profile: profile | None = None
        if rank == 0:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=warmup, active=steps, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,
            )

    def __enter__(self) -> Self:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profile is not None:
            self._profile.stop()

    def step(self) -> None:
        """The end of a step."""
        if self._profile is not None and not self.done:
            self._profile.step()

    def _write(self, finished: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self.folder / f"trace-rank{self.rank}.json"))
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        averages = finished.key_averages()
        operations = averages.table(sort_by=key, row_limit=ROWS, max_name_column_width=60)
        text = "\n".join([*_phases(averages), "", operations])
        (self.folder / "table.txt").write_text(text + "\n", encoding="utf-8")
        self.done = True


def _phases(averages: Any) -> list[str]:
    """Seconds by phase of the profiled steps; "other" is the rest of their time."""
    steps = [e for e in averages if e.key.startswith("ProfilerStep")]
    total = sum(e.cpu_time_total for e in steps) / 1e6
    count = sum(e.count for e in steps)
    seconds = {
        e.key.removeprefix(PHASE): e.cpu_time_total / 1e6
        for e in averages
        if e.key.startswith(PHASE) and e.device_type == DeviceType.CPU
    }
    seconds["other"] = total - sum(seconds.values())
    rows = [f"{count} steps, {total:.3f} s on this process's clock"]
    rows += [
        f"  {name:<12}{value:>10.3f} s  {value / total if total else 0:>6.1%}"
        for name, value in seconds.items()
    ]
    return rows
