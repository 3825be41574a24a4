"""Discrete codes: drawing them so that gradients pass, and how much of their books is used.

Shape legend: B samples, M codes of an image, K values of a code. Entropies are in nats.
"""

import math

import torch
from torch import Tensor


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel draws from uniform ones in [0, 1)."""
    tiny = 2.0**-26  # below the grid of fp32 draws: 0 stays finite
    return -(-(u.clamp(min=tiny)).log()).clamp(min=tiny).log()


def draw_codes(logits_BMK: Tensor, u_BMK: Tensor, temperature: float, hard: bool) -> Tensor:
    """Gumbel-softmax draws of softmax(logits) (Jang et al. 2017, Eq. 1; Maddison et al. 2017).

    Args:
        u_BMK: uniform draws in [0, 1).
        temperature: tau; the value that a draw is nearest to does not depend on it.
        hard: straight-through: one-hot forward, the soft draw's gradient backward. Soft draws are
            what DisCo-Diff's text describes, hard ones what its docking code does.

    Returns:
        fp32 rows over K that sum to 1.
    """
    noisy = logits_BMK.float() + gumbel(u_BMK)
    soft = (noisy / temperature).softmax(-1)
    if not hard:
        return soft
    # (F.one_hot would wait for the device to check the range.)
    one_hot = torch.zeros_like(soft).scatter(-1, noisy.argmax(-1, keepdim=True), 1.0)
    return one_hot + (soft - soft.detach())


def entropy(p_K: Tensor) -> Tensor:
    """-sum p log p over the last dimension."""
    return torch.special.entr(p_K).sum(-1)


def missing_entropy(marginal_MK: Tensor) -> Tensor:
    """log K - H(marginal) = KL(marginal || uniform), averaged over codes; 0 where each book is used
    evenly."""
    return (math.log(marginal_MK.shape[-1]) - entropy(marginal_MK)).mean()


def use_of_codes(logits_BMK: Tensor) -> dict[str, Tensor]:
    """How the codes of these samples use their books.

    Returns:
        ``perplexity_i`` of each code, exp(H) of its marginal (1: one value for all; K: all values
        evenly; at most about B of a small batch), their mean and least, and ``information``: the
        mean over codes of H(marginal) - H(code | image), what a code tells of its image. A book
        that is used evenly at random tells nothing.
    """
    p_BMK = logits_BMK.detach().float().softmax(-1)
    marginal_MK = p_BMK.mean(0)
    perplexity_M = entropy(marginal_MK).exp()
    information = (entropy(marginal_MK) - entropy(p_BMK).mean(0)).mean()
    return {
        "perplexity": perplexity_M.mean(),
        "perplexity_min": perplexity_M.min(),
        "information": information,
        **{f"perplexity_{i}": value for i, value in enumerate(perplexity_M)},
    }
