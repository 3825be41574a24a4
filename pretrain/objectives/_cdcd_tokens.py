"""CDCD on discrete diffusion over tokens, as published and released (arXiv 2206.07771, on
VQ-Diffusion): the loss of one micro-batch from log p(x_0 | x_t, c).

Shape legend: B samples, L tokens, V codes, K negatives a sample. Losses are nats a token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import Config
from pretrain.diffusion.discrete import LOG_ZERO, DiscreteProcess, auxiliary, vb_terms
from pretrain.objectives import _cdcd_loss as loss
from pretrain.types import LossTerm

Mechanism = Literal["step", "sample"]


class TokenLossConfig(Config):
    """Attributes:
    contrast: w, the whole weight of the K negatives; 0 is plain VQ-Diffusion.
    mechanism: what a negative costs. ``step``: KL(q(x_{t-1} | x_t, x_0^k) || p(x_{t-1} | x_t, c)),
        with the positive's x_t; ``sample``: -log p(x_0^k | x_t, c).
    auxiliary: a of a (2 - t/T) KL(x_0 || p(x_0 | x_t)) (the paper: 5e-4, ImageNet 1e-3).
    bound, margin, temperature: see `_cdcd_loss.contrast`; margin in nats a token. The released
        code bounds by its clamp of log-probabilities alone, which is ``none`` here.
    likelihood: ``vb`` is the variational bound; ``plain`` is -log p(x_0 | x_t) of the tokens that
        are masked, unweighted, with which our toy was measured.
    """

    contrast: float = Field(0.0, ge=0)
    mechanism: Mechanism = "step"
    auxiliary: float = Field(5e-4, ge=0)
    bound: loss.Bound = "none"
    margin: float = Field(10.0, gt=0)
    temperature: float = Field(1.0, gt=0)
    likelihood: Literal["vb", "plain"] = "vb"

    @model_validator(mode="after")
    def _bearable(self) -> "TokenLossConfig":
        loss.check_weight(self.contrast, self.bound, "contrast")
        return self


@dataclass(frozen=True)
class TokenTerms:
    """Nats a token: of the right pairs (B,), of the wrong ones (B, K)."""

    positive_B: Tensor
    negative_BK: Tensor


def token_terms(
    process: DiscreteProcess,
    log_x0_BLV: Tensor,
    x0_BL: Tensor,
    x_t_BL: Tensor,
    t_B: Tensor,
    negatives_BKL: Tensor,
    config: TokenLossConfig,
) -> TokenTerms:
    """What the right x_0 and each wrong one cost, given one prediction at the right one's x_t."""
    log_x0 = log_x0_BLV.float().clamp(LOG_ZERO, 0)
    # In ``plain`` a token that x_t still shows is predicted of neither the right nor a wrong x_0.
    share_BL = torch.ones_like(x_t_BL, dtype=torch.float32)
    if config.likelihood == "plain":
        share_BL = (x_t_BL == process.mask_token).float()

    def cost(x0: Tensor, step: bool) -> Tensor:
        each = vb_terms(process, log_x0, x0, x_t_BL, t_B) if step else auxiliary(log_x0, x0)
        return (each * share_BL).mean(-1)

    positive = cost(x0_BL, config.likelihood == "vb")
    wrong = [cost(x, config.mechanism == "step") for x in negatives_BKL.unbind(1)]
    return TokenTerms(positive, torch.stack(wrong, 1) if wrong else positive[:, None][:, :0])


def token_loss(
    process: DiscreteProcess,
    log_x0_BLV: Tensor,
    x0_BL: Tensor,
    x_t_BL: Tensor,
    t_B: Tensor,
    negatives_BKL: Tensor,
    real_BK: Tensor,
    config: TokenLossConfig,
) -> LossTerm:
    """The released loss, for uniformly drawn t (its division by p(t) is then a factor of T, left
    to the learning rate): L_{t-1} + a (2 - t/T) aux - (w/K) sum_k (1 + t/T) D_k, nats a token.

    Args:
        negatives_BKL: tokens x_0^k; `_cdcd_loss.shuffled` makes intra ones, `others` finds inter.
        real_BK: bool, which of them there are.
    """
    terms = token_terms(process, log_x0_BLV, x0_BL, x_t_BL, t_B, negatives_BKL, config)
    total = terms.positive_B.mean()
    log_x0 = log_x0_BLV.float().clamp(LOG_ZERO, 0)
    if config.auxiliary > 0 and config.likelihood == "vb":
        share = 2 - t_B.float() / process.steps
        total = total + config.auxiliary * (share * auxiliary(log_x0, x0_BL).mean(-1)).mean()
    metrics = {"likelihood": terms.positive_B.mean(), "entropy": entropy(log_x0).mean()}
    if config.contrast > 0:
        weight = loss.time_weight(t_B, process.steps)
        bounds = (config.bound, config.margin, config.temperature)
        term = loss.contrast(terms.negative_BK, real_BK, terms.positive_B, *bounds, weight)
        total = total + config.contrast * term
        metrics |= {
            "negative": terms.negative_BK.mean(),
            "agreement": (terms.positive_B[:, None] < terms.negative_BK).float().mean(),
        }
    return LossTerm(total, metrics)


def entropy(log_x0_BLV: Tensor) -> Tensor:
    """Entropy of p(x_0 | x_t), nats a token, (B,): what falls where a model only sharpens."""
    return -(log_x0_BLV.exp() * log_x0_BLV).sum(-1).mean(-1)


def log_ratio(bound_B: Tensor, bound_without_B: Tensor) -> Tensor:
    """log p(z|c) / p(z), the critic of the paper's InfoNCE, from the variational bounds with and
    without the condition; exact where the model is."""
    return bound_without_B - bound_B
