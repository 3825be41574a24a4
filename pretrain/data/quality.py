"""How far an order of samples is from a uniform permutation.

An order is given as origins_N: the place in the shards, joined as they are numbered, of the sample
at each position.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.order import I64, EpochOrder

_SHARDS = 256  # whose spread is measured


@dataclass(frozen=True)
class Quality:
    """Distances from a uniform permutation; the value a uniform one has (on average) in brackets.

    Attributes:
        displacement: mean |position - origin|, as a share of N/3 [1]. Not reading in order.
        neighbours: pairs of consecutive samples from one shard, over the number expected [1].
            Above 1 they come in runs; below 1 lanes keep them apart.
        batch_shards: mean number of different shards in ``batch`` consecutive samples, over the
            number expected [1]. How mixed a batch is.
        spread: Kolmogorov-Smirnov distance of the positions where a shard's samples land from
            the uniform distribution, mean over shards [~0.87 / sqrt(samples of a shard)]. 0.75
            where each shard is read at one moment: few reads are bought with it.
        spread_worst: the largest over shards.
        deciles: chi-square of (decile of origin x decile of position), over its 81 degrees of
            freedom [1]. Parts of the corpus that stay together.
    """

    displacement: float
    neighbours: float
    batch_shards: float
    spread: float
    spread_worst: float
    deciles: float


def origins_of(order: EpochOrder, epoch: int = 0) -> I64:
    """origins_N of an epoch; 8 bytes a sample."""
    start = epoch * order.num_samples
    shards, indices = order.locate(np.arange(start, start + order.num_samples))
    starts = np.cumsum(order.sizes) - order.sizes
    origins: I64 = starts[shards] + indices
    return origins


def quality(order: EpochOrder, epoch: int = 0, batch: int = 256) -> Quality:
    """Distances of one epoch of ``order``."""
    return measure(origins_of(order, epoch), order.sizes, batch)


def measure(origins_N: I64, sizes: npt.ArrayLike, batch: int = 256) -> Quality:
    """Distances of a given order of shards of ``sizes``."""
    sizes = np.asarray(sizes, dtype=np.int64)
    total = len(origins_N)
    positions = np.arange(total)
    shards = np.searchsorted(np.cumsum(sizes), origins_N, side="right")

    same = np.count_nonzero(shards[1:] == shards[:-1]) / max(1, total - 1)
    expected = float((sizes * (sizes - 1.0)).sum() / max(1.0, total * (total - 1.0)))
    distances = _spread(shards, sizes)
    table = np.bincount(origins_N * 10 // total * 10 + positions * 10 // total, minlength=100)
    cell = np.bincount(positions * 10 // total, minlength=10) / total
    model = np.outer(cell, cell).reshape(-1) * total
    return Quality(
        displacement=float(np.abs(positions - origins_N).mean() / (total / 3)),
        neighbours=same / expected if expected else 1.0,
        batch_shards=_batch_shards(shards, sizes, min(batch, total)),
        spread=float(distances.mean()),
        spread_worst=float(distances.max()),
        deciles=float(((table - model) ** 2 / np.maximum(model, 1e-9)).sum() / 81),
    )


def _batch_shards(shards: I64, sizes: I64, batch: int) -> float:
    whole = len(shards) // batch * batch
    rows = np.sort(shards[:whole].reshape(-1, batch), axis=1)
    found = 1 + np.count_nonzero(np.diff(rows, axis=1), axis=1).mean()
    total = len(shards)
    # A shard of s samples is missed by `batch` draws without replacement.
    missed = np.ones(len(sizes))
    for i in range(batch):
        missed *= np.maximum(total - sizes - i, 0) / (total - i)
    return float(found / (1 - missed).sum())


def _spread(shards: I64, sizes: I64) -> npt.NDArray[np.float64]:
    """The Kolmogorov-Smirnov distance of each shard, of up to `_SHARDS` evenly chosen."""
    total = len(shards)
    sorting = np.argsort(shards, kind="stable")  # positions, shard by shard, increasing
    filled, counts = np.unique(shards, return_counts=True)
    ends = np.cumsum(counts)
    chosen = np.unique(np.linspace(0, len(filled) - 1, _SHARDS).astype(int))
    distances = []
    for i in chosen:
        count = counts[i]
        at = (sorting[ends[i] - count : ends[i]] + 0.5) / total
        steps = np.arange(count + 1) / count
        distances.append(max((steps[1:] - at).max(), (at - steps[:-1]).max()))
    return np.array(distances)
