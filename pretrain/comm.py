"""Collectives, the same with and without a process group: on one rank they are identities.

Everything here must be called by every rank in the same order.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's rank: of the process group, else of the launcher's environment, else 0."""
    return dist.get_rank() if _on() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks: of the process group, else of the launcher's environment, else 1."""
    return dist.get_world_size() if _on() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this host, as the launcher says; else 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def is_main() -> bool:
    """Whether this is rank 0, the one that logs and writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if _on():
        dist.barrier()


def device() -> torch.device:
    """The device of this rank: its GPU where CUDA is there, else the CPU."""
    if torch.cuda.is_available():  # never run here: no GPU on the development machines
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


class _GatherWithGrad(torch.autograd.Function):
    """All-gather along dim 0 whose backward sums, over ranks, the gradients of each rank's own
    rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed = grads[0].contiguous().clone()
        dist.all_reduce(summed)
        start = dist.get_rank() * ctx.rows
        return summed[start : start + ctx.rows]


def all_gather_with_grad(x_BE: Tensor) -> Tensor:
    """Rows of every rank, in rank order, shape (R·B, E); every rank must hold the same B.

    The gradient of row i reaches the rank that owns it, summed over ranks. With a loss that is each
    rank's mean over its own rows, an engine that averages gradients over ranks then applies exactly
    the gradient of the global mean (the trap of open_clip#616 is a further factor of R).
    """
    return _GatherWithGrad.apply(x_BE) if _on() and world_size() > 1 else x_BE


def all_gather(x_BE: Tensor) -> Tensor:
    """Rows of every rank, in rank order; no gradient."""
    return all_gather_with_grad(x_BE.detach())


def agree_all(flag: bool) -> bool:
    """True on every rank only if ``flag`` is True on every rank."""
    if not (_on() and world_size() > 1):
        return flag
    value = torch.tensor([1.0 if flag else 0.0], device=device())
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value.item() > 0)


def agree_any(flag: bool) -> bool:
    """True on every rank if ``flag`` is True on any rank."""
    return not agree_all(not flag)


def mean(value: Tensor) -> float:
    """Mean over ranks of a scalar; not finite anywhere if it is not finite on one rank."""
    value = value.detach().double().reshape(1)
    if _on() and world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return float(value.item())


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Mean of each named value over ranks; every rank must hold the same names."""
    if not (_on() and world_size() > 1) or not values:
        return dict(values)
    names = sorted(values)
    packed = torch.tensor([values[n] for n in names], dtype=torch.float64, device=device())
    dist.all_reduce(packed)
    return dict(zip(names, (packed / world_size()).tolist(), strict=True))


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank. For small results; pickled between
    ranks."""
    if not (_on() and world_size() > 1):
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    if not (_on() and world_size() > 1):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _on() -> bool:
    return dist.is_available() and dist.is_initialized()
