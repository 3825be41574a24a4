"""One optimizer step under DeepSpeed ZeRO-3. The only file of the training path that imports
deepspeed."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain import comm, ops
from pretrain.engine_config import EngineConfig, accumulation, deepspeed_config
from pretrain.errors import NonFiniteError
from pretrain.optim import OptimizerConfig, parameter_groups
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


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
