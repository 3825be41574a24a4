"""What the engine is told: parameter groups, the learning rate over samples, batch arithmetic."""

import pytest

from pretrain.engine_config import EngineConfig, accumulation
from pretrain.errors import ConfigError
from pretrain.optim import OptimizerConfig, parameter_groups
from tests.support import tiny


def test_every_parameter_is_in_one_group_and_only_matrices_are_decayed():
    task = tiny.task({"generate": {}, "align": {}})
    config = OptimizerConfig(
        weight_decay=0.1, rate_scales={"model.trunk": 3.0, "model.trunk.unet": 0.5}
    )
    groups = parameter_groups(task, config)
    scale_of = {id(p): g["rate_scale"] for g in groups for p in g["params"]}
    assert len(scale_of) == sum(len(g["params"]) for g in groups) == len(list(task.parameters()))
    for name, parameter in task.named_parameters():
        expected = 0.5 if ".unet." in name else 3.0 if "model.trunk" in name else 1.0
        assert scale_of[id(parameter)] == expected, name
    assert all((g["weight_decay"] > 0) == all(p.ndim > 1 for p in g["params"]) for g in groups)


def test_a_prefix_without_parameters_is_refused():
    with pytest.raises(ConfigError, match=r"model\.trunck.*there are: .*model\.trunk\.unet"):
        parameter_groups(
            tiny.task({"generate": {}}), OptimizerConfig(rate_scales={"model.trunck": 2})
        )


def test_the_rate_is_a_function_of_samples_alone():
    config = OptimizerConfig(lr=1.0, warmup_samples=100, final=0.1)
    assert config.rate(0, 1000) == pytest.approx(1 / 101)
    assert config.rate(100, 1000) == pytest.approx(1.0)
    assert config.rate(550, 1000) == pytest.approx(0.55)
    assert config.rate(1000, 1000) == config.rate(2000, 1000) == pytest.approx(0.1)
    constant = OptimizerConfig(lr=1.0, warmup_samples=0, schedule="constant")
    assert constant.rate(0, 10) == constant.rate(9, 10) == 1.0


@pytest.mark.parametrize(
    ("micro", "ranks", "steps"), [(8, 2, 4), (64, 1, 1), (1, 64, 1), (16, 4, 1)]
)
def test_micro_steps(micro, ranks, steps):
    assert accumulation(EngineConfig(micro_batch=micro), 64, ranks) == steps


def test_a_batch_that_does_not_divide_names_what_would():
    with pytest.raises(
        ConfigError, match=r"micro_batch=6 on 1 ranks .*global_batch=64; try 16, 32, 64"
    ):
        accumulation(EngineConfig(micro_batch=6), 64, 1)
    with pytest.raises(ConfigError, match="use a global_batch that 3 divides"):
        accumulation(EngineConfig(micro_batch=1), 64, 3)
