"""The energy objective under ZeRO-3 on two ranks: every estimator, the double backward pass among
them, follows a plain loop."""

from typing import Any

import pytest
import torch

from tests.support import ranks, tiny

pytestmark = pytest.mark.distributed

STEPS, GLOBAL_BATCH, LR = 2, 4, 1e-3
SMALL = {"weight": 0.5, "dim": 8, "width": 16, "negatives": 3}
CASES: dict[str, dict[str, Any]] = {
    "finite": {"levels": 2},
    "captions": {"against": "captions"},
    "one step": {"estimator": "one_step"},
    "cd": {"estimator": "cd", "langevin_steps": 2, "energy_l2": 0.1},
}


def task(name: str) -> Any:
    return tiny.task({"align": {}, "dcd": SMALL | CASES[name]}, unet=tiny.ONE_LEVEL)


def train() -> dict[str, Any]:
    """Runs on each rank: each case, every weight partitioned."""
    from pretrain import comm
    from pretrain.engine import Engine, init_distributed
    from pretrain.engine_config import EngineConfig
    from pretrain.optim import OptimizerConfig

    init_distributed()
    mine = GLOBAL_BATCH // comm.world_size()
    found = {}
    for name in CASES:
        config = EngineConfig(
            micro_batch=mine,
            persist_parameters=0,
            live_parameters=0,
            activation_checkpointing=True,
        )
        engine = Engine(task(name), config, OptimizerConfig(lr=LR, eps=1e-5), GLOBAL_BATCH)
        losses = []
        for step in range(STEPS):
            batch = tiny.batch(mine, start=step * GLOBAL_BATCH + comm.rank() * mine)
            metrics = {k: float(v) for k, v in engine.step(batch, LR).metrics.items()}
            losses.append(comm.mean_over_ranks(metrics)["dcd/loss"])
        found[name] = {"losses": losses, "state": engine.gather()}
    return found


def plainly(name: str) -> dict[str, Any]:
    from pretrain.optim import OptimizerConfig, parameter_groups

    whole, config, losses = task(name), OptimizerConfig(lr=LR, eps=1e-5), []
    groups = parameter_groups(whole, config)
    for group in groups:
        group["lr"] = LR * group["rate_scale"]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    for step in range(STEPS):
        output = whole(tiny.batch(GLOBAL_BATCH, start=step * GLOBAL_BATCH))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        losses.append(float(output.metrics["dcd/loss"]))
    return {"losses": losses, "state": dict(whole.named_parameters())}


def test_two_ranks_follow_the_plain_loop():
    both = ranks.run(f"{__name__}:train", 2)
    for name in CASES:
        right = plainly(name)
        for found in both:
            loss = max(
                abs(a - b) for a, b in zip(found[name]["losses"], right["losses"], strict=True)
            )
            weight = max(
                (value - right["state"][key]).abs().max().item()
                for key, value in found[name]["state"].items()
            )
            print(f"measured, {name}: loss {loss:.2e}, weight {weight:.2e}")
            assert loss < 1e-4 * max(map(abs, right["losses"])) + 1e-5, name
            assert weight < 1e-4, name
        start = dict(task(name).named_parameters())
        moved = [
            (right["state"][key] - value).abs().max().item()
            for key, value in start.items()
            if key.startswith("objectives.dcd")
        ]
        assert moved and min(moved) > 1e-4, "the comparison above could not fail"
