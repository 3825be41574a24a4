"""A task whose weights never lie whole on a rank: made without storage, then filled and cut one
module at a time.

A parameter that starts from a file is cut before anything is read; each rank then reads the bytes
of its own part. Over all ranks each byte of the files is read about once. What has no file is made
anew, from a seed of its own name, so any number of ranks starts from the same weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain import comm
from pretrain.engine_config import EngineConfig, deepspeed_config
from pretrain.model.fresh import make_anew
from pretrain.partitions import even_part
from pretrain.pretrained import Pretrained
from pretrain.rng import derive_seed

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
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for path, module in list(task.named_modules()):
        own = {n: p for n, p in module._parameters.items() if p is not None and p.is_meta}
        if not own:
            if cut is not None:
                cut(module)  # what was made whole, as objectives are
            continue
        names = {n: f"{path}.{n}" if path else n for n in own}
        for n, p in own.items():
            if id(p) not in made:
                made[id(p)] = nn.Parameter(
                    torch.empty(p.shape, device=comm.device()), p.requires_grad
                )
            module._parameters[n] = made[id(p)]
        read = [n for n in own if pretrained.has(names[n])]
        if len(read) < len(own):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "fresh", path))
                make_anew(module)
        # (A part that was put on NVMe is no longer there to be written.)
        late = cut is not None and config.offload_parameters != "nvme"
        if cut is not None and late:
            cut(module)
        for n in read:
            _read_into(module._parameters[n], names[n], pretrained)
        if cut is not None and not late:
            cut(module)
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
        part[: stop - start].copy_(pretrained.read(name, start, stop))
        part[stop - start :].zero_()


class _Cutter:
    """Cuts modules as `deepspeed.initialize` would cut the whole task."""

    def __init__(self, config: EngineConfig) -> None:
        self._dtype = _DTYPES[config.precision]
        self._settings = dict(deepspeed_config(config, 1))
        self._convert: Callable[..., None] | None = None

    def __call__(self, module: nn.Module) -> None:
        import deepspeed

        parameters: list[Any] = [
            p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")
        ]
        for p in parameters:
            p.data = p.data.to(self._dtype)
        if self._convert is not None:
            self._convert(param_list=parameters)
        elif parameters:
            alone = nn.Module()
            for i, p in enumerate(parameters):
                alone.register_parameter(str(i), p)
            deepspeed.zero.Init(module=alone, config_dict_or_path=self._settings, dtype=self._dtype)
            self._convert = parameters[0].convert_to_zero_parameters
