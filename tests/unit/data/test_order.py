"""The order of samples is a pure function that no number of ranks or steps can change."""

import itertools
import pickle
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.sampler import EpochOrder, rank_slice
from pretrain.errors import ConfigError

sizes_of = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)


def places(order: EpochOrder, epoch: int) -> list[tuple[int, int]]:
    start = epoch * order.num_samples
    return [order.locate(n) for n in range(start, start + order.num_samples)]


@given(sizes_of, st.integers(1, 8), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_each_epoch_holds_each_sample_once(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    found = Counter(places(EpochOrder(sizes, seed, window), epoch))
    assert found == Counter((s, i) for s, size in enumerate(sizes) for i in range(size))


@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 10_000))
def test_ranks_split_the_global_batch_in_order(world: int, per_rank: int, start: int) -> None:
    batch = world * per_rank
    joined = [n for r in range(world) for n in rank_slice(start, batch, r, world)]
    assert joined == list(range(start, start + batch))


@given(sizes_of, st.integers(1, 4), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_position_is_the_same_whatever_was_asked_before(
    sizes: list[int], window: int, number: int
) -> None:
    fresh, used = EpochOrder(sizes, 7, window), EpochOrder(sizes, 7, window)
    for n in (0, 3 * number, number + 1, 10 * used.num_samples):
        used.locate(n)
    assert used.locate(number) == fresh.locate(number)
    assert pickle.loads(pickle.dumps(used)).locate(number) == fresh.locate(number)


@given(sizes_of, st.integers(1, 4), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_window_is_whole_shards_and_lies_in_one_epoch(
    sizes: list[int], window: int, number: int
) -> None:
    order = EpochOrder(sizes, 3, window)
    start, end = order.window_of(number)
    assert start <= number < end
    assert start // order.num_samples == (end - 1) // order.num_samples
    shards = {order.locate(n)[0] for n in range(start, end)}
    assert len(shards) <= window
    assert sum(sizes[s] for s in shards) == end - start


def test_seed_and_epoch_change_the_order() -> None:
    order = EpochOrder([50, 50, 50], 0, 2)
    assert places(order, 0) != places(order, 1)
    assert places(order, 0) != places(EpochOrder([50, 50, 50], 1, 2), 0)
    assert places(order, 1) == places(EpochOrder([50, 50, 50], 0, 2), 1)
    # Shards are permuted as well as the samples in their windows: neighbours change.
    shards = EpochOrder([1] * 20, 0, 1)
    assert places(shards, 0) != places(shards, 1)


def test_a_thousand_ranks_share_a_million_samples() -> None:
    order = EpochOrder([1_000] * 1_000, 0, 16)
    seen = {order.locate(rank_slice(0, 4_000, r, 1_000)[0]) for r in range(1_000)}
    assert len(seen) == 1_000
    assert len({shard for shard, _ in seen}) <= 16  # one window is all that must be held


def test_a_batch_that_does_not_divide_names_field_value_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"global_batch=10 .* 4 ranks; try 8 or 12"):
        rank_slice(0, 10, 0, 4)


@given(
    sizes_of,
    st.integers(1, 4),
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5
    ),
)
@settings(max_examples=60, deadline=None)
def test_stops_with_other_ranks_and_batches_lose_and_repeat_nothing(
    sizes: list[int], window: int, starts: list[tuple[int, int, int]]
) -> None:
    """Each start runs some steps on some ranks; a new process goes on from the sample count."""
    epochs, seen, start = 2, [], 0
    total = epochs * sum(sizes)
    for world, per_rank, steps in itertools.cycle(starts):
        order = EpochOrder(sizes, 5, window)
        for _ in range(steps):
            for rank in range(world):
                seen += [order.locate(n) for n in rank_slice(start, world * per_rank, rank, world)]
            start += world * per_rank
        if start >= total:
            break
    found = Counter(seen[:total])
    every = [(s, i) for s, size in enumerate(sizes) for i in range(size)]
    assert found == Counter(every * epochs)
    assert seen == [EpochOrder(sizes, 5, window).locate(n) for n in range(start)]


@pytest.mark.parametrize(
    ("sizes", "window"), [([7], 1), ([7], 9), ([0, 3, 0, 1, 0], 1), ([0, 0, 2], 2), ([1] * 9, 3)]
)
def test_odd_shard_sizes_are_whole_epochs_too(sizes: list[int], window: int) -> None:
    every = Counter((s, i) for s, size in enumerate(sizes) for i in range(size))
    order = EpochOrder(sizes, 0, window)
    assert [Counter(places(order, epoch)) for epoch in range(3)] == [every] * 3


def test_a_far_sample_is_found_without_walking_to_it() -> None:
    began = time.process_time()
    EpochOrder([10, 20, 30], 0, 2).locate(10**9)
    EpochOrder([10_000] * 100, 0, 16).locate(10**12)
    assert time.process_time() - began < 1
