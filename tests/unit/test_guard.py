"""Which losses are learned from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.guard import NON_FINITE, SPIKE, Guard, GuardConfig


def fed(losses: list[float], **settings) -> Guard:
    guard = Guard(GuardConfig(**{"spike_z": 8.0, "least": 4, "window": 8, **settings}))
    for loss in losses:
        guard.accept(loss)
    return guard


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step(loss):
    assert fed([]).judge(loss) == NON_FINITE
    assert fed([1.0] * 8, spike_z=None).judge(loss) == NON_FINITE


def test_a_robust_deviation_is_of_median_and_mad():
    guard = fed([1.0, 2.0, 3.0, 4.0, 100.0])  # one outlier moves neither
    assert guard.z(3.0) == 0
    assert guard.z(3.0 + 1.4826) == pytest.approx(1.0)  # MAD is 1
    assert guard.judge(3.0 + 1.4826 * 7.9) is None
    assert guard.judge(3.0 + 1.4826 * 8.1) == SPIKE


def test_only_upward_and_only_with_enough_history():
    assert fed([1.0, 1.1, 0.9, 1.0]).judge(-50.0) is None  # a sudden fall is no spike
    assert fed([1.0, 1.1, 0.9]).judge(50.0) is None
    assert fed([1.0, 1.1, 0.9, 1.0]).judge(50.0) == SPIKE
    assert fed([1.0, 1.1, 0.9, 1.0], spike_z=None).judge(50.0) is None


def test_a_loss_that_hardly_moves_makes_no_noise_a_spike():
    guard = fed([2.0] * 8)
    assert guard.judge(2.0 * 1.05) is None  # 5 times the least spread of 1%
    assert guard.judge(2.0 * 1.09) == SPIKE


def test_the_window_forgets():
    guard = fed([10.0] * 8 + [1.0, 1.1] * 4)
    assert guard.judge(9.0) == SPIKE


@given(st.lists(st.floats(0.1, 10), max_size=40), st.lists(st.floats(0.01, 100), max_size=5))
def test_restored_it_judges_the_same(history, later):
    guard, other = fed(history), fed([5.0] * 3)
    other.load_state_dict(guard.state_dict())
    for loss in later:
        assert other.judge(loss) == guard.judge(loss)
        guard.accept(loss)
        other.accept(loss)
