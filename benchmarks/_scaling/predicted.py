"""The plan of the presets over ranks: memory, time and traffic, predicted."""

import copy
from dataclasses import dataclass
from functools import lru_cache

from pretrain import config, forecast, hardware, plan
from pretrain.errors import ConfigError
from pretrain.forecast import Forecast, Workload
from pretrain.run_config import RunConfig

PRESETS = ("base-256", "sd15-512", "xl-512")
STAGES = {"ZeRO-3": (), "ZeRO-1": ("engine.zero_stage=1",)}
GPU, PER_NODE = "h100", 8


@dataclass(frozen=True)
class Point:
    """A preset on so many ranks."""

    preset: str
    stage: str
    ranks: int
    batch: int
    found: Forecast


@lru_cache
def workload(preset: str, stage: str) -> Workload:
    """Traced once; the global batch is set by the point."""
    settings = config.load(RunConfig, f"configs/{preset}.yaml", list(STAGES[stage]))
    return Workload(settings, plan.vocab_size(settings))


def points(ranks: tuple[int, ...]) -> list[Point]:
    """Each preset over ranks at its own batch; where that is too small for them, at one micro-batch
    a rank."""
    gpu, found = hardware.accelerator(GPU), []
    for preset in PRESETS:
        for stage in STAGES:
            traced = workload(preset, stage)
            _ = traced.ops, traced.activations, traced.sizes  # kept by its copies
            own = traced.config.training.global_batch
            for n in ranks:
                batch = max(own, traced.config.engine.micro_batch * n)
                training = traced.config.training.model_copy(update={"global_batch": batch})
                work = copy.copy(traced)
                work.config = traced.config.model_copy(update={"training": training})
                nodes = max(1, n // PER_NODE)
                try:
                    one = forecast.forecast(work, gpu, nodes, n // nodes)
                except ConfigError:
                    continue
                found.append(Point(preset, stage, n, batch, one))
    return found
