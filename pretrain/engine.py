"""One optimizer step under DeepSpeed ZeRO-3. The only file of the training path that imports
deepspeed."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import comm, ops
from pretrain.ema import Ema, EmaConfig
from pretrain.engine_config import EngineConfig, accumulation, deepspeed_config
from pretrain.errors import CheckpointError
from pretrain.guard import GRADIENT, SCALE, Guard, GuardConfig, Refusal
from pretrain.model.recompute import set_recompute
from pretrain.optim import OptimizerConfig, build_optimizer, freeze
from pretrain.partitions import Copy, Partitions
from pretrain.parts import Parts
from pretrain.pretrained import Pretrained
from pretrain.profiling import phase
from pretrain.streaming import fill
from pretrain.types import Batch, StepOutput


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
    """A task under ZeRO, with moving averages of its weights. Every method is collective but those
    that say otherwise: all ranks call it, in the same order.

    Args:
        task: ``task(batch) -> StepOutput``; its parameters are partitioned in place.
        config, optimizer, ema: settings.
        global_batch: samples of one optimizer step over all ranks.
        guard: judges each micro-batch's loss; without one, whether it is finite.
        pretrained: weights that parts of ``task``, made `streaming.without_storage`, start from.
        seed: of the other parts that were made so.
    """

    def __init__(
        self,
        task: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        global_batch: int,
        ema: EmaConfig = EmaConfig(),  # noqa: B008 (frozen)
        guard: Guard | None = None,
        pretrained: Pretrained | None = None,
        seed: int = 0,
    ) -> None:
        import deepspeed

        # DeepSpeed warns that it sees no tensor in our dataclasses, and sets no hook on the modules
        # that pass them. None of those owns a parameter: each parameter lies in a leaf module from
        # tensor to tensor (a test says so).
        import deepspeed.runtime.zero.utils as zero_utils

        zero_utils.warned = True
        self.config = config
        self.global_batch = global_batch
        self.accumulation = accumulation(config, global_batch, comm.world_size())
        self.guard = guard or Guard(GuardConfig(spike_z=None))
        set_recompute(task, config.activation_checkpointing)
        freeze(task, optimizer.freeze)
        if pretrained:
            fill(task, pretrained, config, seed)
        adamw = build_optimizer(task, optimizer)
        self._rate_scales = [group["rate_scale"] for group in adamw.param_groups]
        largest = max(int(getattr(p, "ds_numel", p.numel())) for p in task.parameters())
        self._whole = config.keeps_whole(largest)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=task.to(comm.device()),
                optimizer=adamw,
                config=deepspeed_config(config, self.accumulation, self._whole),
            )
        if self._whole:
            # Nothing is left for the hooks to gather or to let go of, and before and behind each
            # module they took a quarter of a small network's step. (Gathered after each step, too:
            # by `_make_whole` in one collective, where DeepSpeed would take one a parameter.)
            self._optimizer.parameter_offload.destroy()
            self._optimizer.persistent_parameters = []
            self._make_whole()
        self._norm: float | None = None
        self._engine.clip_fp32_gradients = self._clip  # which stage 0 calls
        self.partitions = Partitions(
            self._engine.module, self._optimizer, comm.rank(), comm.world_size()
        )
        if pretrained and config.precision != "fp32":
            # The masters were made from weights of half precision; the files may know better.
            self.partitions.refine(pretrained.has, pretrained.read)
            pretrained.close()
        self.ema = Ema(self.partitions.flats, ema)

    def step(self, batch: Batch, lr: float, samples: int = 0) -> StepOutput | Refusal:
        """One optimizer step on this rank's part of a global batch.

        Args:
            lr: learning rate.
            samples: seen before it, for the moving averages.

        Returns:
            The loss and metrics, means over this rank's micro-batches; or why all ranks left the
            weights untouched.
        """
        for group, scale in zip(self._optimizer.param_groups, self._rate_scales, strict=True):
            group["lr"] = lr * scale
        self._engine.train()
        outputs = []
        losses = []
        for done, micro in enumerate(batch.to(comm.device()).split(self.accumulation)):
            with phase("forward"):
                output: StepOutput = self._engine(micro)
            loss = comm.mean(output.loss.detach())
            why = self.guard.judge(loss)
            if why:
                self._drop_gradients(done)
                return Refusal(why, loss)
            with phase("backward"):
                self._engine.backward(output.loss)
            with phase("optimizer"):
                self._engine.step()
                self._make_whole()
            outputs.append(output)
            losses.append(loss)
        mean = sum(losses) / len(losses)
        infinite = self._norm is not None and not math.isfinite(self._norm)
        if infinite or getattr(self._optimizer, "overflow", False):
            return Refusal(SCALE if self.config.precision == "fp16" else GRADIENT, mean)
        self.guard.accept(mean)
        with phase("moving averages"):
            self.ema.update(samples + self.global_batch, self.global_batch)
        names = outputs[0].metrics
        metrics = {n: torch.stack([o.metrics[n] for o in outputs]).mean() for n in names}
        return StepOutput(metrics["loss"], metrics)

    def gradient_norm(self) -> float:
        """Global gradient norm of the last step, before clipping. Not collective."""
        norm = self._engine.get_global_grad_norm() if self._norm is None else self._norm
        return float(norm) if norm is not None else math.nan

    def gather(self, half_life: int | None = None) -> dict[str, Tensor]:
        """Every parameter whole, fp32, on the CPU of every rank, one parameter at a time.

        Args:
            half_life: of the moving average to take; None takes the weights.
        """
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        with self._in_place_of_weights(half_life):
            for name, parameter in self._engine.module.named_parameters():
                if parameter.requires_grad and not self.partitions.replicated:
                    full = safe_get_full_fp32_param(parameter)
                else:
                    with deepspeed.zero.GatheredParameters(
                        [parameter], enabled=hasattr(parameter, "ds_id")
                    ):
                        full = parameter.detach().clone()
                assert full is not None, name
                state[name] = full.detach().float().cpu().clone()
        self._make_whole()
        return state

    def copy(self) -> Copy:
        """This rank's part of weights, AdamW's moments and moving averages, copied to the CPU. Not
        collective."""
        return self.partitions.copy(self.ema.tensors())

    def restore(self, copy: Copy) -> None:
        """Go back to a copy of this rank's own; where `Partitions.restorable`."""
        self.partitions.restore(copy)
        self._make_whole()
        for kind, copies in self.ema.tensors().items():
            for mine, value in zip(copies, copy.tensors[kind], strict=True):
                mine.copy_(value)

    def load(self, parts: Parts) -> None:
        """Take the state from a checkpoint of any number of ranks. An average it lacks starts at
        the weights.

        Raises:
            CheckpointError: it is of another model.
        """
        wrong = [
            name
            for name, shape in self.partitions.shapes.items()
            if parts.shapes.get(name) != shape
        ]
        if wrong:
            raise CheckpointError(
                f"checkpoint={str(parts.folder)!r} lacks {len(wrong)} of "
                f"{len(self.partitions.shapes)} parameters, or has them in another shape "
                f"({', '.join(wrong[:3])}); it is of another model: restore the configuration, or "
                "start with a new output"
            )
        self.partitions.load(parts.read, parts.steps)
        self._make_whole()
        self.ema.restart()
        for kind, copies in self.ema.tensors().items():
            if kind in parts.kinds:
                for mine, value in zip(copies, self.partitions.like(parts.read, kind), strict=True):
                    mine.copy_(value)

    @contextmanager
    def evaluating(self, half_life: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The gathered weights, or a moving average of them, for a plain copy of the task on each
        rank: no collective runs inside.

        Ranks may then do unequal work without a hang; the price is one copy of the weights a rank.
        """
        state = self.gather(half_life)
        comm.barrier()
        yield state
        comm.barrier()

    @contextmanager
    def _in_place_of_weights(self, half_life: int | None) -> Iterator[None]:
        """The master weights are the moving average inside, and themselves again after."""
        if half_life is None:
            yield
            return
        with torch.no_grad():
            kept = [flat.detach().clone() for flat in self.partitions.flats]
            for flat, average in zip(
                self.partitions.flats, self.ema.copies[half_life], strict=True
            ):
                flat.data.copy_(average)
            try:
                yield
            finally:
                for flat, value in zip(self.partitions.flats, kept, strict=True):
                    flat.data.copy_(value)

    def _clip(self) -> None:
        """As DeepSpeed in stage 0, which forgets the norm and steps with one that is not finite."""
        parameters = self._engine.module.parameters()
        self._norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip_norm))
        if not math.isfinite(self._norm):
            self._engine.optimizer.zero_grad()  # what has no gradient is not moved

    def _make_whole(self) -> None:
        """Gather, where no hook does it, parameters that DeepSpeed has cut."""
        if self._whole:
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            cut: list[Any] = list(self._engine.module.parameters())
            cut = [p for p in cut if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            if cut:
                cut[0].all_gather_coalesced(cut).wait()

    def _drop_gradients(self, micro_steps: int) -> None:
        """Forget the micro-batches of this step that were already taken in."""
        self._engine.optimizer.zero_grad()
        # DeepSpeed counts them to know when a step is complete.
        self._engine.micro_steps -= micro_steps


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
