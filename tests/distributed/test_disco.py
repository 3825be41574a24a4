"""Codes under ZeRO-3 on two ranks: the losses and weights of a plain loop over the whole batch,
with the entropy bonus, whose marginal is over the global batch."""

import pytest
import torch

from pretrain.engine import Engine
from pretrain.engine_config import EngineConfig
from pretrain.optim import OptimizerConfig, parameter_groups
from pretrain.task import PretrainTask
from tests.support import ranks, tiny

pytestmark = pytest.mark.distributed

STEPS, GLOBAL_BATCH, LR = 2, 8, 1e-3
OPTIMIZER = OptimizerConfig(lr=LR, eps=1e-5)
DISCO = {
    "codes": 2,
    "values": 4,
    "entropy_bonus": 0.5,
    "encoder": {"width": 16, "layers": 1, "head_dim": 16, "patch": 4},
    "tokens": {"width": 16, "layers": 1, "head_dim": 16},
}


def task() -> PretrainTask:
    return tiny.task({"generate": {}, "align": {}, "disco": DISCO}, unet=tiny.ONE_LEVEL)


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
    engine = Engine(task(), config, OPTIMIZER, GLOBAL_BATCH)
    losses = []
    for step in range(STEPS):
        batch = tiny.batch(mine, start=step * GLOBAL_BATCH + comm.rank() * mine)
        metrics = {k: float(v) for k, v in engine.step(batch, LR).metrics.items()}
        losses.append(comm.mean_over_ranks(metrics))
    return {"losses": losses, "state": engine.gather()}


def train_plainly() -> dict:
    """The same steps in a plain loop: no engine, no process group."""
    made, losses = task(), []
    optimizer = torch.optim.AdamW(
        parameter_groups(made, OPTIMIZER), lr=LR, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    for step in range(STEPS):
        output = made(tiny.batch(GLOBAL_BATCH, start=step * GLOBAL_BATCH))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), EngineConfig().clip_norm)
        optimizer.step()
        losses.append({k: float(v) for k, v in output.metrics.items()})
    return {"losses": losses, "state": {n: p.detach() for n, p in made.named_parameters()}}


def test_two_ranks_equal_a_plain_loop() -> None:
    plain, two = train_plainly(), ranks.run(f"{__name__}:train", 2, timeout=280)
    for mine in two:
        for a, b in zip(mine["losses"], plain["losses"], strict=True):
            for key in ("loss", "generate/loss", "align/loss", "disco/loss"):
                assert a[key] == pytest.approx(b[key], abs=1e-5), key
        moved = max((mine["state"][n] - p).abs().max().item() for n, p in plain["state"].items())
        assert moved < 1e-4
    encoder = "objectives.disco.encoder.logits.weight"
    start = dict(task().named_parameters())[encoder].detach()
    assert (plain["state"][encoder] - start).abs().max() > 1e-4, "the encoder learns nothing"
