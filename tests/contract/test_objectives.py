"""What every file in pretrain/objectives must keep, whoever wrote it."""

import pytest
import torch

from pretrain import plugins
from pretrain.errors import ConfigError
from pretrain.objectives.base import Context, Half, Objective, ObjectiveConfig
from pretrain.rng import SampleRandom
from pretrain.task import PACKAGE, PretrainTask, check_objectives
from tests.support import tiny

NAMES = plugins.names(PACKAGE)
HALVES: set[Half] = {"generation", "alignment"}


def context(task: PretrainTask, n: int = 6) -> Context:
    batch = tiny.batch(n)
    noised = task.noise(batch)
    output = task.model(noised, "generation" in task.halves, "alignment" in task.halves)
    return Context(batch, noised, output, task.model, SampleRandom(task.seed, batch.positions_B))


@pytest.mark.parametrize("name", NAMES)
def test_it_declares_settings_and_builds(name: str) -> None:
    module = plugins.load(PACKAGE, name, "objectives")
    assert issubclass(module.Settings, ObjectiveConfig) and module.__doc__
    assert module.Settings().weight >= 0, "a name alone must be a valid configuration"
    objective = module.build(module.Settings(weight=1.0), tiny.model())
    assert isinstance(objective, Objective)
    assert objective.reads and set(objective.reads) <= HALVES


@pytest.mark.parametrize("name", NAMES)
def test_its_term_is_a_finite_fp32_scalar_with_a_gradient_in_the_trunk(name: str) -> None:
    task = tiny.task({name: {"weight": 1.0}})
    term = task.objectives[name](context(task))
    assert term.loss.dtype == torch.float32 and term.loss.ndim == 0
    assert torch.isfinite(term.loss)
    for key, value in term.metrics.items():
        assert value.ndim == 0 and torch.isfinite(value), key
    term.loss.backward()
    reached = [p for p in task.model.trunk.parameters() if p.grad is not None and p.grad.any()]
    assert reached, "the term teaches the trunk nothing"


@pytest.mark.parametrize("name", NAMES)
def test_its_term_stays_fp32_under_bf16_weights(name: str) -> None:
    """The engine makes the whole task bf16; a sum over samples in bf16 would lose digits."""
    task = tiny.task({name: {"weight": 1.0}}).bfloat16()
    with torch.no_grad():
        term = task.objectives[name](context(task))
    assert term.loss.dtype == torch.float32 and torch.isfinite(term.loss)


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_no_more_of_the_trunk_than_it_declares(name: str) -> None:
    """The half that no objective declares is not computed, and is None in the output."""
    task = tiny.task({name: {"weight": 1.0}})
    output = context(task).output
    assert (output.f_z_BCHW is not None) == ("generation" in task.halves)
    assert (output.e0_hat_BE is not None) == ("alignment" in task.halves)
    task(tiny.batch(4))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_from_every_sample(name: str) -> None:
    task = tiny.task({name: {"weight": 1.0}})
    with torch.no_grad():
        losses = {
            round(float(task.objectives[name](context(task, n)).loss), 9) for n in range(2, 7)
        }
    assert len(losses) == 5, "a sample more changes nothing"


@pytest.mark.parametrize("name", NAMES)
def test_weight_0_leaves_it_out(name: str) -> None:
    other = next(n for n in NAMES if n != name)
    checked = check_objectives({name: {"weight": 0.0}, other: {"weight": 1.0}})
    assert set(checked) == {other}
    task = tiny.task({name: {"weight": 0.0}, other: {"weight": 1.0}})
    assert name not in task.objectives
    assert not any(key.startswith(f"{name}/") for key in task(tiny.batch(3)).metrics)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_adding_it_changes_the_value_of_no_other(name: str) -> None:
    others = {n: {"weight": 1.0} for n in NAMES if n != name}
    alone = tiny.task(others)(tiny.batch(5)).metrics
    # The order of a config must not matter either: it comes first here.
    together = tiny.task({name: {"weight": 1e-9}, **others})(tiny.batch(5)).metrics
    for key, value in alone.items():
        assert torch.allclose(together[key], value, rtol=1e-5, atol=1e-6), key
    assert f"{name}/loss" in together


@pytest.mark.parametrize("name", NAMES)
def test_its_weight_scales_its_part_of_the_sum(name: str) -> None:
    with torch.no_grad():
        one, three = (tiny.task({name: {"weight": w}})(tiny.batch(5)).loss for w in (1.0, 3.0))
    assert torch.allclose(three, 3 * one)


@pytest.mark.parametrize("name", NAMES)
def test_its_own_parameters_can_be_partitioned_and_are_used(name: str) -> None:
    task = tiny.task({name: {"weight": 1.0}})
    objective = task.objectives[name]
    task(tiny.batch(4)).loss.backward()
    for key, parameter in objective.named_parameters():
        assert parameter.ndim >= 1, f"{key}: DeepSpeed cannot broadcast 0-dimensional parameters"
        assert parameter.grad is not None, f"{key} is never used"
        owner = objective.get_submodule(key.rpartition(".")[0])
        assert not list(owner.children()), f"{key}: not in a leaf module"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_field_of_its_settings_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"objectives\.{name}\.wieght=1"):
        check_objectives({name: {"wieght": 1}})


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_weight_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"objectives\.{name}\.weight=-1"):
        check_objectives({name: {"weight": -1}})
