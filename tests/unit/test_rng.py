"""Draws are functions of (seed, sample number, purpose) and of nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.rng import SampleRandom, derive_seed, generator

part = st.one_of(st.integers(0, 10**9), st.text("ab\x1f é", max_size=5))
parts_of = st.lists(part, min_size=1, max_size=4)


@given(parts_of)
def test_a_seed_is_a_63_bit_number(parts: list[int | str]) -> None:
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) == derive_seed(*parts)


def test_seeds_differ_in_every_part_and_its_place() -> None:
    seeds = [derive_seed(*p) for p in [(1, 2), (2, 1), (12,), (1, 2, ""), ("1", "2x"), (1, "2 ")]]
    assert len(set(seeds)) == len(seeds)
    assert len({derive_seed(0, n, "x") for n in range(10_000)}) == 10_000


def test_a_seed_is_the_same_in_every_process_and_version() -> None:
    """Pinned: another value here would change the order and noise of every run that is resumed."""
    assert derive_seed(0, 1, "shards") == 4_066_324_353_181_837_726


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=6, unique=True), st.integers(0, 9))
def test_a_sample_draws_the_same_in_any_batch(positions: list[int], seed: int) -> None:
    together = SampleRandom(seed, torch.tensor(positions))
    for row, position in enumerate(positions):
        alone = SampleRandom(seed, [position])
        assert torch.equal(together.normal("n", (2, 3))[row], alone.normal("n", (2, 3))[0])
        assert torch.equal(together.uniform("u")[row], alone.uniform("u")[0])


def test_draws_neither_read_nor_move_the_global_generator() -> None:
    torch.manual_seed(1)
    first, state = SampleRandom(0, [5]).normal("n", (4,)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(SampleRandom(0, [5]).normal("n", (4,)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", [(1, 5, "n"), (0, 6, "n"), (0, 5, "m")])
def test_seed_number_and_purpose_each_change_the_draw(other: tuple[int, int, str]) -> None:
    seed, position, purpose = other
    a, b = (
        SampleRandom(0, [5]).normal("n", (64,)),
        SampleRandom(seed, [position]).normal(purpose, (64,)),
    )
    assert abs(torch.corrcoef(torch.cat([a, b]))[0, 1]) < 0.5 and not torch.equal(a, b)


def test_normal_and_uniform_are_what_they_say() -> None:
    draws = SampleRandom(0, range(2_000))
    normal, uniform = draws.normal("n", (8,)), draws.uniform("u")
    assert normal.shape == (2_000, 8) and normal.dtype == uniform.dtype == torch.float32
    assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03  # 5 standard errors
    assert uniform.shape == (2_000,) and uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.035


def test_an_empty_batch_keeps_its_shape() -> None:
    assert SampleRandom(0, []).normal("n", (2, 3)).shape == (0, 2, 3)
    assert SampleRandom(0, []).uniform("u").shape == (0,)


def test_a_generator_is_seeded_by_its_parts() -> None:
    a, b = (torch.rand(3, generator=generator(0, "x")) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.rand(3, generator=generator(0, "y")))
