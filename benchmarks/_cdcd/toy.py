"""The toy: classes are Markov chains over a few tokens, so an oracle knows p(x | c) exactly."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, CODES, LENGTH = 6, 8, 12


@dataclass(frozen=True)
class Chains:
    """Six chains: a start and a transition matrix each. A seed has its own.

    Attributes:
        start_CV, next_CVV: probabilities.
    """

    start_CV: Tensor
    next_CVV: Tensor

    @classmethod
    def draw(cls, seed: int, common: float, own: float) -> "Chains":
        """Logits are ``common`` times a matrix all classes share plus ``own`` times one of the
        class: the less is its own, the harder a class is told from the others."""
        g = torch.Generator().manual_seed(seed)

        def table(*shape: int) -> Tensor:
            shared, each = (torch.randn(n, *shape, generator=g) for n in (1, CLASSES))
            return (common * shared + own * each).softmax(-1)

        return cls(table(CODES), table(CODES, CODES))

    def sample(self, classes_B: Tensor, generator: torch.Generator) -> Tensor:
        """(B, L) tokens."""
        x = [torch.multinomial(self.start_CV[classes_B], 1, generator=generator)[:, 0]]
        while len(x) < LENGTH:
            rows = self.next_CVV[classes_B, x[-1]]
            x.append(torch.multinomial(rows, 1, generator=generator)[:, 0])
        return torch.stack(x, 1)

    def log_likelihood(self, x_BL: Tensor) -> Tensor:
        """log p(x | c) of each class, (B, C), nats."""
        first = self.start_CV[:, x_BL[:, 0]].log()
        return (first + self.next_CVV[:, x_BL[:, :-1], x_BL[:, 1:]].log().sum(-1)).T

    def accuracy(self, x_BL: Tensor, classes_B: Tensor) -> float:
        """Share of samples whose likeliest class is the one that was asked for."""
        return float((self.log_likelihood(x_BL).argmax(1) == classes_B).float().mean())


def bigram_entropy(x_BL: Tensor, classes_B: Tensor) -> float:
    """Entropy of neighbouring pairs of tokens within a class, nats, mean over classes (of
    log 64 = 4.16 at most): what falls where a model merely sharpens."""
    total = 0.0
    for c in range(CLASSES):
        x = x_BL[classes_B == c]
        pairs = torch.bincount((x[:, :-1] * CODES + x[:, 1:]).flatten(), minlength=CODES**2)
        p = pairs / pairs.sum()
        total += float(-(p * p.clamp(min=1e-12).log()).sum()) / CLASSES
    return total


class Denoiser(nn.Module):
    """log p(x_0 | x_t, c): an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inputs = LENGTH * (CODES + 1) + CLASSES + 1
        self.net = nn.Sequential(
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, LENGTH * CODES),
        )

    def forward(self, x_t_BL: Tensor, t_B: Tensor, classes_B: Tensor) -> Tensor:
        seen = F.one_hot(x_t_BL, CODES + 1).flatten(1).float()
        inputs = [seen, F.one_hot(classes_B, CLASSES).float(), t_B[:, None] / LENGTH]
        return self.net(torch.cat(inputs, 1)).unflatten(1, (LENGTH, CODES)).log_softmax(-1)
