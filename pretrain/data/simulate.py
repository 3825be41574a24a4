"""Who reads what: the reads of an epoch on any number of ranks, without visiting its samples.

From the order's own layout (shards of an epoch, lanes, windows) it follows which rank reads how
much of which shard. A shard of a lane is a segment: there are at most shards + lanes of them, and
windows are counted in ten thousands where samples are counted in billions.

Legend: R ranks, L lanes, g = gcd(L, R): rank r reads lanes that are r modulo g (in epoch 0), each
together with R/g - 1 other ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.data.order import I64, MOST_LANES, EpochOrder
from pretrain.errors import ConfigError

F64 = npt.NDArray[np.float64]
GIB = 1 << 30


@dataclass(frozen=True)
class Readers:
    """What each reader of one kind (all ranks, or all nodes) reads in an epoch; arrays over them.

    Attributes:
        own_bytes: of its samples; what ranged reads fetch. Where R does not divide L, lanes are
            shared and this is the expectation.
        fetched_bytes: of the whole shards it needs, each fetched once for each of its lanes.
            Where lanes are shared, the expectation.
        queue_shards: the most shards it needs at one moment: those of its lanes' current windows.
        cache_bytes: the most bytes that those shards have; a cache must hold them.
    """

    own_bytes: F64
    fetched_bytes: F64
    queue_shards: I64
    cache_bytes: F64


@dataclass(frozen=True)
class ReadPlan:
    """The reads of an epoch."""

    ranks: int
    ranks_per_node: int
    lanes: int
    window: int | None
    shards: int
    samples: int
    bytes: int
    per_rank: Readers
    per_node: Readers

    def amplification(self, readers: Readers) -> float:
        """Bytes fetched by all, over the bytes of the corpus."""
        return float(readers.fetched_bytes.sum()) / self.bytes

    @property
    def divides(self) -> bool:
        """Whether every lane belongs to one rank."""
        return self.lanes % self.ranks == 0


class _Segments(NamedTuple):
    """Runs of one shard in one lane."""

    lane: I64
    samples: I64
    sample_bytes: F64  # of one sample of the shard
    shard_bytes: F64


def plan(
    order: EpochOrder,
    shard_bytes: npt.ArrayLike,
    ranks: int,
    ranks_per_node: int = 8,
    epoch: int = 0,
) -> ReadPlan:
    """The reads of ``epoch`` on ``ranks`` that take every ranks-th number from 0 on.

    Args:
        order: of the samples.
        shard_bytes: of each shard of the order.
        ranks, ranks_per_node: the last node may have fewer.

    Raises:
        ConfigError: there are no ranks, or bytes of another number of shards.
    """
    if ranks < 1 or ranks_per_node < 1:
        raise ConfigError(f"ranks={ranks} on nodes of {ranks_per_node}: both must be at least 1")
    nbytes = np.asarray(shard_bytes, dtype=np.float64)
    if len(nbytes) != len(order.sizes):
        raise ConfigError(
            f"shard_bytes of {len(nbytes)} shards, but the order has {len(order.sizes)}"
        )
    classes = math.gcd(order.lanes, ranks)
    rank_class = np.arange(ranks) % classes
    # Number n = epoch * N + p: the class of lane p % L.
    shift = epoch * order.num_samples % classes
    segments = _ByClass(_segments(order, nbytes, epoch), classes, shift)
    windows = _ByClass(_windows(order, nbytes, epoch), classes, shift)

    def readers(of_rank: I64) -> Readers:
        """Of groups of ranks; those alike, in the share they have of each class, once."""
        known: dict[bytes, tuple[float, float, int, float]] = {}
        rows = []
        for members in np.split(rank_class, np.flatnonzero(np.diff(of_rank)) + 1):
            read, counts = np.unique(members, return_counts=True)
            key = read.tobytes() + counts.tobytes()
            if key not in known:
                share = counts.astype(np.float64) * (classes / ranks)
                known[key] = (*_reads(*segments.of(read, share)), *_peak(windows.of(read)[0]))
            rows.append(known[key])
        own, fetched, queue, cache = (np.array(column) for column in zip(*rows, strict=True))
        return Readers(own, fetched, queue, cache)

    return ReadPlan(
        ranks,
        ranks_per_node,
        order.lanes,
        order.window,
        len(order.sizes),
        order.num_samples,
        int(nbytes.sum()),
        readers(np.arange(ranks)),
        readers(np.arange(ranks) // ranks_per_node),
    )


def better_lanes(order: EpochOrder, ranks: int) -> int | None:
    """The multiple of ``ranks`` nearest to the lanes there are, which gives every lane to one rank;
    None if they are one already, or shards are too few."""
    filled = int(np.count_nonzero(order.sizes))
    if order.lanes % ranks == 0 or ranks > min(filled, MOST_LANES):
        return None
    wanted = max(1, round(order.lanes / ranks)) * ranks
    return wanted if wanted <= min(filled, MOST_LANES) else ranks


def synthetic(
    shards: int, samples: int, shard_bytes: int, spread: float = 0.1, seed: int = 0
) -> tuple[I64, F64]:
    """(samples, bytes) of each of ``shards`` shards of equal counts, and of bytes that vary evenly
    by +- ``spread``.

    Raises:
        ConfigError: no shards or samples, or a spread out of [0, 1).
    """
    if shards < 1 or samples < 1 or shard_bytes < 1 or not 0 <= spread < 1:
        raise ConfigError(
            f"shards={shards}, samples={samples}, bytes of a shard={shard_bytes}, "
            f"spread={spread}: numbers must be at least 1, and the spread in [0, 1)"
        )
    size, more = divmod(samples, shards)
    sizes = size + (np.arange(shards) < more).astype(np.int64)
    factor = 1 + spread * (2 * np.random.default_rng(seed).random(shards) - 1)
    return sizes, shard_bytes * factor


def _segments(order: EpochOrder, nbytes: F64, epoch: int) -> _Segments:
    permuted, bounds = order.layout(epoch)
    lane_starts = order.lane_start(np.arange(order.lanes))
    edges = np.union1d(bounds, lane_starts)
    begins = edges[:-1]
    shard = permuted[np.searchsorted(bounds, begins, side="right") - 1]
    lane = np.searchsorted(lane_starts, begins, side="right") - 1
    return _Segments(lane, np.diff(edges), nbytes[shard] / order.sizes[shard], nbytes[shard])


def _reads(segments: _Segments, share: F64) -> tuple[float, float]:
    """(own bytes, fetched bytes) of a reader that has ``share`` of each segment's lane."""
    own = (segments.samples * segments.sample_bytes * share).sum()
    # The chance that any of a shard's samples, which are permuted in the lane, is the reader's.
    seen = 1 - np.maximum(1 - share, 0) ** segments.samples
    return float(own), float((segments.shard_bytes * seen).sum())


