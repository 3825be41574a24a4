"""An engine without DeepSpeed: a few parameters, AdamW, and our own partitions of stage 0, on one
process. What checkpoints ask of an engine, and no more."""

import torch
from torch import nn

from pretrain.ema import Ema, EmaConfig
from pretrain.partitions import Copy, Partitions
from pretrain.parts import Parts


class Module(nn.Module):
    """Parameters of sizes that no number of ranks divides evenly; one is smaller than the ranks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(5, 7))
        self.bias = nn.Parameter(torch.randn(3))
        self.scalar = nn.Parameter(torch.randn(1))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)


class PlainEngine:
    """Takes steps on its own; saves and loads as the real one does."""

    def __init__(
        self, seed: int = 0, half_lives: tuple[int, ...] = (), rank: int = 0, world: int = 1
    ) -> None:
        self.module = Module(seed)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.1)
        self.partitions = Partitions(self.module, self.optimizer, rank, world)
        self.ema = Ema(self.partitions.flats, EmaConfig(half_lives=half_lives))
        self.samples = 0

    def step(self, batch: int = 8) -> None:
        """A step whose gradient is a function of the weights alone."""
        self.optimizer.zero_grad()
        sum((p**2).sum() for p in self.module.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
        self.optimizer.step()
        self.samples += batch
        self.ema.update(self.samples, batch)

    def copy(self) -> Copy:
        return self.partitions.copy(self.ema.tensors())

    def restore(self, copy: Copy) -> None:
        self.partitions.restore(copy)
        for kind, copies in self.ema.tensors().items():
            torch._foreach_copy_(copies, copy.tensors[kind])

    def load(self, parts: Parts) -> None:
        self.partitions.load(parts.read, parts.steps)
        self.ema.restart()
        for kind, copies in self.ema.tensors().items():
            if kind in parts.kinds:
                torch._foreach_copy_(copies, self.partitions.like(parts.read, kind))

    def state(self) -> dict[str, torch.Tensor]:
        """All that it holds, by a name."""
        found = {
            f"{kind}/{i}": t.clone()
            for kind, ts in self.copy().tensors.items()
            for i, t in enumerate(ts)
        }
        return found | {"steps": torch.tensor(self.partitions.steps)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
