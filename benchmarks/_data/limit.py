"""The bare limit: processes that decode JPEG bytes from memory into a batch's memory, and nothing
else: no order, no file, no queue."""

import json
import multiprocessing
import sys
import tarfile
from pathlib import Path

import numpy as np

from benchmarks._data.measure import Arrivals, Task, hash_of
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


def _work(task: Task, worker: int) -> None:
    shards = task.shards[worker :: task.workers]
    pictures = [encoded for encoded, _ in samples_of(list(shards))]
    np.random.default_rng(worker).shuffle(pictures)  # as in a shuffled epoch: mixed sizes
    batch = np.empty((task.batch, 3, task.size, task.size), np.uint8)
    arrivals = Arrivals(task.arrivals)
    at = 0
    while True:
        for row in range(task.batch):
            batch[row] = decode(pictures[at % len(pictures)], task.size)
            at += 1
        arrivals.add(worker, task.batch)


def deliver(task: Task) -> None:
    """Workers that never end."""
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(task, i), daemon=True) for i in range(task.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    raise SystemExit(f"workers of the limit ended with {[w.exitcode for w in workers]}")


def pixels(task: Task) -> dict[str, list[str]]:
    """A hash of every picture with its caption."""
    samples = samples_of(list(task.shards))
    return {"hashes": sorted(hash_of(decode(e, task.size).tobytes(), c) for e, c in samples)}


if __name__ == "__main__":
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    if task.mode == "deliver":
        deliver(task)
    else:
        Path(sys.argv[2]).write_text(json.dumps(pixels(task)))
