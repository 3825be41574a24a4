"""Where a run stands, counted in samples; when something is due; and what a person sees of it."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain import comm


@dataclass
class Progress:
    """Saved with each checkpoint and restored from it.

    Attributes:
        samples: seen so far; a step that was refused counts, for its samples were read.
        global_batch: samples of the last step.
        steps: optimizer steps.
        skipped: steps that changed no weight: refused, or of samples that are left out.
        bad_steps: refused, in a row, up to now.
        rewinds: how often the run went back to its last good state.
        left_out: sample numbers [start, stop) that are not learned from after a rewind.
        rejects: samples that the loader refused, by reason (of the ranks' own batches, summed at
            each log).
        seconds: spent in training steps, evaluation and saving excluded.
        first, last: mean metrics of the first and the last log interval.
    """

    samples: int = 0
    global_batch: int = 0
    steps: int = 0
    skipped: int = 0
    bad_steps: int = 0
    rewinds: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    rejects: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def advance(self, samples: int, refused: bool) -> None:
        """Count one step of ``samples`` samples."""
        self.samples += samples
        self.global_batch = samples
        self.skipped += refused
        self.steps += not refused

    def leaves_out(self, start: int, stop: int) -> bool:
        """Whether one of the samples [start, stop) is to be left out."""
        return any(first < stop and start < last for first, last in self.left_out)

    def due(self, every_samples: int | None) -> bool:
        """Whether the last step crossed a multiple of ``every_samples``."""
        if every_samples is None:
            return False
        return self.samples // every_samples > (self.samples - self.global_batch) // every_samples


class Display:
    """A live line on a terminal, plain lines in a log; rank 0 only.

    Args:
        total: samples of the whole run.
        done: samples seen before this start.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._live: Any = None
        self._task: Any = None
        self._began = time.monotonic()
        if comm.is_main() and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._live = Progress(
                TextColumn("[bold]train"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} samples"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._task = self._live.add_task("train", total=total, completed=done, line="")
            self._live.start()

    def step(self, samples: int) -> None:
        """Move the bar."""
        if self._live:
            self._live.update(self._task, completed=samples)

    def line(self, samples: int, metrics: Mapping[str, float]) -> None:
        """The latest losses, speed and time left."""
        if not comm.is_main():
            return
        speed = metrics["images_per_second"]
        left = (self.total - samples) / speed if speed else 0.0
        losses = "  ".join(
            f"{k.removesuffix('/loss')} {v:.3f}" for k, v in metrics.items() if k.endswith("/loss")
        )
        text = f"{losses}  {speed:.1f} img/s  {int(left // 60)}:{int(left % 60):02d} left"
        if self._live:
            self._live.update(self._task, completed=samples, line=text)
        else:
            print(f"[train] {samples:>9,}/{self.total:,} samples  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not comm.is_main():
            return
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Stop the live line."""
        if self._live:
            self._live.stop()
