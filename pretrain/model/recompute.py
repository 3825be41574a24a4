"""Activation checkpointing (Chen et al. 2016): keep a unit's inputs, compute its inside again in
the backward pass. It changes neither names nor numbers, only memory and time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """Base of the modules that can recompute their units; `set_recompute` switches them."""

    recompute = False

    def unit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, whose inside is not kept for the backward pass where
        recomputing is on.

        A unit draws no random number (the model has no dropout).
        """
        if not (
            self.recompute and torch.is_grad_enabled() and _differentiated(function, arguments)
        ):
            return function(*arguments)
        # The reentrant kind: the other one fails under ZeRO-3, which releases parameters behind the
        # recomputation while the backward pass that asked for it still needs them. It goes back
        # only through units with an input that needs a gradient; the anchor is one, for those
        # behind frozen parameters.
        anchor = torch.empty(0, requires_grad=True)
        return checkpoint(
            _anchored, anchor, function, *arguments, use_reentrant=True, preserve_rng_state=False
        )


def _differentiated(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    """Whether an input of the unit needs a gradient, or a parameter of its modules."""
    modules = [x for x in (function, *arguments) if isinstance(x, nn.Module)]
    given = [x for x in arguments if isinstance(x, Tensor)]
    return any(x.requires_grad for x in given) or any(
        p.requires_grad for module in modules for p in module.parameters()
    )


def _anchored(_: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def set_recompute(module: nn.Module, enabled: bool) -> int:
    """Switch activation checkpointing in every part of ``module`` that has it.

    Returns:
        How many parts that were.
    """
    parts = [part for part in module.modules() if isinstance(part, Recomputing)]
    for part in parts:
        part.recompute = enabled
    return len(parts)
