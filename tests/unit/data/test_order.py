"""The order of samples is a pure function that no number of ranks, batches or stops can change."""

import itertools
import math
import pickle
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import order as order_module
from pretrain.data import permute as permute_module
from pretrain.data.order import Buckets, EpochOrder, Mixture, auto_lanes, rank_numbers
from pretrain.data.permute import derive, key_of, permute
from pretrain.data.quality import measure, origins_of, quality
from pretrain.errors import ConfigError

# Empty shards, shards of one sample, shards larger than a window; rarely none filled: filtered.
sizes_of = st.lists(st.integers(0, 17), min_size=1, max_size=8).filter(any)
orders_of = st.builds(
    EpochOrder,
    sizes_of,
    st.integers(0, 5),
    lanes=st.one_of(st.none(), st.integers(1, 40)),
    window=st.one_of(st.none(), st.integers(1, 30)),
)
Place = tuple[int, ...]


def places(order: Any, start: int, end: int) -> list[Place]:
    columns = order.locate(np.arange(start, end))
    return list(zip(*(c.tolist() for c in columns), strict=True))


def every(sizes: np.ndarray) -> list[Place]:
    return [(s, i) for s, size in enumerate(sizes.tolist()) for i in range(size)]


# --- the permutation


@given(st.integers(1, 500), st.integers(0, 2**63))
@settings(max_examples=80, deadline=None)
def test_a_permutation_has_each_value_once(size: int, seed: int) -> None:
    values = np.arange(size, dtype=np.uint64)
    images = permute(values, np.full_like(values, size), np.repeat(key_of(seed), size))
    assert sorted(images.tolist()) == list(range(size))


