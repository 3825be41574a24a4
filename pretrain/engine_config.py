"""How a step is computed and its state is spread: the settings, and what DeepSpeed is told."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from pretrain.config import Config
from pretrain.errors import ConfigError


class EngineConfig(Config):
    """How a step is computed and its state is spread.

    Attributes:
        precision: type of weights and activations; the optimizer's master weights are fp32 in any
            case. fp16 scales its loss (below).
        zero_stage: 3 partitions parameters, gradients and optimizer state; 0 replicates all (for
            comparison).
        cut_for_one: keep ``zero_stage`` on one rank too, where there is nothing to spread and its
            hooks cost a third of a step; for comparison.
        micro_batch: samples of one rank in one forward pass.
        activation_checkpointing: recompute the inside of each block in the backward pass instead of
            keeping it.
        offload_optimizer: where masters, moments and moving averages live, and where the optimizer
            computes: "none" is the device, "cpu" the host's memory. (On NVMe they would not be
            there for moving averages and checkpoints to read.)
        offload_parameters: where the partitions of the weights live between their uses: "none",
            "cpu", or "nvme", files in ``nvme_path`` (which needs DeepSpeed's async_io op, and so
            libaio; never run by us).
        nvme_path: folder on a fast disk of each host, for "nvme".
        loss_scale_power: fp16's first loss scale, as a power of two; it halves when a gradient
            overflows.
        loss_scale_window: steps without an overflow after which it doubles.
        persist_parameters: parameters of at most this many elements are kept whole on every rank,
            not gathered. Where that is all of them, ZeRO-3's hooks at every module are taken off.
        live_parameters: gathered elements that may stay whole from one use to the next (under
            stage 3); what is used again within as many elements is not gathered twice. 0 gathers
            for each use; fewer also start faster, as DeepSpeed looks that far ahead at each module.
        bucket_elements: most elements in one reduction or prefetch.
        clip_norm: global gradient norm above which gradients are scaled down.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 3
    cut_for_one: bool = False
    micro_batch: int = Field(64, ge=1)
    activation_checkpointing: bool = False
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    loss_scale_power: int = Field(16, ge=0, le=32)
    loss_scale_window: int = Field(1000, ge=1)
    persist_parameters: int = Field(100_000, ge=0)
    live_parameters: int = Field(1_000_000_000, ge=0)
    bucket_elements: int = Field(50_000_000, ge=1)
    clip_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> "EngineConfig":
        optimizer, parameters = self.offload_optimizer, self.offload_parameters
        if parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters={parameters!r} needs zero_stage=3, it is {self.zero_stage}: "
                "only partitions can be put aside; set zero_stage: 3, or offload_parameters: none"
            )
        if optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer={optimizer!r} needs zero_stage 1, 2 or 3, it is 0; set "
                "zero_stage: 3, or offload_optimizer: none"
            )
        if parameters == "nvme" and not self.nvme_path:
            raise ValueError(
                "nvme_path is not given, and offload_parameters is 'nvme'; name a folder on each "
                "host's own disk, or offload to cpu"
            )
        if self.nvme_path and parameters != "nvme":
            raise ValueError(
                f"nvme_path={self.nvme_path!r}, and offload_parameters={parameters!r}; set "
                "offload_parameters: nvme, or remove nvme_path"
            )
        return self

    def keeps_whole(self, largest: int) -> bool:
        """Whether stage 3 keeps every parameter whole from one step to the next, the ``largest``
        having so many elements: gradients and the optimizer's state alone are then cut."""
        cuts = self.zero_stage == 3 and self.offload_parameters == "none"
        return cuts and largest <= self.persist_parameters

    def for_ranks(self, world: int) -> "EngineConfig":
        """The settings that ``world`` ranks run with: stage 0 on one, unless its state is in half
        precision or offloaded, or ``cut_for_one``."""
        offloads = self.offload_optimizer != "none" or self.offload_parameters != "none"
        if world > 1 or self.cut_for_one or offloads or self.precision != "fp32":
            return self
        return self.model_copy(update={"zero_stage": 0})


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


def deepspeed_config(
    config: EngineConfig, accumulation_steps: int, whole: bool = False
) -> Mapping[str, Any]:
    """DeepSpeed's own configuration for ``config``; ``whole`` as `EngineConfig.keeps_whole` says of
    the task."""
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
            "stage3_max_live_parameters": config.live_parameters,
            "stage3_max_reuse_distance": config.live_parameters,
            # A linear layer that finds its weight again after it was let go of, at the price of an
            # autograd function in Python.
            "memory_efficient_linear": not whole,
        }
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = _offload(config.offload_optimizer, config.nvme_path)
    if config.offload_parameters != "none":
        zero["offload_param"] = _offload(config.offload_parameters, config.nvme_path)
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {
            "enabled": config.precision == "fp16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": config.loss_scale_power,
            "loss_scale_window": config.loss_scale_window,
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _offload(place: str, nvme_path: str | None) -> dict[str, Any]:
    # Pages are pinned for copies to a GPU; without one there is nothing to pin them for.
    pinned = {"device": place, "pin_memory": torch.cuda.is_available()}
    return pinned | ({"nvme_path": nvme_path} if place == "nvme" else {})