class _Windows(NamedTuple):
    """Windows of lanes: [begin, end) in slots, and what they touch."""

    lane: I64
    begin: I64
    end: I64
    shards: I64
    bytes: F64


def _windows(order: EpochOrder, nbytes: F64, epoch: int) -> _Windows:
    permuted, bounds = order.layout(epoch)
    lane, begin, end = order.windows(epoch)
    start = order.lane_start(lane)
    first = np.searchsorted(bounds, start + begin, side="right") - 1
    last = np.searchsorted(bounds, start + end - 1, side="right") - 1
    before = np.concatenate([[0.0], np.cumsum(nbytes[permuted])])
    return _Windows(lane, begin, end, last - first + 1, before[last + 1] - before[first])


def _peak(windows: _Windows) -> tuple[int, float]:
    """(most shards, most bytes) of the windows that are open at one slot."""
    if not len(windows.lane):
        return 0, 0.0
    times, slot = np.unique(np.concatenate([windows.begin, windows.end]), return_inverse=True)

    def most(amounts: npt.NDArray[np.float64]) -> float:
        changes = np.bincount(slot, np.concatenate([amounts, -amounts]), len(times))
        return float(np.cumsum(changes).max())

    return round(most(windows.shards.astype(np.float64))), most(windows.bytes)


Rows = TypeVar("Rows", _Segments, _Windows)


