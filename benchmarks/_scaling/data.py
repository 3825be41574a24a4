"""Who reads what, by the order itself, and what a rank holds of a corpus, by its real manifest."""

import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data import simulate
from pretrain.data.manifest import Manifest, Shards
from pretrain.data.order import EpochOrder

SHARDS, SAMPLES, SHARD_BYTES = 100_000, 1_000_000_000, simulate.GIB


@dataclass(frozen=True)
class Reads:
    """An epoch of 10^9 samples in 10^5 shards of about 1 GiB.

    Attributes:
        amplification: bytes that all ranks fetch, each shard whole, over the corpus's.
        unevenness: the most that a rank reads of its own samples over the mean, less 1.
        shards_at_once: that a rank needs at one moment, at most.
        locate_seconds: of finding a rank's 2,048 / ranks samples of a step: what order costs.
    """

    ranks: int
    amplification: float
    unevenness: float
    shards_at_once: int
    locate_seconds: float


@dataclass(frozen=True)
class Held:
    """A manifest of so many shards.

    Attributes:
        file_bytes: of its JSON, which every rank and worker reads once.
        load_seconds: of reading it.
        memory_bytes: that Python holds of it after.
        locate_seconds: of 2,048 samples in the order over it.
    """

    shards: int
    file_bytes: int
    load_seconds: float
    memory_bytes: int
    locate_seconds: float


def reads(ranks: tuple[int, ...]) -> list[Reads]:
    """By number of ranks."""
    sizes, nbytes = simulate.synthetic(SHARDS, SAMPLES, SHARD_BYTES)
    order = EpochOrder(sizes, 0)
    found = []
    for n in ranks:
        plan = simulate.plan(order, nbytes, n)
        own = plan.per_rank.own_bytes
        found.append(
            Reads(
                n,
                plan.amplification(plan.per_rank),
                float(own.max() / own.mean() - 1),
                int(plan.per_rank.queue_shards.max()),
                _locate(order, np.arange(0, 2048, n)),
            )
        )
    return found


def held(shards: int) -> Held:
    """By number of shards."""
    sizes, nbytes = simulate.synthetic(shards, shards * 10_000, SHARD_BYTES)
    columns = {
        "url": [f"{n:06d}.tar" for n in range(shards)],
        "sha256": [f"{n:064x}" for n in range(shards)],
        "version": [f"{n:032x}" for n in range(shards)],
        "samples": sizes.tolist(),
        "bytes": [int(b) for b in nbytes],
        "unpacked": [int(b) for b in nbytes],
        "aspects": [()] * shards,
    }
    with tempfile.TemporaryDirectory() as root:
        path = str(Path(root, "train.json"))
        Manifest(Shards.of_columns(columns), root).save(path)
        tracemalloc.start()
        began = time.perf_counter()
        manifest = Manifest.load(path, versions=False)
        seconds = time.perf_counter() - began
        memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        size = Path(path).stat().st_size
    order = EpochOrder(manifest.sizes, 0)
    return Held(shards, size, seconds, memory, _locate(order, np.arange(2048)))


def _locate(order: EpochOrder, numbers: np.ndarray) -> float:  # type: ignore[type-arg]
    order.locate(numbers)  # the layout of the epoch is kept
    began = time.perf_counter()
    for _ in range(5):
        order.locate(numbers)
    return (time.perf_counter() - began) / 5
