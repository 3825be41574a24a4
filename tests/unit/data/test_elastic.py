"""Exactly once: every sample of every epoch, through stops and resumes on other ranks and
workers."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import config as configs
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.tokenizer import Tokenizer
from tests.unit.data.conftest import good, index, write_tar

BATCH = 12  # divides by 1, 2, 3 and 4 ranks


def consume(
    config: DataConfig, tokenizer: Tokenizer, start: int, steps: int, world: int
) -> list[str]:
    """The keys of ``steps`` steps from sample ``start``, in order of their numbers; every rank is a
    loader of its own, and each is stopped with its workers ahead."""
    found: dict[int, str] = {}
    for rank in range(world):
        loader = Loader(config, tokenizer, 3, BATCH, rank, world)
        loader.load_state_dict({"next_sample": start})
        batches = iter(loader)
        for _ in range(steps):
            batch = next(batches)
            found.update(zip(batch.positions_B.tolist(), batch.keys, strict=True))
        assert loader.state_dict() == {"next_sample": start + steps * BATCH}
    assert sorted(found) == list(range(start, start + steps * BATCH))
    return [found[n] for n in sorted(found)]


def epochs_of(keys: Sequence[str], size: int) -> list[Counter[str]]:
    return [Counter(keys[i : i + size]) for i in range(0, len(keys) - size + 1, size)]


def test_three_epochs_are_exact_through_four_shapes_of_ranks_and_workers(
    tmp_path: Path, small_tokenizer: str
) -> None:
    sizes = [31, 0, 5, 17, 1, 40, 9, 3, 22, 16]
    urls = [
        write_tar(tmp_path / f"{s}.tar", [m for i in range(n) for m in good(f"s{s}-{i}")])
        for s, n in enumerate(sizes)
    ]
    tree = {"train": index(tmp_path, urls), "tokenizer": small_tokenizer, "size": 8, "tokens": 8}
    shapes = [(1, 0), (2, 2), (4, 1), (3, 2)]
    steps_left = -(-3 * sum(sizes) // BATCH)
    draw = random.Random(11)
    keys: list[str] = []
    for i, (world, workers) in enumerate(shapes):
        last = i == len(shapes) - 1
        steps = steps_left if last else draw.randint(1, steps_left - (len(shapes) - i))
        # Lanes and windows small enough that they all end and change within these epochs.
        order = {"lanes": 4, "window": 16}
        config = configs.build(DataConfig, {**tree, "workers": workers, "order": order})
        keys += consume(config, Tokenizer(small_tokenizer), len(keys), steps, world)
        steps_left -= steps
    every = Counter(f"s{s}-{i}" for s, n in enumerate(sizes) for i in range(n))
    assert epochs_of(keys, sum(sizes))[:3] == [every] * 3
    assert keys[: sum(sizes)] != keys[sum(sizes) : 2 * sum(sizes)]


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda s: sum(s) > 0),
    lanes=st.sampled_from([None, 1, 2, 4, 8]),
    window=st.sampled_from([None, 1, 7, 64]),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None)
def test_epochs_are_exact_for_any_shards_lanes_windows_and_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    small_tokenizer: str,
    sizes: list[int],
    lanes: int | None,
    window: int | None,
    worlds: list[int],
    seed: int,
) -> None:
    """Shards smaller than a batch, and empty ones, included."""
    folder = tmp_path_factory.mktemp("elastic")
    urls = [
        write_tar(folder / f"{s}.tar", [m for i in range(n) for m in good(f"s{s}-{i}")])
        for s, n in enumerate(sizes)
    ]
    tree = {"train": index(folder, urls), "tokenizer": small_tokenizer, "size": 8, "tokens": 8}
    order = {"lanes": lanes, "window": window}
    config = configs.build(DataConfig, {**tree, "workers": 0, "order": order})
    tokenizer = Tokenizer(small_tokenizer)
    draw, keys = random.Random(seed), list[str]()
    while len(keys) < 2 * sum(sizes):
        world = worlds[draw.randrange(len(worlds))]
        keys += consume(config, tokenizer, len(keys), draw.randint(1, 4), world)
    every = Counter(f"s{s}-{i}" for s, n in enumerate(sizes) for i in range(n))
    assert epochs_of(keys, sum(sizes))[:2] == [every] * 2


def test_a_resume_at_a_billion_reads_no_more_than_one_at_zero(
    corpus: Callable[..., str], small_tokenizer: str
) -> None:
    """O(1): nothing is replayed, whatever the number; a replay of 10**9 would take hours."""
    tree = {"train": corpus([7, 4]), "tokenizer": small_tokenizer, "size": 8, "workers": 0}
    config = configs.build(DataConfig, tree)
    found = consume(config, Tokenizer(small_tokenizer), 10**9, 2, 2)
    assert len(found) == 2 * BATCH