class _ByClass(Generic[Rows]):
    """Rows sorted by the class of their lane, so that a reader's are found at once."""

    def __init__(self, rows: Rows, classes: int, shift: int) -> None:
        of_row = (rows.lane + shift) % classes
        sorting = np.argsort(of_row, kind="stable")
        self._rows = [column[sorting] for column in rows]
        self._kind: Callable[..., Rows] = type(rows)
        self._starts = np.searchsorted(of_row[sorting], np.arange(classes + 1))

    def of(self, read: I64, share: F64 | None = None) -> tuple[Rows, F64]:
        """The rows of classes ``read``, and for each the share that goes with its class."""
        share = np.ones(len(read)) if share is None else share
        slices = [slice(self._starts[c], self._starts[c + 1]) for c in read]
        columns = (np.concatenate([column[s] for s in slices]) for column in self._rows)
        return self._kind(*columns), np.repeat(share, [s.stop - s.start for s in slices])


def table(found: ReadPlan, better: ReadPlan | None = None) -> str:
    """A plan as text: a table, a histogram, and what to change."""
    ranks, nodes = found.per_rank, found.per_node
    window = "a lane" if found.window is None else f"{found.window:,} samples"
    lines = [
        f"{found.shards:,} shards, {found.samples:,} samples, {_size(found.bytes)}; "
        f"{found.ranks:,} ranks, {found.ranks_per_node} a node; {found.lanes:,} lanes, "
        f"windows of {window}",
        "",
        f"{'one epoch':<34}{'min':>12}{'mean':>12}{'max':>12}  max/mean - 1",
        _row("read by a rank, its samples", ranks.own_bytes),
        _row("  whole shards, cache of a rank", ranks.fetched_bytes),
        _row("read by a node, its samples", nodes.own_bytes),
        _row("  whole shards, cache of a node", nodes.fetched_bytes),
        "",
        f"read amplification (bytes fetched / bytes of the corpus): "
        f"{found.amplification(ranks):.3f} with caches of ranks, "
        f"{found.amplification(nodes):.3f} with caches of nodes",
        f"longest queue (shards needed at one moment): {ranks.queue_shards.max()} of a rank, "
        f"{nodes.queue_shards.max()} of a node",
        f"cache that holds them: {_size(ranks.cache_bytes.max())} for a rank, "
        f"{_size(nodes.cache_bytes.max())} for a node; "
        "reading ahead needs up to as much again",
        "",
        "fetched by a node, against the mean: number of nodes",
        *_histogram(nodes.fetched_bytes),
        "",
        _advice(found, better),
    ]
    return "\n".join(lines)


def _advice(found: ReadPlan, better: ReadPlan | None) -> str:
    if found.divides:
        return f"{found.ranks:,} ranks divide {found.lanes:,} lanes: each lane has one reader."
    shared = found.ranks // math.gcd(found.lanes, found.ranks)
    text = (
        f"{found.ranks:,} ranks do not divide {found.lanes:,} lanes: each lane is read by "
        f"{shared:,} ranks."
    )
    if better is None:
        return (
            f"{text} {found.shards:,} shards cannot make a lane for each rank: pack more and "
            "smaller shards."
        )
    return (
        f"{text} With lanes={better.lanes}: amplification "
        f"{better.amplification(better.per_rank):.3f} with caches of ranks, "
        f"{better.amplification(better.per_node):.3f} with caches of nodes, and a node caches "
        f"{_size(better.per_node.cache_bytes.max())}. Another number of lanes is another order: "
        "set it before a run begins."
    )


def _row(name: str, values: F64) -> str:
    mean = float(values.mean())
    cells = "".join(f"{_size(v):>12}" for v in (values.min(), mean, values.max()))
    return f"{name:<34}{cells}  {values.max() / mean - 1:.2%}"


def _histogram(values: F64, bins: int = 8, width: int = 40) -> list[str]:
    mean = values.mean()
    if np.ptp(values) < 1e-3 * mean:
        return [f"  {len(values):,} alike, within 0.1%"]
    counts, edges = np.histogram(values / mean - 1, bins)
    return [
        f"  {low:>+8.2%} to {high:>+8.2%}  {'#' * round(width * n / counts.max())} {n}"
        for n, low, high in zip(counts, edges, edges[1:], strict=False)
    ]


def _size(nbytes: float) -> str:
    for unit, size in (("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 1024:.1f} KiB"