@pytest.mark.parametrize(("size", "draws"), [(2, 4_000), (3, 12_000), (4, 24_000), (5, 48_000)])
def test_all_permutations_of_a_handful_are_equally_likely(size: int, draws: int) -> None:
    """Catches too few rounds, and the half of all permutations that an even network misses."""
    keys = derive(key_of("test", size), np.arange(draws))
    columns = [
        permute(np.full(draws, v, np.uint64), np.full(draws, size, np.uint64), keys)
        for v in range(size)
    ]
    found = Counter(zip(*(c.tolist() for c in columns), strict=True))
    expected = draws / math.factorial(size)
    chi_square = sum(
        (found[p] - expected) ** 2 / expected for p in itertools.permutations(range(size))
    )
    freedom = math.factorial(size) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_large_permutation_leaves_no_trace_of_where_values_were() -> None:
    size = 100_003
    values = np.arange(size, dtype=np.uint64)
    images = permute(values, np.full_like(values, size), np.repeat(key_of("large"), size))
    steps = np.diff(images.astype(np.int64)) % size
    cells = np.bincount(steps * 64 // size, minlength=64)
    assert ((cells - size / 64) ** 2 / (size / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)
    assert abs(np.corrcoef(values, images)[0, 1]) < 5 / math.sqrt(size)


@given(st.integers(1, 2**25), st.integers(-1, 1))
def test_the_side_of_the_square_is_exact(root: int, off: int) -> None:
    size = max(1, root * root + off)
    side = int(permute_module._side(np.array([size], dtype=np.uint64))[0])
    assert (side - 1) ** 2 < size <= side**2


# --- one data set


@given(orders_of, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_each_epoch_holds_each_sample_once(order: EpochOrder, epoch: int) -> None:
    start = epoch * order.num_samples
    assert Counter(places(order, start, start + order.num_samples)) == Counter(every(order.sizes))


@given(
    orders_of,
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=6
    ),
)
@settings(max_examples=60, deadline=None)
def test_stops_with_other_ranks_and_batches_lose_and_repeat_nothing(
    order: EpochOrder, starts: list[tuple[int, int, int]]
) -> None:
    """Each start runs some steps on some ranks; a new process goes on from the sample count."""
    epochs, start = 3, 0
    seen: dict[int, Place] = {}
    for world, per_rank, steps in itertools.cycle(starts):
        process = pickle.loads(pickle.dumps(order))
        batch = world * per_rank
        for rank in range(world):
            numbers = [
                n
                for step in range(steps)
                for n in rank_numbers(start + step * batch, batch, rank, world)
            ]
            assert len(numbers) == steps * per_rank and not seen.keys() & set(numbers)
            columns = (column.tolist() for column in process.locate(numbers))
            seen |= dict(zip(numbers, zip(*columns, strict=True), strict=True))
        start += steps * batch
        if start >= epochs * order.num_samples:
            break
    for epoch in range(epochs):
        numbers = range(epoch * order.num_samples, (epoch + 1) * order.num_samples)
        assert Counter(seen[n] for n in numbers) == Counter(every(order.sizes))


@given(orders_of, st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=80, deadline=None)
def test_a_number_means_the_same_whatever_is_asked_with_it_or_before(
    order: EpochOrder, numbers: list[int]
) -> None:
    shards, indices = order.locate(numbers)
    assert shards.dtype == indices.dtype == np.int64
    fresh = pickle.loads(pickle.dumps(order))
    for number, shard, index in zip(numbers, shards, indices, strict=True):
        assert fresh.locate(number) == (shard, index)
    shape = np.reshape(numbers, (1, -1))
    assert order.locate(shape)[0].shape == shape.shape


def test_the_order_is_the_one_it_was() -> None:
    """Golden: runs of earlier versions go on. If this must change, raise the version that
    `_fingerprint` begins with."""
    order = EpochOrder([5, 0, 7, 1, 9], 3, lanes=3, window=4)
    assert places(order, 20, 26) == [(0, 3), (4, 6), (4, 0), (4, 8), (2, 5), (4, 1)]
    assert order.fingerprint[:16] == "18a14918748dd680"


def test_seed_and_epoch_change_shards_and_samples() -> None:
    order = EpochOrder([40] * 8, 0, lanes=2, window=30)
    first, second = places(order, 0, 320), places(order, 320, 640)
    assert first != second
    assert first != places(EpochOrder([40] * 8, 1, lanes=2, window=30), 0, 320)
    assert order.layout(0)[0].tolist() != order.layout(1)[0].tolist()  # the shards
    one = EpochOrder([320], 0, lanes=1, window=30)  # the samples
    assert places(one, 0, 30) != places(one, 320, 350)
    assert sorted(p[1] for p in places(one, 0, 320)) != [p[1] for p in places(one, 0, 320)]


def test_numbers_of_a_batch_may_straddle_many_epochs() -> None:
    order = EpochOrder([1, 0, 2], 4)
    assert places(order, 0, 300) == [p for n in range(300) for p in places(order, n, n + 1)]
    assert len({tuple(places(order, 3 * e, 3 * e + 3)) for e in range(100)}) == 6  # all orders


@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_ranks_that_divide_the_lanes_share_no_shard_but_at_lane_ends(ranks: int) -> None:
    rng = np.random.default_rng(0)
    order = EpochOrder(rng.integers(0, 60, 200), 1, lanes=16, window=64)
    for epoch in range(2):
        readers: dict[int, set[int]] = {}
        start = epoch * order.num_samples
        shards, _ = order.locate(np.arange(start, start + order.num_samples))
        for offset, shard in enumerate(shards.tolist()):
            readers.setdefault(shard, set()).add((start + offset) % ranks)
        # 15 inner lane ends; a shard on one has two readers.
        assert sum(len(r) - 1 for r in readers.values()) <= order.lanes - 1


def test_batches_of_any_size_keep_a_rank_on_its_shards() -> None:
    order = EpochOrder([100] * 128, 1, lanes=16, window=200)
    for global_batch in (8, 24, 40):
        numbers = [
            n
            for start in range(0, 3_000, global_batch)
            for n in rank_numbers(start, global_batch, 3, 8)
        ]
        # 2 lanes, each about 188 samples of a lane in: 2 windows of at most 3 shards.
        assert len(set(order.locate(numbers)[0].tolist())) <= 2 * 2 * 4


@given(orders_of, st.integers(0, 2))
@settings(max_examples=80, deadline=None)
def test_windows_say_where_samples_may_land(order: EpochOrder, epoch: int) -> None:
    lane, begin, end = order.windows(epoch)
    assert (begin < end).all() and (end - begin <= (order.window or order.num_samples)).all()
    sequence = order._sequence(np.full(order.num_samples, epoch), np.arange(order.num_samples))
    covered = []
    for number, low, high in zip(lane.tolist(), begin.tolist(), end.tolist(), strict=True):
        positions = np.arange(low, high) * order.lanes + number
        base = int(order.lane_start(number))
        assert sorted(sequence[positions].tolist()) == list(range(base + low, base + high))
        covered += positions.tolist()
    assert sorted(covered) == list(range(order.num_samples))


def test_lanes_do_not_change_windows_all_at_once() -> None:
    order = EpochOrder([1_000] * 512, 0, lanes=64, window=1_000)
    ends = [
        set(end[lane == l_].tolist()) - {8_000}
        for l_ in range(64)
        for lane, _, end in [order.windows(0)]
    ]
    common = Counter(e for lane_ends in ends for e in lane_ends)
    assert max(common.values()) <= 2
    # ... nor any eight neighbours within a short time: their ends spread over the window.
    for first in range(0, 64, 8):
        phases = sorted(min(ends[l_]) % 1_000 for l_ in range(first, first + 8))
        gaps = np.diff([*phases, phases[0] + 1_000])
        assert gaps.max() < 3 * 1_000 / 8
    assert order.windows(0)[2].tolist() != order.windows(1)[2].tolist()


def test_far_and_huge_numbers_do_not_overflow() -> None:
    order = EpochOrder(np.full(100_000, 10**7), 7)
    assert order.num_samples == 10**12
    numbers = np.random.default_rng(0).integers(0, 10**12, 20_000)
    numbers = np.concatenate([np.unique(numbers), [10**12 - 1]])
    shards, indices = order.locate(numbers)
    assert len(set(zip(shards.tolist(), indices.tolist(), strict=True))) == len(numbers)
    assert shards.min() >= 0 and shards.max() < 100_000
    assert indices.min() >= 0 and indices.max() < 10**7
    whole_lane = EpochOrder([10**12], 7, lanes=1, window=None)
    _, indices = whole_lane.locate(np.arange(10**12 + 5, 10**12 + 50_000))
    assert len(set(indices.tolist())) == 49_995
    assert abs(indices.mean() / 10**12 - 0.5) < 0.01


def test_locating_a_batch_costs_the_same_at_a_billion() -> None:
    order = EpochOrder(np.full(100_000, 10_000), 1)

    def seconds(start: int) -> float:
        numbers = start + np.arange(1024)
        order.locate(numbers)  # the epoch's shard permutation
        found = []
        for _ in range(7):
            began = time.process_time()
            order.locate(numbers)
            found.append(time.process_time() - began)
        return min(found)

    near, far = seconds(0), seconds(10**12)
    assert far < 5 * near + 1e-3
    assert near < 0.02  # 0.001 on a quiet machine


def test_an_order_travels_without_its_caches() -> None:
    order = EpochOrder(np.full(1_000, 1_000), 1)
    before = len(pickle.dumps(order))
    order.locate(np.arange(0, 5_000_000, 1_001))
    assert len(pickle.dumps(order)) == before < 8_000 + 500
    assert order.layout.cache_info().currsize <= 3  # type: ignore[attr-defined]
    bucketed = Buckets(np.ones((3, 50), dtype=int), 0, 4)
    bucketed.locate(np.arange(100))
    again = pickle.loads(pickle.dumps(bucketed))
    assert places(again, 0, 99) == places(bucketed, 0, 99)
    mixed = Mixture([order, order], epochs=[1, 2])
    again = pickle.loads(pickle.dumps(mixed))
    assert places(again, 0, 99) == places(mixed, 0, 99)


def test_the_fingerprint_changes_with_all_that_the_order_hangs_on() -> None:
    base: dict[str, Any] = {"sizes": [3, 4], "seed": 1, "lanes": 2, "window": 5, "resample": False}
    other = [
        {"sizes": [4, 3]},
        {"sizes": [3, 4, 0]},
        {"seed": 2},
        {"lanes": 1},
        {"window": 6},
        {"window": None},
        {"resample": True},
    ]
    prints = [EpochOrder(**(base | change)).fingerprint for change in [{}, *other]]
    order = EpochOrder(**base)
    prints += [
        Mixture([order, order], weights=[1, 1]).fingerprint,
        Mixture([order, order], weights=[1, 2]).fingerprint,
        Mixture([order, order], epochs=[1, 1]).fingerprint,
        Buckets([[3, 4]], 1, 2).fingerprint,
        Buckets([[3, 4]], 1, 3).fingerprint,
        Buckets([[3], [4]], 1, 2).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 64 for p in prints)
    assert EpochOrder(**base).fingerprint == prints[0]
    used = EpochOrder(**base)
    used.locate(range(100))
    assert pickle.loads(pickle.dumps(used)).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("shards", "batch", "lanes"),
    [(1, None, 1), (15, None, 1), (16, None, 2), (100_000, None, 1024), (100_000, 6_000, 1000),
     (100_000, 509, 509), (64, 12, 6), (64, 7, 7), (40, 7, 1), (3, 8, 1)],
)  # fmt: skip
def test_lanes_follow_the_shards_and_the_batch(shards: int, batch: int | None, lanes: int) -> None:
    assert auto_lanes(shards, batch) == lanes
    if batch is None:
        assert EpochOrder([1] * shards + [0] * 50, 0).lanes == lanes


@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 10_000))
def test_ranks_split_the_global_batch(world: int, per_rank: int, start: int) -> None:
    batch = world * per_rank
    joined = [n for r in range(world) for n in rank_numbers(start, batch, r, world)]
    assert sorted(joined) == list(range(start, start + batch))


