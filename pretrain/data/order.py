"""The order of samples, as a pure function of (seed, epoch, position): nothing to save, nothing to
lose, and sample 10**9 costs what sample 0 costs.

`EpochOrder` orders one data set, `Mixture` several, `Buckets` one whose batches must be of one
shape. A sample number n >= 0 counts over all ranks and epochs. All is decided in integers, so that
"exactly once" holds by construction, on every machine.

Legend: N samples of an epoch, L lanes, W samples of a window, D data sets, K buckets.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.permute import GOLDEN, U64, derive, key_of, mix64, permute
from pretrain.errors import ConfigError

I64 = npt.NDArray[np.int64]

PARTS = 10**6  # weights are rounded to so many parts
MOST_LANES = 1 << 16
MOST_SAMPLES = 1 << 40  # of an epoch or a window: `_share` is exact up to here
_KEPT_EPOCHS = 3  # whose shard permutations are kept: a batch may straddle two
_RUNS = 16  # of a window, where samples are drawn with replacement


def rank_numbers(start: int, global_batch: int, rank: int, world: int) -> range:
    """Sample numbers of ``rank`` in the global batch that begins at ``start``: every ``world``-th,
    disjoint and complete over ranks.

    Raises:
        ConfigError: the batch does not divide.
    """
    rest = global_batch % world
    if rest:
        raise ConfigError(
            f"training.global_batch={global_batch} is not a multiple of {world} ranks; "
            f"try {global_batch - rest or world} or {global_batch - rest + world}"
        )
    return range(start + rank, start + global_batch, world)


def auto_lanes(shards: int, global_batch: int | None = None) -> int:
    """Lanes for ``shards`` filled shards: so many that each has 8 shards, at most 1,024.

    The largest power of two, or, where the global batch is known, its largest divisor: the ranks
    must divide the batch, so most numbers of ranks that can ever go on with a run divide it too.
    """
    most = max(1, min(1024, shards // 8))
    if global_batch is None:
        return 1 << (most.bit_length() - 1)
    return max(n for n in range(1, most + 1) if global_batch % n == 0)


class EpochOrder:
    """Which sample is where in each epoch.

    Number n is position p = n % N of epoch n // N. An epoch's shards are permuted and joined into
    one sequence, which is cut into L lanes; position p is sample p // L of lane p % L. So ranks
    that take every R-th number read L/R lanes each, and no shard of another rank but at the lanes'
    ends, where R divides L. Within a lane, windows of W samples are permuted. Their boundaries are
    staggered over lanes and epochs: else all ranks would want new shards at the same moment.

    Args:
        sizes: samples of each shard; empty shards are allowed.
        seed: of the run.
        lanes: L; None: as `auto_lanes`.
        window: W; None: a whole lane is one window.
        resample: draw with replacement: each window is joined from 16 runs of the sequence that
            begin anywhere, so every sample is as likely as another; an epoch is N draws.

    Raises:
        ConfigError: there is no sample, or lanes or window are out of bounds.
    """

    def __init__(
        self,
        sizes: npt.ArrayLike,
        seed: int,
        *,
        lanes: int | None = None,
        window: int | None = 16_384,
        resample: bool = False,
    ) -> None:
        self.sizes: I64 = np.asarray(sizes, dtype=np.int64).reshape(-1)  # the manifest's own
        self.seed, self.window, self.resample = seed, window, resample
        self._filled = np.flatnonzero(self.sizes)
        self.num_samples = int(self.sizes.sum())
        if not 1 <= self.num_samples <= MOST_SAMPLES or self.sizes.min() < 0:
            raise ConfigError(
                f"{len(self.sizes)} shards of {self.num_samples} samples: there must be from 1 to "
                "2**40; index shards that hold some"
            )
        self.lanes = auto_lanes(len(self._filled)) if lanes is None else lanes
        if not 1 <= self.lanes <= MOST_LANES:
            raise ConfigError(
                f"lanes={lanes} must be from 1 to {MOST_LANES:,}; try a multiple of the ranks"
            )
        if window is not None and not 1 <= window <= MOST_SAMPLES:
            raise ConfigError(f"window={window} must be from 1 to 2**40 samples; try 16384")
        # No stagger where a window holds the longest lane: it would only cut it in two.
        longest = -(-self.num_samples // self.lanes)
        self._window = None if window is None or window >= longest else window
        self._keys = {name: key_of(seed, name) for name in ("shards", "stagger", "window", "run")}
        # A cache of a pure function: it bounds work, and holds no state of the run.
        self.layout = lru_cache(maxsize=_KEPT_EPOCHS)(self._layout)

    def __reduce__(self) -> tuple[Any, ...]:
        # The cache stays behind.
        return _remake, (self.sizes, self.seed, self.lanes, self.window, self.resample)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the order is a function of."""
        return _fingerprint("epoch", self.sizes, self.seed, self.lanes, self.window, self.resample)

    def locate(self, numbers: npt.ArrayLike) -> tuple[I64, I64]:
        """(shards, indices in shard) of global sample numbers >= 0; all of one shape."""
        given = _as_numbers(numbers)
        epochs, positions = np.divmod(given.reshape(-1), self.num_samples)
        sequence = self._sequence(epochs, positions)
        shards, indices = np.empty_like(sequence), np.empty_like(sequence)
        for epoch, at in _by_value(epochs):
            permuted, bounds = self.layout(epoch)
            where = sequence[at]
            found = np.searchsorted(bounds, where, side="right") - 1
            shards[at] = permuted[found]
            indices[at] = where - bounds[found]
        return shards.reshape(given.shape), indices.reshape(given.shape)

    def lane_start(self, lanes: npt.ArrayLike) -> I64:
        """Where each lane begins in an epoch's sequence; lane L begins at its end, N."""
        numbers = np.asarray(lanes, dtype=np.int64)
        size, longer = divmod(self.num_samples, self.lanes)
        return numbers * size + np.minimum(numbers, longer)

    def windows(self, epoch: int) -> tuple[I64, I64, I64]:
        """(lane, begin, end) of each window of an epoch, by lane and then in the order they are
        read; begin and end count samples of the lane."""
        lanes = np.arange(min(self.lanes, self.num_samples))
        lengths = self.lane_start(lanes + 1) - self.lane_start(lanes)
        shift = self._stagger(np.full_like(lanes, epoch), lanes)
        counts = (lengths - 1 + shift) // (self._window or self.num_samples) + 1
        lane = np.repeat(lanes, counts)
        number = np.arange(len(lane)) - np.repeat(np.cumsum(counts) - counts, counts)
        return lane, *self._bounds(number, shift[lane], lengths[lane])

    def _layout(self, epoch: int) -> tuple[I64, I64]:
        """The filled shards in the epoch's order, and where each begins in the sequence, its end
        last."""
        keys = derive(self._keys["shards"], np.array([epoch]), self._filled)
        permuted = self._filled[np.argsort(keys, kind="stable")]
        bounds = np.zeros(len(permuted) + 1, dtype=np.int64)
        np.cumsum(self.sizes[permuted], out=bounds[1:])
        permuted.flags.writeable = bounds.flags.writeable = False  # they are shared
        return permuted, bounds

    def _sequence(self, epochs: I64, positions: I64) -> I64:
        """Places in the epochs' sequences."""
        offsets, lanes = np.divmod(positions, self.lanes)
        starts = self.lane_start(lanes)
        lengths = self.lane_start(lanes + 1) - starts
        shift = self._stagger(epochs, lanes)
        number = (offsets + shift) // (self._window or self.num_samples)
        begin, end = self._bounds(number, shift, lengths)
        keys = derive(self._keys["window"], epochs, lanes, number)
        inner = permute(_unsigned(offsets - begin), _unsigned(end - begin), keys).astype(np.int64)
        if not self.resample:
            return starts + begin + inner
        run = -(-(self._window or -(-self.num_samples // self.lanes)) // _RUNS)
        keys = derive(self._keys["run"], epochs, lanes, number, inner // run)
        drawn = (keys % np.uint64(self.num_samples)).astype(np.int64)
        return (drawn + inner % run) % self.num_samples

    def _stagger(self, epochs: I64, lanes: I64) -> I64:
        """How far each lane's windows are shifted to its front, in [0, W)."""
        if self._window is None:
            return np.zeros_like(lanes)
        # Multiples of the golden section lie evenly in whatever run or comb of lanes a node reads.
        step = np.int64(self._window * 618_034 // PARTS)
        drawn = derive(self._keys["stagger"], epochs) % np.uint64(self._window)
        return (lanes * step + drawn.astype(np.int64)) % self._window

    def _bounds(self, number: I64, shift: I64, lengths: I64) -> tuple[I64, I64]:
        """[begin, end) of windows in their lanes; the first and the last may be short."""
        size = self._window or self.num_samples
        begin = number * size - shift
        return np.maximum(begin, 0), np.minimum(begin + size, lengths)


class Mixture:
    """Several data sets in one order, each interleaved in every lane by itself, so that ranks keep
    to their lanes of each data set.

    With weights: of every run of numbers each data set has its share, for ever; a data set's own
    epochs begin and end on their own. With epochs: a mixed epoch reads data set d exactly
    epochs[d] times (a fraction: that part of its epoch, and the next mixed epoch goes on from
    there), then a mixed epoch in another order follows.

    Either way a lane's slots are dealt out by a chain of Bresenham's even splits, the largest data
    set first. In every prefix of a lane, each data set has its share to within one sample where
    there are two, two where there are three, 2 + log D in general.

    Args:
        orders: of each data set.
        weights: relative; rounded to integer parts of 10**6.
        epochs: how often a mixed epoch visits each data set.

    Raises:
        ConfigError: not exactly one of weights and epochs is given, of another length than
            orders, or one is too small to be seen.
    """

    def __init__(
        self,
        orders: Sequence[EpochOrder],
        weights: Sequence[float] | None = None,
        epochs: Sequence[float] | None = None,
    ) -> None:
        given, name = (weights, "weights") if epochs is None else (epochs, "epochs")
        if given is None or (weights is not None and epochs is not None):
            raise ConfigError(
                f"weights={weights} and epochs={epochs}: a mixture needs exactly one of them"
            )
        if len(given) != len(orders) or not orders:
            raise ConfigError(
                f"{name}={list(given)} must hold one number for each of the {len(orders)} data sets"
            )
        if not all(math.isfinite(w) and w > 0 for w in given):
            raise ConfigError(f"{name}={list(given)} must be above 0; leave out what is not read")
        self.orders = tuple(orders)
        self.weights = None if weights is None else tuple(weights)
        self.epochs = None if epochs is None else tuple(epochs)
        # Samples of data set d in a mixed epoch, or its parts of 10**6.
        self.parts = (
            _largest_remainder(given)
            if weights is not None
            else [
                round(Fraction(e).limit_denominator(PARTS) * order.num_samples)
                for e, order in zip(given, orders, strict=True)
            ]
        )
        if sum(self.parts) > MOST_SAMPLES:
            raise ConfigError(
                f"{name}={list(given)} make a mixed epoch of {sum(self.parts):,} samples, at most "
                "2**40 are possible; divide them all by one number"
            )
        if min(self.parts) < 1:
            raise ConfigError(
                f"{name}={list(given)}: the smallest comes to no sample of "
                f"{sum(self.parts):,}; raise it or leave its data set out"
            )
        total = sum(self.parts)
        self.num_samples: int | None = None if weights is not None else total
        common = math.lcm(*(order.lanes for order in orders))
        self.lanes = common if common <= MOST_LANES else max(order.lanes for order in orders)
        # The largest first keeps the chain's deviation small.
        self._chain = sorted(range(len(orders)), key=lambda d: (-self.parts[d], d))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the order is a function of."""
        inner = [order.fingerprint for order in self.orders]
        return _fingerprint("mixture", inner, self.parts, self.num_samples is None, self.lanes)

    def locate(self, numbers: npt.ArrayLike) -> tuple[I64, I64, I64]:
        """(data sets, shards, indices in shard) of global sample numbers >= 0."""
        datasets, own = self.split(numbers)
        shards, indices = np.empty_like(own), np.empty_like(own)
        for d, order in enumerate(self.orders):
            at = datasets == d
            if at.any():
                shards[at], indices[at] = order.locate(own[at])
        return datasets, shards, indices

    def split(self, numbers: npt.ArrayLike) -> tuple[I64, I64]:
        """(data sets, numbers in the data set's own order) of global sample numbers >= 0."""
        given = _as_numbers(numbers)
        flat = given.reshape(-1)
        deal = self._deal_for_ever if self.num_samples is None else self._deal_epoch
        datasets, own = deal(flat)
        return datasets.reshape(given.shape), own.reshape(given.shape)

    def _deal_for_ever(self, numbers: I64) -> tuple[I64, I64]:
        slots, lanes = np.divmod(numbers, self.lanes)
        rounds, slots = np.divmod(slots, PARTS)
        parts = np.array([self.parts[d] for d in self._chain])
        link, rank = _deal(slots, [np.full_like(slots, p) for p in parts], lanes)
        own = (rounds * parts[link] + rank) * self.lanes + lanes
        return np.array(self._chain)[link], own

    def _deal_epoch(self, numbers: I64) -> tuple[I64, I64]:
        assert self.num_samples is not None
        epochs, positions = np.divmod(numbers, self.num_samples)
        slots, lanes = np.divmod(positions, self.lanes)
        # Data sets laid end to end and dealt to lanes like cards: of [S, S + M) lane l gets those
        # that are l modulo L. So every lane's slots and every data set's samples come out even.
        parts = np.array([self.parts[d] for d in self._chain])
        starts = np.cumsum(parts) - parts

        def dealt(ends: int) -> I64:
            return (ends - lanes + self.lanes - 1) // self.lanes  # numbers below `ends` in the lane

        counts = [dealt(int(s + p)) - dealt(int(s)) for s, p in zip(starts, parts, strict=True)]
        link, rank = _deal(slots, counts, lanes + epochs)
        first = (lanes - starts[link]) % self.lanes
        return np.array(self._chain)[link], epochs * parts[link] + rank * self.lanes + first


class Buckets:
    """One data set whose numbers come in groups of ``group`` that share one bucket (a shape).

    Bucket b gets N_b of every N groups, evenly spread, so that its epochs, in which each of its
    samples is visited exactly once, go by in step with those of the others. All buckets permute
    the shards alike, with windows in proportion: they read the same few shards at a time.

    Args:
        sizes_by_bucket: samples of each bucket in each shard, shape (K, shards).
        seed: of the run.
        group: numbers that share a bucket: the samples of a micro-step over all ranks, or a
            multiple.
        lanes, window: as for `EpochOrder`, over all buckets together.

    Raises:
        ConfigError: there is no sample, or group, lanes or window are out of bounds.
    """

    def __init__(
        self,
        sizes_by_bucket: npt.ArrayLike,
        seed: int,
        group: int,
        *,
        lanes: int | None = None,
        window: int | None = 16_384,
    ) -> None:
        self.sizes: I64 = np.array(sizes_by_bucket, dtype=np.int64)
        if self.sizes.ndim != 2:
            raise ConfigError(f"sizes_by_bucket of shape {self.sizes.shape} must be (K, shards)")
        if group < 1:
            raise ConfigError(f"group={group} must be at least 1; try the global batch")
        whole = EpochOrder(self.sizes.sum(0), seed, lanes=lanes, window=window)
        self.seed, self.group, self.lanes, self.window = seed, group, whole.lanes, window
        self.num_samples = whole.num_samples
        totals = self.sizes.sum(1)
        self._chain = [int(b) for b in np.argsort(-totals, kind="stable") if totals[b]]
        self.orders = {
            b: EpochOrder(self.sizes[b], seed, lanes=self.lanes, window=self._share(int(totals[b])))
            for b in self._chain
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake_buckets, (self.sizes, self.seed, self.group, self.lanes, self.window)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the order is a function of."""
        return _fingerprint("buckets", self.sizes, self.seed, self.group, self.lanes, self.window)

    def locate(self, numbers: npt.ArrayLike) -> tuple[I64, I64, I64]:
        """(buckets, shards, ranks) of global sample numbers >= 0: the sample is the rank-th of
        those in the shard that are in the bucket."""
        buckets, own = self.split(numbers)
        shards, ranks = np.empty_like(own), np.empty_like(own)
        for b, order in self.orders.items():
            at = buckets == b
            if at.any():
                shards[at], ranks[at] = order.locate(own[at])
        return buckets, shards, ranks

    def split(self, numbers: npt.ArrayLike) -> tuple[I64, I64]:
        """(buckets, numbers in the bucket's own order) of global sample numbers >= 0."""
        given = _as_numbers(numbers)
        every, inner = np.divmod(given.reshape(-1), self.group)
        groups, member = np.unique(every, return_inverse=True)
        rounds, slots = np.divmod(groups, self.num_samples)
        parts = np.array([self.orders[b].num_samples for b in self._chain])
        link, rank = _deal(slots, [np.full_like(slots, p) for p in parts], rounds)
        own = ((rounds * parts[link] + rank) * self.group)[member] + inner
        buckets = np.array(self._chain)[link[member]]
        return buckets.reshape(given.shape), own.reshape(given.shape)

    def _share(self, samples: int) -> int | None:
        """A bucket's part of the window; not so small that a rare bucket is hardly shuffled."""
        if self.window is None:
            return None
        return min(self.window, max(64, self.window * samples // self.num_samples))


def _remake(sizes: I64, seed: int, lanes: int, window: int | None, resample: bool) -> EpochOrder:
    return EpochOrder(sizes, seed, lanes=lanes, window=window, resample=resample)


def _remake_buckets(sizes: I64, seed: int, group: int, lanes: int, window: int | None) -> Buckets:
    return Buckets(sizes, seed, group, lanes=lanes, window=window)


def _as_numbers(numbers: npt.ArrayLike) -> I64:
    given = np.asarray(numbers, dtype=np.int64)
    if given.size and given.min() < 0:
        raise ValueError(f"sample numbers are >= 0, not {given.min()}")
    return given


def _unsigned(values: I64) -> U64:
    return values.astype(np.uint64)


def _by_value(values: I64) -> Iterator[tuple[int, Any]]:
    """(value, an index of where it stands) for each value there is."""
    if not values.size:
        return
    if values[0] == values[-1] and (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    sorting = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(np.diff(values[sorting])) + 1
    for at in np.split(sorting, cuts):
        yield int(values[at[0]]), at


def _deal(slots: I64, parts: Sequence[I64], spread: I64) -> tuple[I64, I64]:
    """Deal slot t of sum(parts) to a receiver: (receiver, how many it got before).

    A chain of even splits: receiver 0 against the rest, 1 against what that leaves, ... Of two
    that share T slots, the first has floor((t*a + phase) / T) of the first t, so exactly a of all.
    ``spread`` (a lane) picks the phases, so that lanes do not turn to a receiver all at once.

    Args:
        slots: t >= 0, below the sum of parts; shape (n,).
        parts: of each receiver, each of shape (n,); their sum at most 2**40.
    """
    left, total = _unsigned(slots), _unsigned(sum(parts[1:], parts[0]))
    receiver = np.full(slots.shape, len(parts) - 1, dtype=np.int64)
    rank = np.zeros_like(slots)
    open_ = np.arange(len(slots))  # where these slots stand that no receiver has yet
    one = np.uint64(1)
    for link, part in enumerate(parts[:-1]):
        share = _unsigned(part[open_])
        phase = _phase(spread[open_], link, total)
        before = _share(left, share, phase, total)
        taken = _share(left + one, share, phase, total) > before
        receiver[open_[taken]] = link
        rank[open_[taken]] = before[taken].astype(np.int64)
        rest = ~taken
        open_, left, total = open_[rest], (left - before)[rest], (total - share)[rest]
    rank[open_] = left.astype(np.int64)
    return receiver, rank


def _phase(spread: I64, link: int, total: U64) -> U64:
    """A fraction of ``total`` that lies evenly over runs of ``spread``; below ``total``."""
    factor = GOLDEN if link == 0 else mix64(key_of("phase", link))[0] | np.uint64(1)
    fraction = ((_unsigned(spread) + np.uint64(1)) * factor) >> np.uint64(44)  # 20 bits
    return (fraction * total) >> np.uint64(20)


def _share(slots: U64, share: U64, phase: U64, total: U64) -> U64:
    """floor((slots * share + phase) / total) without overflow, where all are at most 2**40: long
    division with two digits of 22 bits."""
    bits = np.uint64(22)
    high = slots >> bits
    product: U64 = high * share
    quotient: U64 = product // total
    rest: U64 = product - quotient * total
    low: U64 = slots - (high << bits)
    below: U64 = (rest << bits) + low * share + phase
    return (quotient << bits) + below // total


def _largest_remainder(weights: Sequence[float]) -> list[int]:
    """Integers in proportion to ``weights`` that sum to `PARTS` exactly."""
    exact = [Fraction(w) for w in weights]
    shares = [w / sum(exact) * PARTS for w in exact]
    parts = [math.floor(s) for s in shares]
    by_rest = sorted(range(len(parts)), key=lambda d: (parts[d] - shares[d], d))
    for d in by_rest[: PARTS - sum(parts)]:
        parts[d] += 1
    return parts


def _fingerprint(*parts: Any) -> str:
    """SHA-256 of parts: arrays by their bytes, the rest as JSON. The leading version changes with
    the algorithm."""
    digest = hashlib.sha256(b"order 1\n")
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(json.dumps(part.shape).encode() + part.astype("<i8").tobytes())
        else:
            digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()
