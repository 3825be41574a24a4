"""Options of the engine and the optimizer under real DeepSpeed: each trains, and follows the plain
fp32 run as closely as its arithmetic allows.

One start of the processes runs all cases of a number of ranks, one engine after the other.
"""

from typing import Any

import pytest
import torch

from pretrain.engine import Engine
from pretrain.engine_config import EngineConfig
from pretrain.guard import SCALE, Refusal
from pretrain.optim import OptimizerConfig, freeze
from pretrain.plan import state_bytes_per_rank
from tests.support import ranks, tiny

pytestmark = pytest.mark.distributed

STEPS, GLOBAL_BATCH, LR = 3, 8, 1e-3
OBJECTIVES = {"generate": {}, "align": {}}

FROZEN = ["model.trunk.unet", "model.text_encoder"]
SMALL = 2000  # kept whole where a case does not say otherwise
SETTINGS = {"persist_parameters": SMALL, "live_parameters": 0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"live_parameters": 1_000_000_000},  # the others gather for each use
    "checkpointing": {"activation_checkpointing": True, "persist_parameters": 0},
    "all on cpu": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "bf16": {
        "precision": "bf16",
        "activation_checkpointing": True,
        "offload_optimizer": "cpu",
        "persist_parameters": 0,
    },
    "fp16": {"precision": "fp16", "loss_scale_power": 8},
    "fp16 overflow": {"precision": "fp16", "loss_scale_power": 32},
    "frozen": {"freeze": FROZEN},
    "frozen checkpointing": {"freeze": FROZEN, "activation_checkpointing": True},
    "whole": {"persist_parameters": 10**9},
    "whole frozen": {"persist_parameters": 10**9, "freeze": FROZEN},
    "whole overflow": {"persist_parameters": 10**9, "precision": "fp16", "loss_scale_power": 32},
    "stage 2": {"zero_stage": 2, "activation_checkpointing": True, "offload_optimizer": "cpu"},
    "stage 0": {"zero_stage": 0, "activation_checkpointing": True},
    "not fused": {"zero_stage": 0, "fused": False},
}
WHOLE = ["whole", "whole frozen", "whole overflow"]
TWO = ["plain", "all on cpu", "bf16", "frozen checkpointing", *WHOLE]
MORE = ["checkpointing", "stage 2", "stage 0"]  # and ONE: soak runs
ONE = ["plain", "checkpointing", "fp16", "fp16 overflow", "frozen", "not fused"]


def train(names: list[str]) -> dict[str, Any]:
    """Runs on each rank: three steps of each case."""
    from pretrain import comm
    from pretrain.engine import init_distributed

    init_distributed()
    results = {}
    for name in names:
        options = dict(CASES[name])
        optimizer = OptimizerConfig(
            lr=LR,
            eps=1e-5,  # see test_engine.py
            freeze=tuple(options.pop("freeze", ())),
            fused=options.pop("fused", True),
        )
        mine = GLOBAL_BATCH // comm.world_size()
        config = EngineConfig(micro_batch=mine, **SETTINGS | options)
        engine = Engine(tiny.task(OBJECTIVES, unet=tiny.ONE_LEVEL), config, optimizer, GLOBAL_BATCH)
        losses, norms = [], []
        for step in range(STEPS):
            batch = tiny.batch(mine, start=step * GLOBAL_BATCH + comm.rank() * mine)
            output = engine.step(batch, LR)
            refused = isinstance(output, Refusal)
            losses.append(
                output.why
                if refused
                else comm.mean_over_ranks({"loss": float(output.loss)})["loss"]
            )
            norms.append(engine.gradient_norm())
            if name in WHOLE:
                engine.gather()  # as an evaluation between steps; it cuts frozen parameters
        hooks = sum(len(m._forward_pre_hooks) for m in engine._engine.module.modules())
        kept = held(engine)
        results[name] = {
            "losses": losses,
            "norms": norms,
            "bytes": kept,
            "hooks": hooks,
            "state": engine.gather(),  # which lets frozen parameters go
        }
    return results


def held(engine: Engine) -> dict[str, int]:
    """Bytes of the storages that a ZeRO-3 engine keeps between steps, by what they are for."""
    optimizer = engine._optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return {}
    parameters = list(engine._engine.module.parameters())
    weights = [p.data for p in parameters] + [p.ds_tensor.data for p in parameters]
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    seen: set[int] = set()
    return {
        "parameters": storages(weights, seen),
        "gradients": storages([optimizer.grad_partitions_flat_buffer], seen),
        "optimizer": storages([*optimizer.fp32_partitioned_groups_flat, *moments], seen),
    }


