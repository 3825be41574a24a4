"""Activation checkpointing: the same numbers and names, less memory."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pretrain.model.recompute import set_recompute
from pretrain.model.unet import UNetConfig
from tests.support import tiny

OBJECTIVES: dict[str, Any] = {"generate": {}, "align": {}}
DEEP = UNetConfig(channels=(16, 32), attention=(True, True), layers=2, head_dim=16, norm_groups=8)


def step(recompute: bool, frozen: str | None = None, **changes: Any) -> tuple[float, dict, int]:
    """Loss, gradients, and bytes kept for the backward pass."""
    task = tiny.task(OBJECTIVES, **changes)
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(frozen is None or not name.startswith(frozen))
    assert set_recompute(task, recompute) == 3  # trunk, head, text encoder
    weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = task(tiny.batch(4))
    bytes_kept = sum(kept.values())
    output.loss.backward()
    gradients = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
    return output.loss.item(), gradients, bytes_kept


@pytest.mark.parametrize("frozen", [None, "model.trunk.unet", "model.text_encoder"])
@pytest.mark.parametrize("changes", [{}, {"unet": DEEP}])
def test_loss_and_gradients_are_the_same(frozen: str | None, changes: dict[str, Any]) -> None:
    loss, gradients, kept = step(False, frozen, **changes)
    again, recomputed, rest = step(True, frozen, **changes)
    assert again == loss and recomputed.keys() == gradients.keys() and gradients
    # What several units feed is summed in another order: fp32 rounding.
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)
    assert rest < kept / 2


def test_names_are_the_same() -> None:
    task = tiny.task(OBJECTIVES)
    before = list(task.state_dict())
    set_recompute(task, True)
    assert list(task.state_dict()) == before


def test_nothing_is_recomputed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.task(OBJECTIVES)
    set_recompute(task, True)
    monkeypatch.setattr("pretrain.model.recompute.checkpoint", None)  # to call it is an error
    with torch.no_grad():
        task(tiny.batch(2))
