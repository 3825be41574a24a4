"""Memory for the pixels of batches that is used again.

A new batch is new memory, and every new page of it is a fault: 3,000 for 64 pictures of 256 px,
which cost as much as a tenth of decoding them. So the rank keeps a few slots, shared with its
workers: a worker decodes straight into a slot, and the slot is free again once the rank has let
go of the batch's tensor and everything that views it.
"""

import weakref
from collections import deque

import torch
from torch import Tensor


class Slots:
    """Slots of equal size, in memory shared with the workers that this object is sent to.

    Args:
        count: batches that may be in work, waiting or in use at once; past them, a batch brings
            memory of its own.
        num_bytes: of the largest batch's pixels.
    """

    def __init__(self, count: int, num_bytes: int) -> None:
        self._memory = torch.empty(count, num_bytes, dtype=torch.uint8).share_memory_()
        # The one given back last goes first: some of it is in the processor's cache still.
        self._free = deque(reversed(range(count)))

    def take(self) -> int | None:
        """A free slot; None if there is none. For the rank."""
        return self._free.pop() if self._free else None

    def view(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The slot as uint8 of ``shape``, to be filled. For a worker."""
        return self._memory[slot, : torch.Size(shape).numel()].view(shape)

    def hand_out(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The same, filled; the slot is free once the tensor and its views are gone. For the
        rank."""
        array = self.view(slot, shape).numpy()
        # The tensor holds this very array for as long as its storage lives.
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array)
