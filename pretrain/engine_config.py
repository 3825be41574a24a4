"""How a step is computed and its state is spread: the settings, and what DeepSpeed is told."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from pretrain.config import Config
from pretrain.errors import ConfigError


class EngineConfig(Config):
    """How a step is computed and its state is spread.

    Attributes:
        precision: type of weights and activations; the optimizer's master weights are fp32 in any
            case.
        zero_stage: 3 partitions parameters, gradients and optimizer state; 0 replicates all (for
            comparison).
        micro_batch: samples of one rank in one forward pass.
        persist_parameters: parameters of at most this many elements are kept whole on every rank,
            not gathered.
        bucket_elements: most elements in one reduction or prefetch.
        clip_norm: global gradient norm above which gradients are scaled down.
        bad_steps_limit: non-finite losses in a row after which the run stops.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 3
    micro_batch: int = Field(64, ge=1)
    persist_parameters: int = Field(100_000, ge=0)
    bucket_elements: int = Field(50_000_000, ge=1)
    clip_norm: float = Field(1.0, gt=0)
    bad_steps_limit: int = Field(10, ge=1)


def accumulation(config: EngineConfig, global_batch: int, world: int) -> int:
    """Micro-steps of one optimizer step.

    Raises:
        ConfigError: micro_batch × ranks does not divide the global batch.
    """
    per_pass = config.micro_batch * world
    if global_batch % per_pass:
        fits = [m for m in range(1, global_batch // world + 1) if global_batch % (m * world) == 0]
        remedy = (
            f"try {', '.join(map(str, fits[-3:]))}"
            if fits
            else f"use a global_batch that {world} divides"
        )
        raise ConfigError(
            f"engine.micro_batch={config.micro_batch} on {world} ranks does not divide "
            f"training.global_batch={global_batch}; {remedy}"
        )
    return global_batch // per_pass


def deepspeed_config(config: EngineConfig, accumulation_steps: int) -> Mapping[str, Any]:
    """DeepSpeed's own configuration for ``config``."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        zero |= {
            "reduce_bucket_size": config.bucket_elements,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
        }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": config.persist_parameters,
            "stage3_prefetch_bucket_size": config.bucket_elements,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        }
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
