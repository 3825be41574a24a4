"""Generation with DisCo-Diff's codes: drawn by the prior or given, and guidance over them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.model.diffdis import DiffDis
from pretrain.objectives._disco_prior import Prior, pool
from pretrain.objectives.disco import Disco

Draw = Callable[[Tensor, Sequence[int]], Tensor]  # (c_BLD, seeds) -> codes (B, M)
Conditions = tuple[Tensor, list[tuple[float, Tensor]]]
At = Callable[[Tensor], Conditions]


def by_prior(prior: Prior, temperature: float = 1.0) -> Draw:
    """Codes that ``prior`` draws for a condition."""
    return lambda c_BLD, seeds: prior.sample(pool(c_BLD), seeds, temperature)


class CodeGuidance:
    """A condition of `inference.Heads`: the caption and codes, guided by each.

    x_0 = D(c, z) + w (D(c, z) - D(null, z)) + v (D(c, z) - D(c, no codes)). The last part is
    DisCo-Diff's guidance in the convention of its docking code (v = 0: none); the sum of the two is
    ours. Below the objective's ``min_noise`` there are no codes, as in training.

    Args:
        disco, model: as trained.
        draw: codes for conditions.
        weight: v.
    """

    def __init__(self, disco: Disco, model: DiffDis, draw: Draw, weight: float = 0.0) -> None:
        self.disco, self.model, self.draw, self.weight = disco, model, draw, weight

    def __call__(
        self, c_BLD: Tensor, null_c_BLD: Tensor, guidance: float, seeds: Sequence[int]
    ) -> Callable[[Tensor], Conditions]:
        """Conditions over time, see `inference.Condition`."""
        with_codes = self.disco.tokens_of(self.draw(c_BLD, seeds)).to(c_BLD)
        without = self.disco.null_tokens(len(c_BLD)).to(c_BLD)

        def at(t_B: Tensor) -> Conditions:
            none_B = self.disco.without_codes(self.model, t_B)
            tokens = torch.where(none_B[:, None, None], without, with_codes)
            c = torch.cat([c_BLD, tokens], dim=1)
            others = [(guidance, torch.cat([null_c_BLD, tokens], dim=1))]
            if not bool(none_B.all()):
                others.append((self.weight, torch.cat([c_BLD, without], dim=1)))
            return c, others

        return at
