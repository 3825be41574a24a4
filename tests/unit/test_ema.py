"""Moving averages over samples."""

import pytest
import torch

from pretrain.config import build
from pretrain.ema import Ema, EmaConfig, decay
from pretrain.errors import ConfigError


def test_after_one_half_life_half_is_left_however_it_is_cut_into_steps():
    for batch in (1, 10, 100):
        weights = torch.zeros(3)
        ema = Ema([weights], EmaConfig(half_lives=(100,), ramp=1e9))
        weights += 1.0
        for samples in range(batch, 101, batch):
            ema.update(samples, batch)
        assert ema.copies[100][0].tolist() == pytest.approx([0.5] * 3, rel=1e-5)


def test_early_the_half_life_is_short():
    config = EmaConfig(half_lives=(1000,), ramp=0.05)
    assert decay(config, 1000, 100, 5) == pytest.approx(0.5)  # 5% of 100 samples
    assert decay(config, 1000, 20_000, 10) == pytest.approx(0.5 ** (10 / 1000))
    assert decay(config, 1000, 0, 8) == 0  # nothing seen: nothing to remember


def test_the_weights_themselves_are_not_touched():
    weights = torch.ones(3, requires_grad=True)
    ema = Ema([weights], EmaConfig(half_lives=(10, 20)))
    ema.update(8, 8)
    assert weights.tolist() == [1, 1, 1] and not ema.copies[10][0].requires_grad
    assert ema.copies[10][0].data_ptr() != weights.data_ptr()
    assert list(ema.tensors()) == ["ema-10", "ema-20"]


def test_an_average_that_is_not_kept_cannot_be_used():
    with pytest.raises(ConfigError, match=r"use=5 is not one of half_lives=\[10\]; add it"):
        build(EmaConfig, {"half_lives": [10], "use": 5}, "ema")
    with pytest.raises(ConfigError, match="half_lives"):
        build(EmaConfig, {"half_lives": [0]}, "ema")
