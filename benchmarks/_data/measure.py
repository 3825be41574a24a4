"""What a contestant's process does: take batches from its loader, by the clock or for their pixels.

Every contestant is `python -m benchmarks._data.NAME TASK.json RESULT.json` and calls `main` with a
function that makes its loader. The clock runs from batch `warm_up` to batch `warm_up + batches`,
inside one epoch: starts and ends of epochs are in nobody's figure. Both numbers are multiples of
the number of workers, which deliver in turn, so that no work done before the clock started counts.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._data import tree


@dataclass(frozen=True)
class Task:
    """What to do.

    Attributes:
        mode: ``rate`` or ``pixels``.
        shards: webdataset tars.
        manifest, tokenizer: ours.
        converted: folder of the shards as the contestant keeps them.
        batch, workers, size: samples of a batch, processes, pixels on a side.
        warm_up, batches: batches before the clock starts, and on the clock.
        started: when the process was started, by the clock of the day.
        cache: of our loader, for remote shards.
    """

    mode: str
    shards: tuple[str, ...]
    manifest: str
    tokenizer: str
    converted: str
    batch: int
    workers: int
    size: int
    warm_up: int
    batches: int
    started: float = 0.0
    cache: str = ""


# (images (B, 3, size, size) uint8, the captions), endless or not.
Batches = Iterable[tuple[Any, Iterable[str]]]


def main(make: Callable[[Task], Batches]) -> None:
    """Do the task of the command line with ``make``'s loader; write the result as JSON."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    result = {"rate": rate, "pixels": pixels}[task.mode](task, iter(make(task)))
    Path(sys.argv[2]).write_text(json.dumps(result))


def rate(task: Task, batches: Iterator[tuple[Any, Iterable[str]]]) -> dict[str, float]:
    """Images a second; processor time of all processes together, an image; and seconds from the
    process's start to the first batch."""
    _check(task, next(batches)[0])
    first_seconds = time.time() - task.started
    for _ in range(task.warm_up - 1):
        next(batches)
    cpu_seconds, start = tree.cpu_seconds(os.getpid()), time.perf_counter()
    for _ in range(task.batches):
        images, _ = next(batches)
    seconds = time.perf_counter() - start
    cpu_seconds = tree.cpu_seconds(os.getpid()) - cpu_seconds
    _check(task, images)
    return {
        "images_per_second": task.batches * task.batch / seconds,
        "cpu_ms_per_image": cpu_seconds * 1000 / (task.batches * task.batch),
        "first_batch_seconds": first_seconds,
    }


def pixels(task: Task, batches: Iterator[tuple[Any, Iterable[str]]]) -> dict[str, list[str]]:
    """A hash of every picture with its caption, over one epoch or less, sorted."""
    found = []
    for _ in range(task.warm_up + task.batches):
        images, captions = next(batches)
        _check(task, images)
        for image, caption in zip(images, captions, strict=True):
            found.append(hash_of(image.numpy().tobytes(), caption))
    return {"hashes": sorted(found)}


def hash_of(pixels: bytes, caption: str) -> str:
    """Of one sample."""
    return hashlib.sha256(pixels + caption.encode()).hexdigest()[:16]


def _check(task: Task, images: Any) -> None:
    expected = (task.batch, 3, task.size, task.size)
    if tuple(images.shape) != expected or "uint8" not in str(images.dtype):
        raise SystemExit(f"a batch is {tuple(images.shape)} {images.dtype}, not {expected} uint8")


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": median(values), "least": min(values), "greatest": max(values)}
