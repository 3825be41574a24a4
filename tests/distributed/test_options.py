"""Options of the engine and the optimizer under real DeepSpeed: each trains, and follows the plain
fp32 run as closely as its arithmetic allows.

One start of the processes runs all cases of a number of ranks, one engine after the other.
"""

from typing import Any

import pytest
import torch

from pretrain.engine import Engine
from pretrain.engine_config import EngineConfig
from pretrain.optim import OptimizerConfig, freeze
from pretrain.plan import state_bytes_per_rank
from tests.support import ranks, tiny

pytestmark = pytest.mark.distributed

STEPS, GLOBAL_BATCH, LR = 3, 8, 1e-3
OBJECTIVES = {"generate": {}, "align": {}}

PLAIN: dict[str, Any] = {}
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "checkpointing": {"activation_checkpointing": True},
    "checkpointing, all gathered": {"activation_checkpointing": True, "persist_parameters": 0},
    "optimizer on cpu": {"offload_optimizer": "cpu"},
    "all on cpu": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "parameters on cpu": {"offload_parameters": "cpu"},
    "bf16": {"precision": "bf16"},
    "bf16 checkpointing on cpu": {
        "precision": "bf16",
        "activation_checkpointing": True,
        "offload_optimizer": "cpu",
    },
    "fp16": {"precision": "fp16", "loss_scale_power": 8},
    "fp16 overflow": {"precision": "fp16", "loss_scale_power": 32},
    "not fused": {"fused": False},
    "frozen": {"freeze": ["model.trunk.unet", "model.text_encoder.blocks"]},
    "frozen checkpointing": {
        "freeze": ["model.trunk.unet", "model.text_encoder.blocks"],
        "activation_checkpointing": True,
    },
    "stage 2 checkpointing": {"zero_stage": 2, "activation_checkpointing": True},
    "stage 2 on cpu": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "stage 0 checkpointing": {"zero_stage": 0, "activation_checkpointing": True},
}
ALONE = ["plain", "checkpointing", "all on cpu", "bf16", "frozen checkpointing"]


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
            fused=options.pop("fused", None),
        )
        mine = GLOBAL_BATCH // comm.world_size()
        config = EngineConfig(micro_batch=mine, **{"persist_parameters": 1000} | options)
        engine = Engine(tiny.task(OBJECTIVES), config, optimizer, GLOBAL_BATCH)
        losses, norms = [], []
        for step in range(STEPS):
            batch = tiny.batch(mine, start=step * GLOBAL_BATCH + comm.rank() * mine)
            output = engine.step(batch, LR)
            losses.append(
                None
                if output is None
                else comm.mean_over_ranks({"loss": float(output.loss)})["loss"]
            )
            norms.append(engine.gradient_norm())
        state = engine.gather()
        results[name] = {"losses": losses, "norms": norms, "state": state, "bytes": held(engine)}
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
    return ranks.run(f"{__name__}:train", 2, list(CASES))


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return ranks.run(f"{__name__}:train", 1, ALONE)[0]


def apart(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of a loss, and of a weight."""
    loss = max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))
    assert a["state"].keys() == b["state"].keys()
    return loss, max((a["state"][n] - b["state"][n]).abs().max().item() for n in a["state"])


@pytest.mark.parametrize("name", ["checkpointing", "checkpointing, all gathered"])
def test_checkpointing_changes_no_number(two_ranks, name):
    for mine in two_ranks:
        # Sums over the units that one tensor feeds are taken in another order.
        assert mine[name]["losses"][0] == mine["plain"]["losses"][0]
        assert mine[name]["norms"] == pytest.approx(mine["plain"]["norms"], rel=1e-5)
        loss, weight = apart(mine[name], mine["plain"])
        print(f"measured: loss {loss:.2e}, weight {weight:.2e}")
        assert loss < 1e-6 and weight < 1e-5


EXACT = ["optimizer on cpu", "all on cpu", "parameters on cpu", "not fused"]
EXACT += ["stage 2 checkpointing", "stage 2 on cpu", "stage 0 checkpointing"]


@pytest.mark.parametrize("name", EXACT)
def test_fp32_options_follow_the_plain_run_to_rounding(two_ranks, name):
    for mine in two_ranks:
        loss, weight = apart(mine[name], mine["plain"])
        print(f"measured: loss {loss:.2e}, weight {weight:.2e}")
        assert loss < 1e-5 and weight < 1e-4


@pytest.mark.parametrize("name", ["bf16", "bf16 checkpointing on cpu", "fp16"])
def test_half_precision_follows_fp32(two_ranks, name):
    for mine in two_ranks:
        loss, _ = apart(mine[name], mine["plain"])
        print(f"measured: loss {loss:.2e}")
        assert 0 < loss < 0.05


def test_checkpointing_changes_no_number_of_bf16_on_cpu(two_ranks):
    for mine in two_ranks:
        assert apart(mine["bf16 checkpointing on cpu"], mine["bf16"])[0] < 1e-3


def test_frozen_parameters_stay_and_the_others_move(two_ranks):
    start = dict(tiny.task(OBJECTIVES).named_parameters())
    for name in ("frozen", "frozen checkpointing"):
        state = two_ranks[1][name]["state"]
        assert state.keys() == start.keys()
        for parameter, value in state.items():
            moved = not torch.equal(value, start[parameter].detach())
            assert moved != parameter.startswith(("model.trunk.unet", "model.text_encoder.blocks"))
    loss, weight = apart(two_ranks[0]["frozen"], two_ranks[0]["frozen checkpointing"])
    assert loss < 1e-6 and weight < 1e-5


def test_one_rank_follows_two(one_rank, two_ranks):
    for name in ALONE:
        loss, weight = apart(one_rank[name], two_ranks[0][name])
        print(f"measured: {name}: loss {loss:.2e}, weight {weight:.2e}")
        assert loss < (0.05 if "bf16" in name else 1e-5)


@pytest.mark.parametrize("name", ["plain", "bf16", "frozen", "checkpointing, all gathered"])
def test_the_plan_tells_the_state_of_a_rank(two_ranks, one_rank, name):
    """Within a tenth, as the issue asks; on both numbers of ranks."""
    config = CASES[name]
    task = tiny.task(OBJECTIVES)
    freeze(task, config.get("freeze", ()))
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in task.parameters())
    small = config.get("persist_parameters", 1000)
    for world, result in ((2, two_ranks[0]), (1, one_rank)):
        if name not in result:
            continue
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
    start = {n: p.detach() for n, p in tiny.task(OBJECTIVES).named_parameters()}
    plain = two_ranks[0]["plain"]["state"]
    assert max((plain[n] - start[n]).abs().max().item() for n in start) > 1e-3
