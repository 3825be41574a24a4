"""Codes under ZeRO-3 on two ranks: the losses and weights of one rank, with the entropy bonus,
whose marginal is over the global batch."""

import pytest

from pretrain.engine import Engine
from pretrain.engine_config import EngineConfig
from pretrain.optim import OptimizerConfig
from tests.support import ranks, tiny

pytestmark = pytest.mark.distributed

STEPS, GLOBAL_BATCH, LR = 2, 8, 1e-3
DISCO = {
    "codes": 2,
    "values": 4,
    "entropy_bonus": 0.5,
    "encoder": {"width": 16, "layers": 1, "head_dim": 16, "patch": 4},
    "tokens": {"width": 16, "layers": 1, "head_dim": 16},
}


def train() -> dict:
    """Runs on each rank; losses (mean over ranks) and gathered weights."""
    from pretrain import comm
    from pretrain.engine import init_distributed

    init_distributed()
    mine = GLOBAL_BATCH // comm.world_size()
    config = EngineConfig(
        zero_stage=3,
        precision="fp32",
        micro_batch=mine,
        persist_parameters=0,
        activation_checkpointing=True,
    )
    task = tiny.task({"generate": {}, "align": {}, "disco": DISCO}, unet=tiny.ONE_LEVEL)
    engine = Engine(task, config, OptimizerConfig(lr=LR, eps=1e-5), GLOBAL_BATCH)
    losses = []
    for step in range(STEPS):
        batch = tiny.batch(mine, start=step * GLOBAL_BATCH + comm.rank() * mine)
        metrics = {k: float(v) for k, v in engine.step(batch, LR).metrics.items()}
        losses.append(comm.mean_over_ranks(metrics))
    return {"losses": losses, "state": engine.gather()}


def test_two_ranks_equal_one() -> None:
    (one,), two = ranks.run(f"{__name__}:train", 1), ranks.run(f"{__name__}:train", 2)
    for mine in two:
        for a, b in zip(mine["losses"], one["losses"], strict=True):
            for key in ("loss", "generate/loss", "align/loss", "disco/loss"):
                assert a[key] == pytest.approx(b[key], abs=1e-5), key
        moved = max((mine["state"][n] - p).abs().max().item() for n, p in one["state"].items())
        assert moved < 1e-4
    start = dict(
        tiny.task({"generate": {}, "disco": DISCO}, unet=tiny.ONE_LEVEL).named_parameters()
    )
    encoder = "objectives.disco.encoder.logits.weight"
    assert (one["state"][encoder] - start[encoder].detach()).abs().max() > 1e-4, "it learns nothing"