def test_what_cannot_be_is_refused_with_field_value_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"global_batch=10 .* 4 ranks; try 8 or 12"):
        rank_numbers(0, 10, 0, 4)
    for sizes in ([], [0, 0], [5, -1]):
        with pytest.raises(ConfigError, match="shards of"):
            EpochOrder(sizes, 0)
    with pytest.raises(ConfigError, match=r"lanes=0 .* 65,536"):
        EpochOrder([5], 0, lanes=0)
    with pytest.raises(ConfigError, match=r"window=0 "):
        EpochOrder([5], 0, window=0)
    with pytest.raises(ValueError, match=">= 0, not -3"):
        EpochOrder([5], 0).locate([4, -3])
    one = EpochOrder([5], 0)
    with pytest.raises(ConfigError, match="exactly one"):
        Mixture([one])
    with pytest.raises(ConfigError, match="exactly one"):
        Mixture([one], weights=[1], epochs=[1])
    with pytest.raises(ConfigError, match=r"weights=\[1, 2\] .* 1 data sets"):
        Mixture([one], weights=[1, 2])
    with pytest.raises(ConfigError, match=r"epochs=\[0\] must be above 0"):
        Mixture([one], epochs=[0])
    with pytest.raises(ConfigError, match="raise it or leave"):
        Mixture([one, one], weights=[1, 1e-9])
    with pytest.raises(ConfigError, match="group=0"):
        Buckets([[5]], 0, 0)
    with pytest.raises(ConfigError, match="must be \\(K, shards\\)"):
        Buckets([5], 0, 1)


