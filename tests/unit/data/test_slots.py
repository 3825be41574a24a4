"""Reused memory: never handed out twice at once, free again only when nothing views it."""

import gc

import pytest
import torch

from pretrain.data.slots import Slots


def test_a_slot_is_free_again_when_the_last_view_of_it_is_gone() -> None:
    slots = Slots(1, 24)
    assert slots.take() == 0 and slots.take() is None
    slots.view(0, (2, 3, 2, 2)).fill_(7)
    tensor = slots.hand_out(0, (2, 3, 2, 2))
    part = tensor[1:].split(1)[0]
    assert int(part.sum()) == 7 * 12
    del tensor
    gc.collect()
    assert slots.take() is None  # the part still reads the slot
    del part
    gc.collect()
    assert slots.take() == 0


def test_slots_do_not_overlap() -> None:
    slots = Slots(3, 12)
    for slot in range(3):
        slots.view(slot, (1, 3, 2, 2)).fill_(slot)
    assert [int(slots.view(slot, (1, 3, 2, 2)).sum()) for slot in range(3)] == [0, 12, 24]
    smaller = slots.view(1, (1, 3, 1, 2))  # an aspect bucket may need less
    assert smaller.shape == (1, 3, 1, 2) and smaller.is_contiguous()


def test_what_does_not_fit_is_an_error_and_not_the_next_slot() -> None:
    with pytest.raises(RuntimeError):
        Slots(2, 12).view(0, (2, 3, 2, 2))


def test_a_slot_is_shared_memory() -> None:
    assert Slots(1, 12).view(0, (1, 3, 2, 2)).is_shared()
    assert torch.empty(1).is_shared() is False
