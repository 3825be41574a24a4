"""Modules that can be given new weights again, one at a time: a model too large to be made whole is
made without storage and filled module by module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@contextmanager
def without_storage() -> Iterator[None]:
    """Parameters that modules are given inside are on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def moved(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(self, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", moved):
        yield


def initialise(module: M, change: Callable[[M], Any]) -> M:
    """Change a module's own new weights by ``change``, now and whenever it is made anew."""
    with torch.no_grad():
        change(module)
    module.change_fresh = change  # type: ignore[assignment]
    return module


def make_anew(module: nn.Module) -> None:
    """New weights for the parameters that ``module`` itself holds.

    Raises:
        TypeError: it does not know how to make them.
    """
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise TypeError(
            f"{type(module).__name__} holds parameters and has no reset_parameters: it cannot be "
            "made without storage"
        )
    with torch.no_grad():
        reset()
        change = getattr(module, "change_fresh", None)
        if change is not None:
            change(module)