# --- drawn with replacement


def test_resampling_draws_every_sample_alike_and_some_twice() -> None:
    order = EpochOrder([30, 0, 50, 20], 5, lanes=2, window=20, resample=True)
    epochs = 400
    found = Counter(places(order, 0, 100 * epochs))
    assert set(found) == set(every(order.sizes))
    # Runs of 2 samples are drawn together: that at most doubles the variance of a count.
    deviation = math.sqrt(2 * epochs)
    assert all(abs(n - epochs) < 5 * deviation for n in found.values())
    one = Counter(places(order, 0, 100))
    assert 45 < len(one) < 85  # 63 of 100 are expected of independent draws
    assert places(order, 150, 160) == places(pickle.loads(pickle.dumps(order)), 150, 160)


# --- mixtures

mixed_sizes = st.lists(sizes_of, min_size=1, max_size=4)


def mixture_of(sizes: list[list[int]], lanes: list[int], **kinds: Any) -> Mixture:
    return Mixture(
        [EpochOrder(s, d, lanes=lane, window=7) for d, (s, lane) in enumerate(zip(sizes, lanes))],  # noqa: B905
        **kinds,
    )


@given(
    mixed_sizes,
    st.lists(st.sampled_from([1, 2, 4, 6]), min_size=4, max_size=4),
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
    st.integers(0, 2),
)
@settings(max_examples=80, deadline=None)
def test_a_mixed_epoch_visits_each_data_set_exactly_so_often(
    sizes: list[list[int]], lanes: list[int], epochs: list[int], epoch: int
) -> None:
    epochs = epochs[: len(sizes)]
    mixture = mixture_of(sizes, lanes, epochs=epochs)
    total = sum(e * sum(s) for e, s in zip(epochs, sizes, strict=True))
    assert mixture.num_samples == total
    found = Counter(places(mixture, epoch * total, (epoch + 1) * total))
    assert found == Counter(
        {
            (d, s, i): times
            for d, (shards, times) in enumerate(zip(sizes, epochs, strict=True))
            for s, i in every(np.array(shards))
        }
    )
    if total > 20:
        other = places(mixture, (epoch + 1) * total, (epoch + 2) * total)
        assert other != places(mixture, epoch * total, (epoch + 1) * total)


