"""The contrastive term of CDCD (Zhu et al. 2023, arXiv 2206.07771), whatever the data: bounds on
what is subtracted, weight over time, negatives from the batch, and the alarm.

The paper's InfoNCE over density ratios p(z^j|c) / p(z^j) is approximated by the diffusion loss of
the right pair less C times that of wrong ones: ``L(z, c) - C sum_j L(z^j, c)``. What is subtracted
has no bound from below. The released code's weight is 5e-5 or less, and it warns above that; on our
own toy .1 destroys the likelihood (150 nats for 11). Hence `LARGEST_WEIGHT`, the clamp, and the
alarm on held-out likelihood.

Shape legend: B samples of this rank, N samples negatives are drawn from, K negatives a sample.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain import comm

LARGEST_WEIGHT = 0.05

Bound = Literal["none", "clamp", "info_nce"]


def check_weight(weight: float, bound: Bound, field: str) -> None:
    """Refuse what is known to diverge.

    Raises:
        ValueError: a weight over `LARGEST_WEIGHT` on a subtracted term; InfoNCE is not subtracted.
    """
    if bound != "info_nce" and weight > LARGEST_WEIGHT:
        raise ValueError(
            f"{field}={weight:g} is over {LARGEST_WEIGHT}: the term it weighs is subtracted, and "
            "such weights destroy the likelihood; lower it (the paper: 5e-6 to 5e-5; our toy: "
            ".01 to .03), or use bound=info_nce"
        )


def time_weight(t_B: Tensor, t_max: float) -> Tensor:
    """1 + t/T: negatives count more where little is left of the data (released code)."""
    return 1 + t_B.float() / t_max


def contrast(
    negative_BK: Tensor,
    real_BK: Tensor,
    positive_B: Tensor,
    bound: Bound,
    margin: float = 1.0,
    temperature: float = 1.0,
    weight_B: Tensor | None = None,
) -> Tensor:
    """The term to *add* (times its weight) to the loss of the right pairs; a scalar.

    Args:
        negative_BK: losses D_k of the wrong pairs.
        real_BK: bool; where False there is no negative (a batch of one sample, a dropped caption).
        positive_B: losses of the right pairs; ``info_nce`` alone reads them.
        bound: ``none``: -mean_k D_k; ``clamp``: -mean_k min(D_k, margin), past which a wrong pair
            is pushed no further; ``info_nce``: -log softmax of the right pair among the wrong ones,
            logits -D / temperature.
        weight_B: over samples, such as `time_weight`.
    """
    real = real_BK.float()
    count_B = real.sum(1)
    if bound == "info_nce":
        wrong = (-negative_BK / temperature).masked_fill(~real_BK, -1e9)
        logits = torch.cat([-positive_B[:, None] / temperature, wrong], dim=1)
        term_B = -logits.log_softmax(1)[:, 0] * (count_B > 0)
    else:
        kept = negative_BK.clamp(max=margin) if bound == "clamp" else negative_BK
        term_B = -(kept * real).sum(1) / count_B.clamp(min=1)
    return (term_B if weight_B is None else term_B * weight_B).mean()


def shuffled(x_BLD: Tensor, keys_BKC: Tensor) -> Tensor:
    """Intra-negatives: own positions cut into C chunks in their order, and shuffled; (B, K, L, D).

    Args:
        keys_BKC: random numbers whose order is the chunks' new order; where that is the old order,
            it is turned by one, so that a negative is never the positive.

    Raises:
        ValueError: more chunks than positions.
    """
    (_, length, _), chunks = x_BLD.shape, keys_BKC.shape[-1]
    if chunks > length:
        raise ValueError(f"chunks={chunks} exceeds the {length} positions; lower it")
    order_BKC = keys_BKC.argsort(-1)
    same = (order_BKC == torch.arange(chunks, device=order_BKC.device)).all(-1, keepdim=True)
    order_BKC = torch.where(same, order_BKC.roll(1, -1), order_BKC)
    chunk_L = torch.arange(length, device=x_BLD.device) * chunks // length
    rank_BKC = order_BKC.argsort(-1)  # new place of each chunk
    # Stable: within a chunk positions keep their order.
    index_BKL = rank_BKC[..., chunk_L].argsort(dim=-1, stable=True)
    rows = torch.arange(len(x_BLD), device=x_BLD.device)[:, None, None]
    return x_BLD[rows, index_BKL]


@dataclass(frozen=True)
class Others:
    """Inter-negatives: for each own sample, rows of K others.

    Attributes:
        index_BK: rows of the gathered samples.
        real_BK: bool; False where there are not that many others.
    """

    index_BK: Tensor
    real_BK: Tensor
    gathered: bool

    def of(self, x: Tensor) -> Tensor:
        """The negatives' rows of ``x`` (B, ...), without gradient; (B, K, ...)."""
        rows = comm.all_gather(x) if self.gathered else x.detach()
        return rows[self.index_BK]


def others(positions_B: Tensor, u_B: Tensor, count: int, gather: bool) -> Others:
    """K different other samples for each sample of this rank: those that follow it at a random
    distance in the order of sample numbers, so the choice does not depend on how a global batch
    lies on ranks. Every rank must call this at every step.

    Args:
        positions_B: global sample numbers.
        u_B: uniform draws in [0, 1).
        gather: choose from every rank's samples, not only from this one's.
    """
    all_N = comm.all_gather(positions_B) if gather else positions_B
    order_N = all_N.argsort()
    n = len(order_N)
    own_B = torch.searchsorted(all_N[order_N].contiguous(), positions_B)
    first_B = 1 + (u_B.to(own_B.device) * max(n - 1, 1)).long()
    k = torch.arange(count, device=own_B.device)
    # Distances 1..n-1 in a circle that leaves out 0, the sample itself.
    distance_BK = 1 + (first_B[:, None] - 1 + k) % max(n - 1, 1)
    real_BK = (k < n - 1).expand(len(own_B), -1)
    return Others(order_N[(own_B[:, None] + distance_BK) % n], real_BK, gather)


class LikelihoodAlarm:
    """Held-out likelihood against its best so far: contrast may cost a little of it, never much.

    Args:
        tolerance: nats a sample over the best that are borne; the toy's w = .03 costs 0.3 of 11.
    """

    def __init__(self, tolerance: float = 1.0) -> None:
        self.tolerance = tolerance
        self.best = float("inf")

    def rings(self, nll: float) -> bool:
        """Whether a new held-out value (nats a sample) is not finite or too far over the best."""
        self.best = min(self.best, nll)
        return not nll <= self.best + self.tolerance
