"""One optimizer step under DeepSpeed ZeRO-3. The only file of the training path that imports
deepspeed."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from pretrain import comm, ops
from pretrain.config import Config
from pretrain.errors import ConfigError, NonFiniteError
from pretrain.types import Batch, StepOutput


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


class OptimizerConfig(Config):
    """AdamW and its learning rate over samples seen.

    Attributes:
        lr: peak learning rate.
        betas, eps, weight_decay: AdamW's; norms, biases and scalars are not decayed.
        warmup_samples: linear warm-up from 0.
        schedule: after warm-up, "cosine" to ``lr × final`` at the end of training, or "constant".
        final: the last learning rate as a share of the peak.
        rate_scales: factor of the learning rate of parameters by the beginning of their names, such
            as {model.trunk.unet: 0.1} (DiffDis trains the U-Net at a tenth of the new modules'
            rate).
    """

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_samples: int = Field(4000, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final: float = Field(0.02, ge=0, le=1)
    rate_scales: dict[str, PositiveFloat] = Field(default_factory=dict)

    def rate(self, samples: int, total_samples: int) -> float:
        """The learning rate of the step that starts after ``samples`` samples: a function of
        nothing else."""
        if samples < self.warmup_samples:
            return self.lr * (samples + 1) / (self.warmup_samples + 1)
        if self.schedule == "constant":
            return self.lr
        span = max(1, total_samples - self.warmup_samples)
        part = min(1.0, (samples - self.warmup_samples) / span)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * part)))


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by decay and by learning rate.

    Matrices are decayed; norms, biases and scalars are not. ``rate_scale`` of a group is the factor
    of the longest prefix in ``config.rate_scales`` that begins its parameters' names, else 1.

    Raises:
        ConfigError: a prefix begins no parameter's name.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    for prefix in config.rate_scales:
        if not any(name.startswith(prefix) for name, _ in named):
            tops = sorted({".".join(name.split(".")[:3]) for name, _ in named})
            raise ConfigError(
                f"optimizer.rate_scales names {prefix!r}, which begins no parameter; "
                f"there are: {', '.join(tops)}"
            )
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        fitting = [prefix for prefix in config.rate_scales if name.startswith(prefix)]
        scale = config.rate_scales[max(fitting, key=len)] if fitting else 1.0
        groups.setdefault((parameter.ndim > 1, scale), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "rate_scale": scale,
        }
        for (decayed, scale), parameters in groups.items()
    ]


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


def init_distributed() -> None:
    """Join the process group that the launcher's environment describes; one rank of its own without
    one."""
    ops.prepare()
    # torch's own new names; DeepSpeed calls the old ones at every gather.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning
    )
    import os

    import deepspeed

    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


class Engine:
    """A task under ZeRO. Every method but `config` is collective: all ranks call it, in the same
    order.

    Args:
        task: ``task(batch) -> StepOutput``; its parameters are partitioned in place.
        config, optimizer: settings.
        global_batch: samples of one optimizer step over all ranks.
    """

    def __init__(
        self, task: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, global_batch: int
    ) -> None:
        import deepspeed

        # DeepSpeed warns that it sees no tensor in our dataclasses, and sets no hook on the modules
        # that pass them. None of those owns a parameter: each parameter lies in a leaf module from
        # tensor to tensor (a test says so).
        import deepspeed.runtime.zero.utils as zero_utils

        zero_utils.warned = True
        self.config = config
        self.accumulation = accumulation(config, global_batch, comm.world_size())
        self.bad_steps = 0
        groups = parameter_groups(task, optimizer)
        self._rate_scales = [group["rate_scale"] for group in groups]
        adamw = torch.optim.AdamW(
            groups,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=task.to(comm.device()),
                optimizer=adamw,
                config=deepspeed_config(config, self.accumulation),
            )

    def step(self, batch: Batch, lr: float) -> StepOutput | None:
        """One optimizer step on this rank's part of a global batch.

        Returns:
            The loss and metrics, means over this rank's micro-batches; None when a rank's loss was
            not finite, and all ranks left the weights untouched.

        Raises:
            NonFiniteError: that happened ``bad_steps_limit`` times in a row.
        """
        for group, scale in zip(self._optimizer.param_groups, self._rate_scales, strict=True):
            group["lr"] = lr * scale
        self._engine.train()
        outputs = []
        for micro in batch.to(comm.device()).split(self.accumulation):
            output: StepOutput = self._engine(micro)
            if not comm.agree_all(bool(torch.isfinite(output.loss).item())):
                self._refuse(batch)
                return None
            self._engine.backward(output.loss)
            self._engine.step()
            outputs.append(output)
        self.bad_steps = 0
        names = outputs[0].metrics
        metrics = {n: torch.stack([o.metrics[n] for o in outputs]).mean() for n in names}
        return StepOutput(metrics["loss"], metrics)

    def gradient_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    def gather(self) -> dict[str, Tensor]:
        """Every parameter whole, fp32 masters, on the CPU of every rank, one parameter at a
        time."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        for name, parameter in self._engine.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            assert full is not None, name
            state[name] = full.detach().float().cpu().clone()
        return state

    def save(self, folder: str, tag: str) -> None:
        """Write each rank's part of weights, master weights and optimizer state under
        ``folder/tag``."""
        self._engine.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, folder: str, tag: str) -> None:
        """Restore what `save` wrote, on the same number of ranks."""
        path, _ = self._engine.load_checkpoint(folder, tag=tag)
        assert path is not None, f"DeepSpeed found nothing at {folder}/{tag}"

    @contextmanager
    def evaluating(self) -> Iterator[dict[str, Tensor]]:
        """The gathered weights, for a plain copy of the task on each rank: no collective runs
        inside.

        Ranks may then do unequal work without a hang; the price is one copy of the weights a rank.
        """
        state = self.gather()
        comm.barrier()
        yield state
        comm.barrier()

    def _refuse(self, batch: Batch) -> None:
        # The gradients of earlier micro-batches of this step are dropped with it.
        self._engine.optimizer.zero_grad()
        self.bad_steps += 1
        if self.bad_steps >= self.config.bad_steps_limit:
            first, last = int(batch.positions_B.min()), int(batch.positions_B.max())
            raise NonFiniteError(
                f"the loss was not finite in {self.bad_steps} steps in a row (this rank's last "
                "samples: "
                f"{first}–{last}); lower optimizer.lr, or raise engine.bad_steps_limit"
            )


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


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