def test_part_of_an_epoch_goes_on_in_the_next() -> None:
    mixture = mixture_of([[10, 10], [8]], [2, 1], epochs=[0.5, 1.5])
    assert mixture.num_samples == 10 + 12
    found = Counter(places(mixture, 0, 44))
    assert Counter({p: n for p, n in found.items() if p[0] == 0}) == Counter(
        (0, *p) for p in every(np.array([10, 10]))
    )
    assert {n for p, n in found.items() if p[0] == 1} == {3}


def dealt(mixture: Mixture, slots: int) -> np.ndarray:
    """Which data set each lane has at each slot: (slots, L)."""
    datasets, _ = mixture.split(np.arange(slots * mixture.lanes))
    return datasets.reshape(slots, mixture.lanes)


def bounds_of(shares: np.ndarray) -> np.ndarray:
    """How far a receiver's count may be from its share: each link of the chain rounds by less than
    one, and hands on its part of what the links before it rounded."""
    bounds, rest, left = np.zeros(len(shares)), 0.0, 1.0
    chain = np.argsort(-shares, kind="stable")
    for receiver in chain[:-1]:
        part = min(1.0, shares[receiver] / left)
        bounds[receiver] = 1 + part * rest
        rest = 1 + (1 - part) * rest
        left -= shares[receiver]
    bounds[chain[-1]] = rest
    return bounds + 1e-6


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.sampled_from([1, 4, 12]))
@settings(max_examples=50, deadline=None)
def test_every_prefix_of_a_lane_holds_the_shares_of_the_weights(
    weights: list[float], lanes: int
) -> None:
    mixture = mixture_of([[20]] * len(weights), [lanes] * len(weights), weights=weights)
    assert mixture.num_samples is None
    table = dealt(mixture, 200)
    exact = np.array(weights) / sum(weights)
    shares = np.array(mixture.parts) / 10**6
    assert np.abs(shares - exact).max() < 1e-6 and sum(mixture.parts) == 10**6
    for d, limit in enumerate(bounds_of(shares)):
        counts = np.cumsum(table == d, axis=0)
        assert np.abs(counts - shares[d] * np.arange(1, 201)[:, None]).max() <= limit
        assert limit < 2 + math.log(len(weights))


