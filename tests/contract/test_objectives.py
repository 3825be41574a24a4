"""What every file in pretrain/objectives must keep, whoever wrote it.

An objective teaches by its own term, or by changing what others read (`condition`). One that does
nothing without certain others declares in its settings that it `needs` them: it is then always run
beside them, and what is said here of its term holds for the sum of its term and theirs.
"""

from pathlib import Path

import pytest
import torch

from pretrain import config as configs
from pretrain import flops, plugins
from pretrain.errors import ConfigError
from pretrain.objectives.base import Context, Half, Objective, ObjectiveConfig
from pretrain.run_config import RunConfig
from pretrain.task import PACKAGE, PretrainTask, TaskConfig, check_objectives
from pretrain.types import LossTerm
from tests.support import tiny

NAMES = plugins.names(PACKAGE)
BOTH: dict[str, dict[str, float]] = {"generate": {}, "align": {}}
ROOT = Path(__file__).resolve().parents[2]
HALVES: set[Half] = {"generation", "alignment"}


def needs(name: str) -> set[str]:
    return set(plugins.load(PACKAGE, name, "objectives").Settings.needs)


def alone(name: str, weight: float = 1.0) -> dict[str, dict[str, float]]:
    """The smallest set of objectives with ``name``."""
    return {name: {"weight": weight}} | {other: {"weight": 1.0} for other in needs(name)}


def context(task: PretrainTask, n: int = 6) -> Context:
    return task.context(tiny.batch(n))


def taught(task: PretrainTask, name: str, context: Context) -> torch.Tensor:
    """The sum of the terms by which ``name`` teaches: its own, and those of what it needs."""
    terms = [task.objectives[n](context).loss for n in [name, *sorted(needs(name))]]
    return torch.stack(terms).sum()


def conditions(name: str) -> bool:
    return type(tiny.task(alone(name)).objectives[name]).condition is not Objective.condition


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
    task = tiny.task(alone(name))
    read = context(task)
    term = task.objectives[name](read)
    assert term.loss.dtype == torch.float32 and term.loss.ndim == 0
    assert torch.isfinite(term.loss)
    for key, value in term.metrics.items():
        assert value.ndim == 0 and torch.isfinite(value), key
    taught(task, name, read).backward()
    reached = [p for p in task.model.trunk.parameters() if p.grad is not None and p.grad.any()]
    assert reached, "the term teaches the trunk nothing"


@pytest.mark.parametrize("name", NAMES)
def test_its_term_stays_fp32_under_bf16_weights(name: str) -> None:
    """The engine makes the whole task bf16; a sum over samples in bf16 would lose digits."""
    task = tiny.task(alone(name)).bfloat16()
    with torch.no_grad():
        term = task.objectives[name](context(task))
    assert term.loss.dtype == torch.float32 and torch.isfinite(term.loss)


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_no_more_of_the_trunk_than_it_declares(name: str) -> None:
    """The half that no objective declares is not computed, and is None in the output."""
    task = tiny.task(alone(name))
    output = context(task).output
    assert (output.f_z_BCHW is not None) == ("generation" in task.halves)
    assert (output.e0_hat_BE is not None) == ("alignment" in task.halves)
    task(tiny.batch(4))


@pytest.mark.parametrize("name", NAMES)
def test_its_own_weights_start_from_the_seed_whatever_is_beside_it(name: str) -> None:
    beside: dict[str, dict[str, float]] = {other: {"weight": 1.0} for other in NAMES}

    def start(objectives: dict[str, dict[str, float]], seed: int = 0) -> dict[str, torch.Tensor]:
        task = PretrainTask(tiny.model(), check_objectives(objectives), TaskConfig(), seed)
        return dict(task.objectives[name].named_parameters())

    own, among, other = start(alone(name)), start(beside), start(alone(name), seed=1)
    assert all(torch.equal(own[key], among[key]) for key in own)
    drawn = [key for key in own if own[key].unique().numel() > 1]
    assert all(not torch.equal(own[key], other[key]) for key in drawn)


@pytest.mark.parametrize("name", NAMES)
def test_it_asks_the_trunk_again_as_often_as_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.task(alone(name))
    read, calls = context(task), []
    encode = task.model.trunk.encode
    monkeypatch.setattr(task.model.trunk, "encode", lambda *a: calls.append(1) or encode(*a))
    task.objectives[name](read)
    assert len(calls) == check_objectives(alone(name))[name].further_passes


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_from_every_sample(name: str) -> None:
    task = tiny.task(alone(name))
    with torch.no_grad():
        losses = {round(float(taught(task, name, context(task, n))), 9) for n in range(2, 7)}
    assert len(losses) == 5, "a sample more changes nothing"


