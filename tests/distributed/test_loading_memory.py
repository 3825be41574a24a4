"""How much of a large model a rank holds while it takes its part of the weights from files."""

import ctypes
import json
from pathlib import Path

import pytest

from tests.support import ranks, stable_diffusion

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

CHANNELS = (192, 384, 768, 768)
LEAST = 300_000_000
SHARE = 0.6  # of the bytes of the whole model, on 2 ranks


def peak_mib() -> float:
    """Most memory that this process has had resident since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def load_here(folder: str, streaming: bool) -> dict[str, float]:
    """On each rank: make the task and fill it; MiB above what the process had before."""
    from pretrain.config import build
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.engine import init_distributed
    from pretrain.engine_config import EngineConfig
    from pretrain.inference import new_model
    from pretrain.model.diffdis import ModelConfig
    from pretrain.pretrained import Pretrained
    from pretrain.streaming import fill
    from pretrain.task import PretrainTask, TaskConfig, check_objectives

    tree = stable_diffusion.settings(Path(folder))
    config = build(ModelConfig, tree["model"])
    tokenizer = Tokenizer(tree["data"]["tokenizer"])
    init_distributed()
    pretrained = Pretrained(config)
    warm = new_model(build(ModelConfig, {}), tokenizer)  # what imports and first calls take
    del warm
    # What was freed and is still resident would be used again, and not counted.
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    before = peak_mib()
    model = new_model(config, tokenizer, storage=not streaming)
    objectives = check_objectives({"generate": {}, "align": {}})
    task = PretrainTask(model, objectives, TaskConfig(), 0)
    # (Without streaming the model is made whole, and `fill` has nothing left to do but to cut.)
    fill(task, pretrained, EngineConfig(zero_stage=3, persist_parameters=0), 0)
    peak = peak_mib() - before
    numbers = [int(getattr(p, "ds_numel", p.numel())) for p in task.parameters()]
    held = [p.ds_tensor.numel() for p in task.parameters() if hasattr(p, "ds_tensor")]
    return {"peak": peak, "whole": 4 * sum(numbers) / 2**20, "held": 4 * sum(held) / 2**20}


@pytest.mark.soak  # 1.3 GB of weights are written, and read by 2 processes
def test_no_rank_holds_the_whole_model(tmp_path):
    folder = stable_diffusion.make(tmp_path / "sd", shard="200MB", channels=CHANNELS)
    for streaming in (True, False):
        found = ranks.run(f"{__name__}:load_here", 2, str(folder), streaming, timeout=900)
        shares = [rank["peak"] / rank["whole"] for rank in found]
        print(json.dumps({"streaming": streaming, "shares": shares, "ranks": found}))
        assert found[0]["whole"] * 2**20 / 4 >= LEAST
        if streaming:
            assert max(shares) <= SHARE
        else:
            assert min(shares) > 0.9, "the measurement does not see a model that is whole"
