"""Randomness as a pure function of (seed, sample number, stream): never of history.

Sample k draws the same noise on 1 rank and on 1,024, before and after a resume (after EDM2's
principle of seeding by position). The draws are made on the CPU, so they are the same for every
device.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


class SampleRandom:
    """Draws for a batch, one independent stream for each (seed, sample number, purpose).

    Args:
        seed: the run's seed.
        positions_B: global sample numbers, counted over epochs; int64.
    """

    def __init__(self, seed: int, positions_B: Tensor | Sequence[int]) -> None:
        self.seed = seed
        self.positions = [int(p) for p in positions_B]

    def normal(
        self, purpose: str, shape: Sequence[int], device: torch.device | None = None
    ) -> Tensor:
        """Standard normal draws, fp32, shape (B, *shape)."""
        rows = [
            torch.randn(tuple(shape), generator=generator(self.seed, p, purpose))
            for p in self.positions
        ]
        return self._stack(rows, shape, device)

    def uniform(
        self, purpose: str, device: torch.device | None = None, shape: Sequence[int] = ()
    ) -> Tensor:
        """Uniform draws in [0, 1), fp32, shape (B, *shape)."""
        rows = [
            torch.rand(tuple(shape), generator=generator(self.seed, p, purpose))
            for p in self.positions
        ]
        return self._stack(rows, shape, device)

    def _stack(
        self, rows: list[Tensor], shape: Sequence[int], device: torch.device | None
    ) -> Tensor:
        stacked = torch.stack(rows) if rows else torch.empty((0, *shape))
        return stacked.to(device) if device is not None else stacked