@pytest.mark.parametrize("name", NAMES)
def test_weight_0_leaves_it_out(name: str) -> None:
    other = next(n for n in NAMES if n != name and not needs(n))
    checked = check_objectives({name: {"weight": 0.0}, other: {"weight": 1.0}})
    assert set(checked) == {other}
    task = tiny.task({name: {"weight": 0.0}, other: {"weight": 1.0}})
    assert name not in task.objectives
    assert not any(key.startswith(f"{name}/") for key in task(tiny.batch(3)).metrics)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_adding_it_changes_the_value_of_no_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But through `condition`, if it has one, and then of none that reads the alignment half."""
    others = {n: {"weight": 1.0} for n in NAMES if n != name and name not in needs(n)}
    before = tiny.task(others)
    alone = before(tiny.batch(5)).metrics
    # The order of a config must not matter either: it comes first here.
    task = tiny.task({name: {"weight": 1e-9}, **others})
    together = task(tiny.batch(5)).metrics
    own = task.objectives[name]
    reached = {
        n for n, o in before.objectives.items() if conditions(name) and o.reads != {"alignment"}
    }
    for key, value in alone.items():
        if key == "loss" or key.partition("/")[0] not in reached:
            same = torch.allclose(together[key], value, rtol=1e-5, atol=1e-6)
            assert same or (key == "loss" and reached), key
    assert f"{name}/loss" in together
    if not conditions(name):
        return
    changed = [key for key in alone if not torch.allclose(together[key], alone[key], rtol=1e-5)]
    assert changed, "its condition changes nothing"
    monkeypatch.setattr(own, "condition", lambda batch, noised, model, rng: noised)
    monkeypatch.setattr(own, "forward", lambda context: LossTerm(torch.zeros(())))
    for key, value in task(tiny.batch(5)).metrics.items():
        if not key.startswith(f"{name}/"):
            assert torch.allclose(value, alone[key], rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_its_condition_is_the_same_for_a_sample_in_any_batch(name: str) -> None:
    """And leaves the alignment half's inputs as they are."""
    task = tiny.task(alone(name))
    plain, whole = task.noise(tiny.batch(4)), context(task, 4).noised
    part = task.context(tiny.batch(2, start=2)).noised
    assert torch.allclose(whole.c_BLD[2:], part.c_BLD, atol=1e-5)
    assert torch.equal(whole.null_c_BLD, plain.null_c_BLD)
    assert torch.equal(whole.e_t_BE, plain.e_t_BE) and torch.equal(whole.z_BCHW, plain.z_BCHW)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_it_can_be_counted(name: str) -> None:
    """On the meta device, as `--dry-run` and the start of a training do."""
    tree = configs.read_yaml(ROOT / "configs/debug.yaml")
    tree["data"]["tokenizer"] = str(ROOT / tree["data"]["tokenizer"])
    without = flops.sample_flops(configs.build(RunConfig, tree | {"objectives": BOTH}), 1536)
    with_it = flops.sample_flops(
        configs.build(RunConfig, tree | {"objectives": BOTH | alone(name)}), 1536
    )
    assert with_it["text encoder"] == without["text encoder"] > 0
    assert sum(with_it.values()) >= sum(without.values())


@pytest.mark.parametrize("name", [n for n in NAMES if needs(n)])
def test_without_what_it_needs_it_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"objectives\.{name} works through objectives\."):
        check_objectives({name: {"weight": 1.0}})


@pytest.mark.parametrize("name", NAMES)
def test_its_weight_scales_its_part_of_the_sum(name: str) -> None:
    def part(weight: float) -> torch.Tensor:
        output = tiny.task(alone(name, weight))(tiny.batch(5))
        return output.loss - sum(output.metrics[f"{other}/loss"] for other in needs(name))

    with torch.no_grad():
        one, three = part(1.0), part(3.0)
    assert torch.allclose(three, 3 * one)


@pytest.mark.parametrize("name", NAMES)
def test_its_own_parameters_can_be_partitioned_and_are_used(name: str) -> None:
    task = tiny.task(alone(name))
    objective = task.objectives[name]
    task(tiny.batch(4)).loss.backward()
    for key, parameter in objective.named_parameters():
        assert parameter.ndim >= 1, f"{key}: DeepSpeed cannot broadcast 0-dimensional parameters"
        assert parameter.grad is not None, f"{key} is never used"
        assert not needs(name) or parameter.grad.any() or key.endswith(".to_k.bias"), (
            f"{key}: what it needs teaches it nothing"
        )
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
