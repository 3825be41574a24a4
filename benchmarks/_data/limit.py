"""The bare limit: processes that decode JPEG bytes from memory into a batch's memory, and nothing
else: no order, no file, no queue."""

import json
import multiprocessing
import sys
import tarfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._data.measure import Task, hash_of
from benchmarks._data.picture import decode


def samples_of(shards: list[str]) -> list[tuple[bytes, str]]:
    """(JPEG, caption) of every sample."""
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        stems = (name.removesuffix(".jpg") for name in files if name.endswith(".jpg"))
        found += [(files[f"{stem}.jpg"], files[f"{stem}.txt"].decode()) for stem in stems]
    return found


def _work(task: Task, worker: int, together: Barrier, rates: Any, cpu_seconds: Any) -> None:
    shards = task.shards[worker :: task.workers]
    pictures = [encoded for encoded, _ in samples_of(list(shards))]
    np.random.default_rng(worker).shuffle(pictures)  # as in a shuffled epoch: mixed sizes
    batch = np.empty((task.batch, 3, task.size, task.size), np.uint8)
    at = 0

    def fill(batches: int) -> None:
        nonlocal at
        for _ in range(batches):
            for row in range(task.batch):
                batch[row] = decode(pictures[at % len(pictures)], task.size)
                at += 1

    fill(task.warm_up // task.workers)
    together.wait()
    start, cpu_start = time.perf_counter(), time.process_time()
    mine = task.batches // task.workers
    fill(mine)
    rates[worker] = mine * task.batch / (time.perf_counter() - start)
    cpu_seconds[worker] = time.process_time() - cpu_start
    together.wait()


def rate(task: Task) -> dict[str, float]:
    """Sum of the workers' images a second; and their processor time, an image."""
    context = multiprocessing.get_context("fork")
    together = context.Barrier(task.workers)
    rates, cpu_seconds = (context.Array("d", task.workers) for _ in range(2))
    workers = [
        context.Process(target=_work, args=(task, i, together, rates, cpu_seconds))
        for i in range(task.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(f"a worker of the limit ended with {[w.exitcode for w in workers]}")
    done = task.batches * task.batch
    return {
        "images_per_second": sum(rates),
        "cpu_ms_per_image": sum(cpu_seconds) * 1000 / done,
    }


def pixels(task: Task) -> dict[str, list[str]]:
    """A hash of every picture with its caption."""
    samples = samples_of(list(task.shards))
    return {"hashes": sorted(hash_of(decode(e, task.size).tobytes(), c) for e, c in samples)}


if __name__ == "__main__":
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    result = {"rate": rate, "pixels": pixels}[task.mode](task)
    Path(sys.argv[2]).write_text(json.dumps(result))
