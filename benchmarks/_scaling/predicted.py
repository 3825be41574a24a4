"""The plan of the presets over ranks: memory, time and traffic, predicted."""

import copy
from dataclasses import dataclass
from functools import lru_cache

from pretrain import config, forecast, hardware, plan
from pretrain.forecast import Forecast, Workload
from pretrain.run_config import RunConfig

PRESETS = ("base-256", "sd15-512", "xl-512")
STAGES = {"ZeRO-3": 3, "ZeRO-1": 1}
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
def workload(preset: str) -> Workload:
    """Traced once: passes and activations are the same in each stage, at each batch."""
    settings = config.load(RunConfig, f"configs/{preset}.yaml")
    return Workload(settings, plan.vocab_size(settings))


def points(ranks: tuple[int, ...]) -> list[Point]:
    """Each preset over ranks at its own batch; where that is too small for them, at one micro-batch
    a rank."""
    gpu, found = hardware.accelerator(GPU), []
    for preset in PRESETS:
        traced = workload(preset)
        engine, training = traced.config.engine, traced.config.training
        for name, stage in STAGES.items():
            for n in ranks:
                batch = max(training.global_batch, engine.micro_batch * n)
                work = copy.copy(traced)
                work.config = traced.config.model_copy(
                    update={
                        "training": training.model_copy(update={"global_batch": batch}),
                        "engine": engine.model_copy(update={"zero_stage": stage}),
                    }
                )
                nodes = max(1, n // PER_NODE)
                one = forecast.forecast(work, gpu, nodes, n // nodes)
                found.append(Point(preset, name, n, batch, one))
    return found
