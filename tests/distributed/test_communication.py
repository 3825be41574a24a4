"""The plan's bytes against real ranks: what they hold between steps, and what their collectives
move in one."""

import ast
import math

import pytest

from pretrain import plan
from pretrain.communication import Sizes, by_name, step_collectives
from pretrain.ema import EmaConfig
from pretrain.engine_config import EngineConfig
from pretrain.optim import OptimizerConfig
from tests.support import ranks, tiny
from tests.support.collectives import traced

pytestmark = pytest.mark.distributed

WORLD, GLOBAL_BATCH = 2, 8
OBJECTIVES = {"generate": {}, "align": {}}
CASES = {
    "stage 3, kept": {"zero_stage": 3, "persist_parameters": 0},
    "stage 3, for each use": {"zero_stage": 3, "persist_parameters": 0, "live_parameters": 0},
    "stage 3, small ones whole": {"zero_stage": 3, "persist_parameters": 600},
    "stage 3, two micro-steps": {"zero_stage": 3, "persist_parameters": 0, "micro_batch": 2},
    "stage 2": {"zero_stage": 2},
    "stage 0": {"zero_stage": 0},
}


def config_of(case: str) -> EngineConfig:
    return EngineConfig(**{"micro_batch": 4, **CASES[case]})


def measure() -> dict[str, dict[str, float]]:
    """Runs on each rank: of each case the bytes that lie in its state, and that a step moves."""
    from pretrain import comm
    from pretrain.engine import Engine, init_distributed

    init_distributed()
    found = {}
    for case in CASES:
        config = config_of(case)
        task = tiny.task(OBJECTIVES, unet=tiny.ONE_LEVEL)
        sizes = {n: p.numel() for n, p in task.named_parameters()}
        engine = Engine(
            task, config, OptimizerConfig(lr=1e-3), GLOBAL_BATCH, EmaConfig(half_lives=(100,))
        )
        mine = GLOBAL_BATCH // WORLD

        def step(number: int, engine: Engine = engine, mine: int = mine) -> None:
            start = number * GLOBAL_BATCH + comm.rank() * mine
            engine.step(tiny.batch(mine, start), 1e-3)

        for number in range(3):  # ZeRO-3 records the order of modules in its first steps
            step(number)
        with traced() as calls:
            step(3)
        state = engine.partitions.tensors()
        moved: dict[str, float] = {}
        for name, shapes in calls:
            moved[name] = moved.get(name, 0) + 4 * payload(name, shapes)
        persist = config.persist_parameters
        found[case] = {
            "parameters": sum(sizes.values()),
            "persistent": sum(n for n in sizes.values() if n <= persist),
            "masters and moments": 4 * sum(t.numel() for kind in state.values() for t in kind),
            "averages": 4 * sum(t.numel() for c in engine.ema.copies.values() for t in c),
            "calls": len(calls),
            **{f"c10d {name}": nbytes for name, nbytes in moved.items()},
        }
    return found


def payload(name: str, shapes: str) -> int:
    """Elements of a collective's larger side: what is gathered, or reduced."""
    sides = [sum(map(math.prod, leaves(side))) for side in ast.literal_eval(shapes)]
    return max(sides, default=0)


def leaves(tree: object) -> list[list[int]]:
    if not isinstance(tree, list) or not tree:
        return []
    if all(isinstance(n, int) for n in tree):
        return [tree]
    return [shape for part in tree for shape in leaves(part)]


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    return ranks.run(f"{__name__}:measure", WORLD)[0]


@pytest.mark.parametrize("case", CASES)
def test_state_is_what_the_plan_says(measured: dict, case: str) -> None:
    found, config = measured[case], config_of(case)
    state = plan.state_bytes_per_rank(
        int(found["parameters"]), WORLD, "fp32", config.zero_stage, ema_copies=1
    )
    assert found["masters and moments"] == pytest.approx(
        # In stage 0 the masters are the weights.
        state.optimizer + (state.parameters if config.zero_stage == 0 else 0),
        rel=0.02,
    )
    assert found["averages"] == pytest.approx(state.ema, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_collectives_move_what_the_plan_says(measured: dict, case: str) -> None:
    found, config = measured[case], config_of(case)
    micro_steps = GLOBAL_BATCH // (WORLD * config.micro_batch)
    sizes = Sizes(int(found["parameters"]), 0, int(found["persistent"]), 1, 24)
    planned = by_name(step_collectives(sizes, config, WORLD, micro_steps))
    expected = sum(c.nbytes for c in planned.values())
    moved = sum(v for name, v in found.items() if name.startswith("c10d "))
    print(case, {k: v for k, v in found.items()}, {k: c.nbytes for k, c in planned.items()})
    assert moved == pytest.approx(expected, rel=0.05)
