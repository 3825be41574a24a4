"""What a contestant's process does: take batches from its loader and note when each came, or
hash their pixels.

Every contestant is `python -m benchmarks._data.NAME TASK.json RESULT.json` and calls `main` with a
function that makes its loader.
"""

import hashlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARRIVAL = struct.Struct("<qqq")  # nanoseconds of the monotonic clock, lane, amount


@dataclass(frozen=True)
class Task:
    """What to do.

    Attributes:
        mode: ``deliver`` or ``pixels``.
        shards: webdataset tars.
        manifest, tokenizer: ours.
        converted: folder of the shards as the contestant keeps them.
        batch, workers, size: samples of a batch, processes, pixels on a side.
        batches: of mode ``pixels``, at most an epoch.
        times: that the samples are listed again and again in an epoch, to make it a long one.
        arrivals: file that takes an `ARRIVAL` for each batch, of mode ``deliver``.
        cache: of our loader, for remote shards.
        streams: whether our loader's order reads few shards at a time.
    """

    mode: str
    shards: tuple[str, ...]
    manifest: str
    tokenizer: str
    converted: str
    batch: int
    workers: int
    size: int
    batches: int = 0
    times: int = 1
    arrivals: str = ""
    cache: str = ""
    streams: bool = False


# (images (B, 3, size, size) uint8, the captions), endless or not.
Batches = Iterable[tuple[Any, Iterable[str]]]


class Arrivals:
    """Notes what arrived when, for the process that holds the clock; several processes may append
    to one file."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def add(self, lane: int, amount: int) -> None:
        """``amount`` has come from a lane: a worker, whose deliveries come one after another."""
        os.write(self._file, ARRIVAL.pack(time.monotonic_ns(), lane, amount))


def main(make: Callable[[Task], Batches]) -> None:
    """Do the task of the command line with ``make``'s loader."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    batches = iter(make(task))
    if task.mode == "deliver":
        deliver(task, batches)
    else:
        Path(sys.argv[2]).write_text(json.dumps(pixels(task, batches)))


def deliver(task: Task, batches: Iterator[tuple[Any, Iterable[str]]]) -> None:
    """Take every batch as soon as there is one. Workers deliver in turn."""
    arrivals = Arrivals(task.arrivals)
    for number, (images, _) in enumerate(batches):
        _check(task, images)
        arrivals.add(number % task.workers, task.batch)


def pixels(task: Task, batches: Iterator[tuple[Any, Iterable[str]]]) -> dict[str, list[str]]:
    """A hash of every picture with its caption, over one epoch or less, sorted."""
    found = []
    for _ in range(task.batches):
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