def test_two_data_sets_keep_within_one_sample_of_their_shares() -> None:
    mixture = mixture_of([[50] * 9, [7]], [8, 1], weights=[0.7, 0.3])
    counts = np.cumsum(dealt(mixture, 2_000) == 1, axis=0)
    assert np.abs(counts - 0.3 * np.arange(1, 2_001)[:, None]).max() < 1
    # The phases differ: at any slot some lanes have the one and some the other.
    per_slot = (dealt(mixture, 2_000) == 1).sum(1)
    assert per_slot.min() >= 1 and per_slot.max() <= 4


def test_far_away_weights_are_still_exact() -> None:
    mixture = mixture_of([[50] * 9, [7]], [8, 1], weights=[3, 1])
    start = 10**12
    datasets, own = mixture.split(np.arange(start, start + 8 * 4_000))
    assert abs(np.count_nonzero(datasets) - 8_000) <= 8
    assert np.abs(own[datasets == 1] - start // 4 - 4_000).max() <= 4_000 + 8
    assert len(set(own[datasets == 1].tolist())) == np.count_nonzero(datasets)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_with_weights_each_data_set_still_keeps_its_own_epochs(
    weights: list[float], seed: int
) -> None:
    sizes = [[5, 0, 3], [11], [2, 2], [1], [9, 4]][: len(weights)]
    mixture = mixture_of(sizes, [4, 1, 2, 1, 2], weights=weights)
    datasets, own = mixture.split(np.arange(0, 1_000 * mixture.lanes))
    for d in range(len(weights)):
        numbers = np.sort(own[datasets == d])
        assert len(np.unique(numbers)) == len(numbers)
        # No number is missing but where lanes are a few samples apart.
        apart = 2 * bounds_of(np.array(mixture.parts) / 10**6)[d]
        gapless = len(numbers) - math.ceil(apart) * mixture.lanes
        assert numbers[: max(0, gapless)].tolist() == list(range(max(0, gapless)))


def test_a_mixture_keeps_ranks_to_their_lanes_of_each_data_set() -> None:
    sizes = [[25] * 64, [30] * 32]
    for kinds in ({"epochs": [1, 1]}, {"weights": [5, 3]}):
        mixture = mixture_of(sizes, [8, 8], **kinds)
        numbers = np.arange(1_600 + 960)
        datasets, shards, _ = mixture.locate(numbers)
        for d, count in enumerate((64, 32)):
            readers = [set(shards[(datasets == d) & (numbers % 8 == r)].tolist()) for r in range(8)]
            # 7 lane ends, and with weights the beginning of the next epoch.
            assert sum(map(len, readers)) <= count + 7 + (16 if "weights" in kinds else 0)


@given(st.integers(1, 2**40), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40))
@settings(max_examples=300, deadline=None)
def test_shares_are_exact_in_64_bits(total: int, slots: int, share: int, phase: int) -> None:
    slots, share, phase = slots % (total + 1), share % (total + 1), phase % total
    arguments = (np.array([v], dtype=np.uint64) for v in (slots, share, phase, total))
    assert int(order_module._share(*arguments)[0]) == (slots * share + phase) // total


# --- aspect buckets


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4).filter(
        lambda rows: any(map(any, rows))
    ),
    st.integers(1, 6),
    st.sampled_from([1, 2, 5]),
    st.one_of(st.none(), st.integers(1, 12)),
)
@settings(max_examples=80, deadline=None)
def test_a_group_is_one_bucket_and_each_buckets_epochs_are_exact(
    sizes: list[list[int]], group: int, lanes: int, window: int | None
) -> None:
    order = Buckets(sizes, 2, group, lanes=lanes, window=window)
    # N groups: every bucket's samples exactly `group` times.
    buckets, shards, ranks = order.locate(np.arange(order.num_samples * group))
    assert (buckets.reshape(-1, group) == buckets.reshape(-1, group)[:, :1]).all()
    for bucket, row in enumerate(sizes):
        own = np.flatnonzero(buckets == bucket)
        found = list(zip(shards[own].tolist(), ranks[own].tolist(), strict=True))
        assert len(found) == group * sum(row)
        for epoch in range(group):
            part = found[epoch * sum(row) : (epoch + 1) * sum(row)]
            assert Counter(part) == Counter(every(np.array(row)))


