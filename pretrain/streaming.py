"""A task whose weights never lie whole on a rank: made without storage, then filled and cut one
module at a time.

A parameter that starts from a file is cut before anything is read; each rank then reads the bytes
of its own part. Over all ranks each byte of the files is read about once. What has no file is made
anew, from a seed of its own name, so any number of ranks starts from the same weights.
"""

import ctypes
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from pretrain import comm
from pretrain.engine_config import EngineConfig, deepspeed_config
from pretrain.model.fresh import make_anew
from pretrain.partitions import even_part
from pretrain.pretrained import Pretrained
from pretrain.rng import derive_seed

_CHUNK = 1 << 20  # elements that are read at once
_LARGE = 1 << 18  # elements of a module, of which more than a few MiB could stay behind
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fill(task: nn.Module, pretrained: Pretrained, config: EngineConfig, seed: int) -> None:
    """Give the parameters of ``task`` that have no storage their weights; collective.

    Args:
        task: in part made `fresh.without_storage`.
        pretrained: where some of them start.
        config: under stage 3 on several ranks each module is cut as soon as it is filled.
        seed: of what is made anew.

    Raises:
        ConfigError: a file lacks a tensor, or has it in another shape.
    """
    pretrained.check({name: tuple(p.shape) for name, p in task.named_parameters()})
    cut = _Cutter(config) if config.zero_stage == 3 else None
    room = _Room(shared=cut is not None)
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for path, module in list(task.named_modules()):
        own = {n: p for n, p in module._parameters.items() if p is not None and p.is_meta}
        if not own:
            if cut is not None:
                cut(module)  # what was made whole, as objectives are
            continue
        names = {n: f"{path}.{n}" if path else n for n in own}
        read = [n for n in own if pretrained.has(names[n])]
        room.reset()
        for n, p in own.items():
            if id(p) not in made:
                dtype = cut.dtype if cut is not None and n in read else torch.float32
                made[id(p)] = nn.Parameter(room.take(p.shape, dtype), p.requires_grad)
            module._parameters[n] = made[id(p)]
        if len(read) < len(own):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "fresh", path))
                make_anew(module)
        # (A part that was put on NVMe is no longer there to be written.)
        late = cut is not None and config.offload_parameters != "nvme"
        if cut is not None and late:
            cut(module, read)
        for n in read:
            _read_into(module._parameters[n], names[n], pretrained)
        if cut is not None and not late:
            cut(module)
        if cut is not None and sum(p.numel() for p in own.values()) >= _LARGE:
            _give_back()
    pretrained.close()


def _read_into(parameter: Any, name: str, pretrained: Pretrained) -> None:
    """This rank's part of the parameter, or all of it, from its file."""
    part = getattr(parameter, "ds_tensor", None)
    with torch.no_grad():
        if part is None:
            value = pretrained.read(name, 0, parameter.numel())
            parameter.copy_(value.view_as(parameter))
            return
        start, stop = even_part(parameter.ds_numel, comm.rank(), comm.world_size())
        for at in range(start, stop, _CHUNK):
            end = min(at + _CHUNK, stop)
            part[at - start : end - start].copy_(pretrained.read(name, at, end))
        part[stop - start :].zero_()


def _give_back() -> None:
    """Memory that is free goes back to the system, also from between what stays: glibc would keep
    it resident, and in four of ten loads that came to a tenth of a model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # (other C libraries have none)
        trim(0)


class _Room:
    """Memory for a module's whole parameters. Those that are cut at once share one place: to
    allocate and free each between the parts, which stay, would leave gaps that nothing fits into
    (measured: peaks of 0.61 to 0.73 of a model on 2 ranks).

    Args:
        shared: whether what was taken before `reset` is free then.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        self._bytes = torch.empty(0, dtype=torch.uint8, device=comm.device())
        self._used = 0

    def reset(self) -> None:
        """A new module begins."""
        self._used = 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor without values."""
        size = -(-shape.numel() * dtype.itemsize // 64) * 64
        if not self._shared:
            return torch.empty(shape, dtype=dtype, device=comm.device())
        if self._used + size > len(self._bytes):
            # (What was taken of the old place keeps it.)
            self._bytes = torch.empty(size, dtype=torch.uint8, device=comm.device())
            self._used = 0
        part = self._bytes[self._used : self._used + size]
        self._used += size
        return part.view(dtype)[: shape.numel()].view(shape)


class _Cutter:
    """Cuts modules as `deepspeed.initialize` would cut the whole task.

    Attributes:
        dtype: of the weights.
    """

    def __init__(self, config: EngineConfig) -> None:
        import deepspeed

        self.dtype = _DTYPES[config.precision]
        # (An empty module: it then sets up all that it does for one.)
        self._zero: Any = deepspeed.zero.Init(
            module=nn.Module(), config_dict_or_path=deepspeed_config(config, 1), dtype=self.dtype
        )

    def __call__(self, module: nn.Module, empty: Collection[str] = ()) -> None:
        """Cut the parameters that ``module`` itself holds; those named in ``empty`` have no values
        yet, which are then not sent to the other ranks, nor their memory touched."""
        for name, parameter in module.named_parameters(recurse=False):
            p: Any = parameter
            if hasattr(p, "ds_id"):
                continue
            if name in empty:
                self._zero._convert_to_deepspeed_param(p)
                p.partition()
            else:
                p.data = p.data.to(self.dtype)
                self._zero._convert_to_zero_parameters([p])
