"""What the engine is told: parameter groups, the learning rate over samples, batch arithmetic."""

import pytest

from pretrain.config import build
from pretrain.engine_config import EngineConfig, accumulation, deepspeed_config
from pretrain.errors import ConfigError
from pretrain.optim import OptimizerConfig, build_optimizer, freeze, parameter_groups
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
    # A factor of 1 undoes one of a base configuration, for a part that this model may not train.
    assert parameter_groups(
        tiny.task({"generate": {}}), OptimizerConfig(rate_scales={"model.trunck": 1})
    )


def test_the_rate_is_a_function_of_samples_alone():
    config = OptimizerConfig(lr=1.0, warmup_samples=100, final=0.1)
    assert config.rate(0, 1000) == pytest.approx(1 / 101)
    assert config.rate(100, 1000) == pytest.approx(1.0)
    assert config.rate(550, 1000) == pytest.approx(0.55)
    assert config.rate(1000, 1000) == config.rate(2000, 1000) == pytest.approx(0.1)
    constant = OptimizerConfig(lr=1.0, warmup_samples=0, schedule="constant")
    assert constant.rate(0, 10) == constant.rate(9, 10) == 1.0


def test_wsd_is_constant_and_then_falls_linearly():
    config = OptimizerConfig(
        lr=1.0, warmup_samples=100, schedule="wsd", decay_samples=200, final=0.1
    )
    assert config.rate(0, 1000) == pytest.approx(1 / 101)
    assert config.rate(100, 1000) == config.rate(800, 1000) == 1.0
    assert config.rate(900, 1000) == pytest.approx(0.55)
    assert config.rate(1000, 1000) == config.rate(5000, 1000) == pytest.approx(0.1)
    # Longer training moves the decay, and nothing before it.
    assert config.rate(900, 2000) == 1.0
    config.check_length(300)
    with pytest.raises(ConfigError, match=r"warmup_samples=100 and decay_samples=200 .*=299"):
        config.check_length(299)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"schedule": "wsd"}, "needs decay_samples"),
        ({"decay_samples": 5}, "decay_samples=5 means nothing to schedule='cosine'"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        build(OptimizerConfig, fields)


def test_frozen_parameters_are_in_no_group():
    task = tiny.task({"generate": {}, "align": {}})
    config = OptimizerConfig(freeze=("model.trunk.unet", "model.text_encoder.token"))
    optimizer = build_optimizer(task, config)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.named_parameters():
        frozen = name.startswith(config.freeze)
        assert (id(parameter) in trained) == (not frozen) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        (["model.trunck"], r"freeze names 'model\.trunck'.*there are: .*model\.trunk\.unet"),
        (["model", "objectives"], "leaves nothing to train"),
    ],
)
def test_a_freeze_that_cannot_be_meant_is_refused(prefixes, said):
    with pytest.raises(ConfigError, match=said):
        freeze(tiny.task({"generate": {}, "align": {}}), prefixes)


def test_a_rate_of_frozen_parameters_is_refused():
    config = OptimizerConfig(freeze=("model.trunk",), rate_scales={"model.trunk.unet": 2.0})
    with pytest.raises(ConfigError, match="begins no trained parameter"):
        build_optimizer(tiny.task({"generate": {}}), config)


@pytest.mark.parametrize("fused", [True, False])
def test_fused_where_it_is_not_said_otherwise(fused):
    optimizer = build_optimizer(tiny.task({"generate": {}}), OptimizerConfig(fused=fused))
    assert optimizer.defaults["fused"] is fused and OptimizerConfig().fused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offload_parameters": "cpu", "zero_stage": 2}, "offload_parameters='cpu' needs"),
        ({"offload_optimizer": "cpu", "zero_stage": 0}, "offload_optimizer='cpu' needs"),
        ({"offload_optimizer": "nvme"}, "offload_optimizer='nvme'"),
        ({"offload_parameters": "nvme"}, "nvme_path is not given"),
        ({"nvme_path": "/x"}, "nvme_path='/x', and offload_parameters='none'"),
        ({"precision": "fp8"}, "precision='fp8'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        build(EngineConfig, fields)


def test_what_deepspeed_is_told():
    config = EngineConfig(
        precision="fp16", offload_optimizer="cpu", offload_parameters="nvme", nvme_path="/scratch"
    )
    told = deepspeed_config(config, 2)
    assert told["fp16"] | {"loss_scale": 0, "initial_scale_power": 16} == told["fp16"]
    assert told["fp16"]["enabled"] and not told["bf16"]["enabled"]
    zero = told["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert zero["offload_param"]["device"] == "nvme"
    assert zero["offload_param"]["nvme_path"] == "/scratch"
    plain = deepspeed_config(EngineConfig(), 1)["zero_optimization"]
    assert "offload_optimizer" not in plain and "offload_param" not in plain


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