def test_buckets_come_in_proportion_and_read_the_same_shards() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(200, [0.5, 0.3, 0.2], size=64).T
    order = Buckets(sizes, 0, 16, lanes=4, window=400)
    buckets, shards, _ = order.locate(np.arange(order.num_samples))
    counts = np.cumsum(buckets[:, None] == np.arange(3), axis=0)[15::16] / 16
    shares = sizes.sum(1) / sizes.sum()
    apart = np.abs(counts - np.arange(1, len(counts) + 1)[:, None] * shares)
    assert (apart.max(0) <= bounds_of(shares)).all()
    # A moment's reads are parts of two windows in each of four lanes, 5 or 6 shards. Had each
    # bucket an order of shards of its own, they would be many more.
    others = {
        b: EpochOrder(row, b, lanes=4, window=order.orders[b].window) for b, row in enumerate(sizes)
    }
    _, own = order.split(np.arange(order.num_samples))
    together, alone = [], []
    for now in np.split(np.arange(order.num_samples), order.num_samples // 1_600):
        together.append(len(np.unique(shards[now])))
        mine = {b: own[now][buckets[now] == b] for b in others}
        alone.append(len(set().union(*(others[b].locate(n)[0].tolist() for b, n in mine.items()))))
    assert np.mean(together) < 4 * 6.5 < 4 * 8.5 < np.mean(alone)


# --- how good it is


def test_quality_tells_a_uniform_permutation_from_poor_ones() -> None:
    sizes = np.full(200, 100)
    rng = np.random.default_rng(0)
    uniform = measure(rng.permutation(20_000), sizes)
    assert uniform.displacement == pytest.approx(1, abs=0.03)
    assert uniform.neighbours == pytest.approx(1, abs=0.35)
    assert uniform.batch_shards == pytest.approx(1, abs=0.01)
    assert uniform.spread == pytest.approx(0.087, abs=0.01)
    assert uniform.deciles == pytest.approx(1, abs=0.6)
    unshuffled = measure(np.arange(20_000), sizes)
    assert unshuffled.displacement == 0
    assert unshuffled.neighbours > 150 and unshuffled.batch_shards < 0.03
    assert unshuffled.spread == pytest.approx(0.75, abs=0.01) and unshuffled.deciles > 1_000
    reverse = measure(np.arange(20_000)[::-1].copy(), sizes)
    assert reverse.displacement == pytest.approx(1.5, abs=0.01) and reverse.deciles > 1_000


def test_lanes_and_windows_mix_as_they_should() -> None:
    sizes = np.full(200, 100)
    whole = quality(EpochOrder(sizes, 0, lanes=1, window=None))
    assert whole.displacement == pytest.approx(1, abs=0.03)
    assert whole.neighbours == pytest.approx(1, abs=0.35)
    assert whole.spread == pytest.approx(0.087, abs=0.01)
    assert whole.deciles == pytest.approx(1, abs=0.6)
    narrow = quality(EpochOrder(sizes, 0, lanes=1, window=50))
    lanes = quality(EpochOrder(sizes, 0, lanes=16, window=50))
    assert narrow.batch_shards < 0.05 < 0.15 < lanes.batch_shards < 1
    wide = quality(EpochOrder(sizes, 0, lanes=16, window=1_000))
    assert wide.batch_shards > 2 * lanes.batch_shards
    assert wide.spread < lanes.spread
    origins = origins_of(EpochOrder(sizes, 0), epoch=2)
    assert sorted(origins.tolist()) == list(range(20_000))