def storages(tensors: list[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages of ``tensors`` that are not in ``seen``; they are added to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return ranks.run(f"{__name__}:train", 2, TWO, timeout=300)


@pytest.fixture(scope="module")
def more(two_ranks) -> list[dict[str, Any]]:
    """Of two ranks, every case."""
    others = ranks.run(f"{__name__}:train", 2, MORE, timeout=300)
    return [few | other for few, other in zip(two_ranks, others, strict=True)]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return ranks.run(f"{__name__}:train", 1, ONE, timeout=300)[0]


def apart(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of a loss, and of a weight."""
    loss = max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))
    assert a["state"].keys() == b["state"].keys()
    return loss, max((a["state"][n] - b["state"][n]).abs().max().item() for n in a["state"])


@pytest.mark.soak
def test_checkpointing_changes_no_number(more, one_rank):
    for mine in (*more, one_rank):
        # Only sums over the units that one tensor feeds are taken in another order.
        assert mine["checkpointing"]["losses"][0] == mine["plain"]["losses"][0]
        assert mine["checkpointing"]["norms"] == pytest.approx(mine["plain"]["norms"], rel=1e-5)
        loss, weight = apart(mine["checkpointing"], mine["plain"])
        print(f"measured: loss {loss:.2e}, weight {weight:.2e}")
        assert loss < 1e-6 and weight < 1e-5


@pytest.mark.parametrize(
    "name", ["all on cpu", *(pytest.param(n, marks=pytest.mark.soak) for n in MORE[1:])]
)
def test_fp32_options_follow_the_plain_run_to_rounding(request, two_ranks, name):
    for mine in two_ranks if name in TWO else request.getfixturevalue("more"):
        loss, weight = apart(mine[name], mine["plain"])
        print(f"measured: loss {loss:.2e}, weight {weight:.2e}")
        assert loss < 1e-5 and weight < 1e-4


def test_what_is_all_kept_whole_has_no_hooks_and_the_same_numbers(two_ranks):
    for mine in two_ranks:
        assert mine["plain"]["hooks"] > 50
        assert all(mine[name]["hooks"] <= 1 for name in WHOLE)  # one of the root
        for whole, plain in (("whole", "plain"), ("whole frozen", "frozen checkpointing")):
            loss, weight = apart(mine[whole], mine[plain])
            print(f"measured: loss {loss:.2e}, weight {weight:.2e}")
            assert loss < 1e-6 and weight < 1e-5
        assert mine["whole overflow"]["losses"] == [SCALE] * STEPS
    only_frozen_stay(two_ranks[0]["whole frozen"])


@pytest.mark.soak
def test_fused_adamw_follows_the_other(one_rank):
    loss, weight = apart(one_rank["not fused"], one_rank["plain"])
    print(f"measured: loss {loss:.2e}, weight {weight:.2e}")
    assert loss < 1e-5 and weight < 1e-4


def test_bf16_follows_fp32(two_ranks):
    """It has 8 bits of mantissa: measured 0.013."""
    loss, _ = apart(two_ranks[0]["bf16"], two_ranks[0]["plain"])
    print(f"measured: loss {loss:.2e}")
    assert 0 < loss < 0.05


@pytest.mark.soak
def test_fp16_follows_fp32(one_rank):
    """It has 11 bits of mantissa: measured 0.001."""
    loss, _ = apart(one_rank["fp16"], one_rank["plain"])
    print(f"measured: loss {loss:.2e}")
    assert 0 < loss < 0.005


@pytest.mark.soak
def test_an_overflow_of_fp16_lowers_the_scale_and_touches_nothing(one_rank):
    start = dict(tiny.task(OBJECTIVES, unet=tiny.ONE_LEVEL).named_parameters())
    assert one_rank["fp16 overflow"]["losses"] == [SCALE] * STEPS
    for name, value in one_rank["fp16 overflow"]["state"].items():
        # The masters come from the weights in fp16.
        assert torch.equal(value, start[name].detach().half().float())


def test_frozen_parameters_stay_and_the_others_move(two_ranks):
    only_frozen_stay(two_ranks[1]["frozen checkpointing"])


@pytest.mark.soak
def test_frozen_parameters_of_one_rank(one_rank, two_ranks):
    only_frozen_stay(one_rank["frozen"])
    loss, weight = apart(one_rank["frozen"], two_ranks[1]["frozen checkpointing"])
    print(f"measured: loss {loss:.2e}, weight {weight:.2e}")
    assert loss < 1e-5 and weight < 1e-4


def only_frozen_stay(result: dict[str, Any]) -> None:
    start = dict(tiny.task(OBJECTIVES, unet=tiny.ONE_LEVEL).named_parameters())
    assert result["state"].keys() == start.keys()
    for name, value in result["state"].items():
        moved = not torch.equal(value, start[name].detach())
        assert moved != name.startswith(tuple(FROZEN)), name


@pytest.mark.soak
def test_one_rank_follows_two(one_rank, two_ranks):
    loss, weight = apart(one_rank["plain"], two_ranks[0]["plain"])
    print(f"measured: loss {loss:.2e}, weight {weight:.2e}")
    assert loss < 1e-5 and weight < 1e-4


@pytest.mark.parametrize("name", ["plain", "bf16", "frozen checkpointing", "whole"])
def test_the_plan_tells_the_state_of_a_rank_of_two(two_ranks, name):
    the_plan_tells_the_state(2, name, two_ranks[0])


@pytest.mark.soak
@pytest.mark.parametrize("name", ["plain", "frozen"])
def test_the_plan_tells_the_state_of_a_single_rank(one_rank, name):
    the_plan_tells_the_state(1, name, one_rank)


def the_plan_tells_the_state(world: int, name: str, result: dict[str, Any]) -> None:
    """Within a tenth, as the issue asks."""
    config = CASES[name]
    task = tiny.task(OBJECTIVES, unet=tiny.ONE_LEVEL)
    freeze(task, config.get("freeze", ()))
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in task.parameters())
    small = config.get("persist_parameters", SMALL)
    planned = state_bytes_per_rank(
        trained,
        world,
        config.get("precision", "fp32"),
        3,
        frozen=whole - trained,
        persistent=sum(p.numel() for p in task.parameters() if p.numel() <= small),
    )
    real = result[name]["bytes"]
    print(f"{name}, {world} ranks: planned {planned}, measured {real}")
    for kind, value in real.items():
        assert value == pytest.approx(getattr(planned, kind), rel=0.1), kind


def test_the_tolerance_can_tell_a_wrong_step(two_ranks):
    start = {
        n: p.detach() for n, p in tiny.task(OBJECTIVES, unet=tiny.ONE_LEVEL).named_parameters()
    }
    plain = two_ranks[0]["plain"]["state"]
    assert max((plain[n] - start[n]).abs().max().item() for n in start) > 1e-3
