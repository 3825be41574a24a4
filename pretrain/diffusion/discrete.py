"""Discrete diffusion over tokens: absorbing, multinomial, and mask-and-replace (VQ-Diffusion, Gu et
al. 2022, on D3PM, Austin et al. 2021).

Tokens take V codes 0..V-1; state V is [MASK], which is never left. One forward step keeps a code
with probability alpha_t + beta_t, replaces it by each other code with beta_t and masks it with
gamma_t, where alpha_t + V beta_t + gamma_t = 1 (VQ-Diffusion Eq. 7). The product of steps has the
same form with the cumulative values of Eq. 8, so nothing here multiplies matrices: the cost of a
posterior is O(V) a token, over any stretch s < t.

Shape legend: B samples, L tokens, V codes, S = V + 1 states. Times are int64 (B,), 0 is clean data.
Log-probabilities are fp32, never under `LOG_ZERO` (the released code's clamp to [-70, 0]).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import Config

LOG_ZERO = -70.0

Kind = Literal["absorbing", "multinomial", "mask_and_replace"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, L), t (B,)) to log p(x_0 | x_t), (B, L, V)."""


class ProcessConfig(Config):
    """The schedule "alpha1" of the released code: cumulative values linear in t, from t = 1 to T.

    Attributes:
        kind: ``absorbing`` has no replacement (mask_last follows from keep), ``multinomial`` no
            mask, ``mask_and_replace`` both.
        steps: T.
        keep_first, keep_last: alpha-bar at t = 1 and t = T.
        mask_first, mask_last: gamma-bar at t = 1 and t = T; read by ``mask_and_replace`` alone.
            The released values leave replacement 1e-6; 0.9 for mask_last leaves it a tenth.
    """

    kind: Kind = "mask_and_replace"
    steps: int = Field(80, ge=1)
    keep_first: float = Field(0.99999, gt=0, lt=1)
    keep_last: float = Field(9e-6, gt=0, lt=1)
    mask_first: float = Field(9e-6, ge=0, lt=1)
    mask_last: float = Field(0.99999, ge=0, lt=1)

    @model_validator(mode="after")
    def _a_distribution(self) -> "ProcessConfig":
        if self.keep_first < self.keep_last:
            raise ValueError(
                f"keep_first={self.keep_first} is under keep_last={self.keep_last}: codes must be "
                "kept ever more rarely; swap them"
            )
        if self.kind == "mask_and_replace":
            for end in ("first", "last"):
                keep, mask = getattr(self, f"keep_{end}"), getattr(self, f"mask_{end}")
                if keep + mask > 1:
                    raise ValueError(
                        f"mask_{end}={mask} and keep_{end}={keep} add up to more than 1; lower "
                        f"mask_{end} to {1 - keep:.6g} or less"
                    )
        return self


@dataclass(frozen=True)
class Stretch:
    """alpha, beta and gamma of q(x_t | x_s) for each sample, shaped to go with (B, L, V)."""

    keep: Tensor
    replace: Tensor
    mask: Tensor


class DiscreteProcess:
    """q(x_t | x_s), its posteriors, and sampling.

    Args:
        config: kind and schedule.
        codes: V.
    """

    def __init__(self, config: ProcessConfig, codes: int) -> None:
        self.config, self.codes, self.steps = config, codes, config.steps
        ramp = torch.linspace(0, 1, config.steps, dtype=torch.float64)
        keep = config.keep_first + (config.keep_last - config.keep_first) * ramp
        match config.kind:
            case "absorbing":
                unmasked = keep
            case "multinomial":
                unmasked = torch.ones_like(keep)
            case "mask_and_replace":
                unmasked = 1 - (config.mask_first + (config.mask_last - config.mask_first) * ramp)
        one = keep.new_ones(1)
        # alpha-bar and 1 - gamma-bar of t = 0..T
        self._keep, self._unmasked = torch.cat([one, keep]), torch.cat([one, unmasked])
        ratio = self._keep[1:] / self._keep[:-1], self._unmasked[1:] / self._unmasked[:-1]
        if bool((ratio[1] - ratio[0] < -1e-9).any()):
            raise ValueError(
                f"mask_last={config.mask_last} with keep_last={config.keep_last}: at some step the "
                "shares of kept and masked codes add up to more than 1; lower mask_last"
            )

    @property
    def mask_token(self) -> int:
        """The state [MASK]."""
        return self.codes

    def stretch(self, s_B: Tensor, t_B: Tensor) -> Stretch:
        """q(x_t | x_s): the ratio of the cumulative values of Eq. 8; with s = 0 they themselves."""
        keep_of, unmasked_of = self._keep.to(t_B.device), self._unmasked.to(t_B.device)
        keep, unmasked = keep_of[t_B] / keep_of[s_B], unmasked_of[t_B] / unmasked_of[s_B]
        replace, mask = ((unmasked - keep) / self.codes).clamp(min=0), 1 - unmasked
        a, b, g = (x.float()[:, None, None] for x in (keep, replace, mask))
        return Stretch(a, b, g)

    def matrix(self, s: int, t: int) -> Tensor:
        """(S, S) of q(x_t = column | x_s = row)."""
        q = self.stretch(torch.tensor([s]), torch.tensor([t]))
        codes = q.keep[0] * torch.eye(self.codes) + q.replace[0]
        rows = torch.cat([codes, q.mask[0].expand(self.codes, 1)], dim=1)
        last = torch.zeros(1, self.codes + 1)
        last[0, -1] = 1
        return torch.cat([rows, last])

    def prior(self, device: torch.device | None = None) -> Tensor:
        """p(x_T), (S,): what is reached from uniform codes."""
        return (self.matrix(0, self.steps)[:-1].mean(0)).to(device)

    def noised(self, x0_BL: Tensor, t_B: Tensor, u_BLS: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) from uniform draws in [0, 1), by Gumbel's trick."""
        q = self.stretch(torch.zeros_like(t_B), t_B)
        codes = q.keep * _one_hot(x0_BL, self.codes) + q.replace
        log_q = _log(torch.cat([codes, q.mask.expand(*x0_BL.shape, 1)], dim=-1))
        return (log_q + gumbel(u_BLS)).argmax(-1)

    def log_reverse(self, log_x0_BLV: Tensor, x_t_BL: Tensor, s_B: Tensor, t_B: Tensor) -> Tensor:
        """log p(x_s | x_t) = log sum_x0 q(x_s | x_t, x_0) p(x_0 | x_t), (B, L, S), for s < t
        (VQ-Diffusion Eq. 11, the x_0-parametrisation).

        By Bayes q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0) (Eq. 5). An x_0 that
        cannot have led to x_t has no part in the sum, and the sum is normalised over the others.
        """
        log_q_t = self._log_likelihood(x_t_BL, torch.zeros_like(t_B), t_B)
        impossible = log_q_t < LOG_ZERO + 0.01
        log_r = log_x0_BLV - torch.where(impossible, -2 * LOG_ZERO, log_q_t)
        log_total = log_r.logsumexp(-1, keepdim=True)
        to_s = self.stretch(torch.zeros_like(s_B), s_B)
        kept = torch.logaddexp(_log(to_s.keep) + log_r, _log(to_s.replace) + log_total)
        masked = _log(to_s.mask) + log_total
        masked_s = torch.where(x_t_BL[..., None] == self.codes, masked, masked + 2 * LOG_ZERO)
        joint = torch.cat([kept + self._log_likelihood(x_t_BL, s_B, t_B), masked_s], dim=-1)
        return (joint - joint.logsumexp(-1, keepdim=True)).clamp(LOG_ZERO, 0)

    def log_posterior(self, x0_BL: Tensor, x_t_BL: Tensor, s_B: Tensor, t_B: Tensor) -> Tensor:
        """log q(x_s | x_t, x_0), (B, L, S) (VQ-Diffusion Eq. 5)."""
        return self.log_reverse(log_one_hot(x0_BL, self.codes), x_t_BL, s_B, t_B)

    def _log_likelihood(self, x_t_BL: Tensor, s_B: Tensor, t_B: Tensor) -> Tensor:
        """log q(x_t | x_s = k) of each code k, (B, L, V)."""
        q = self.stretch(s_B, t_B)
        seen = q.keep * _one_hot(x_t_BL.clamp(max=self.codes - 1), self.codes) + q.replace
        return _log(torch.where(x_t_BL[..., None] == self.codes, q.mask, seen))

    def grid(self, steps: int) -> list[int]:
        """T = t_0 > ... > 0 in ``steps`` jumps of nearly one length (the released `sample_fast`).

        Raises:
            ValueError: more steps than the process has.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps={steps} must lie in 1..{self.steps}, the process's own steps")
        return [round(self.steps * (1 - i / steps)) for i in range(steps + 1)]

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        shape: tuple[int, int],
        steps: int | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        device: torch.device | None = None,
    ) -> Tensor:
        """Tokens (B, L) by ancestral sampling, from p(x_T), in ``steps`` jumps (None: all T).

        Args:
            denoise: log p(x_0 | x_t).
            temperature: of p(x_0 | x_t); under 1 sharpens it.
            generator: on the CPU; one draw a token, state and step.
        """

        def draw(log_p: Tensor) -> Tensor:
            u = torch.rand((*shape, self.codes + 1), generator=generator).to(device)
            return (log_p + gumbel(u)).argmax(-1)

        x = draw(_log(self.prior(device)).expand(*shape, -1))
        for t, s in pairwise(self.grid(steps or self.steps)):
            t_B, s_B = (torch.full((shape[0],), k, device=device) for k in (t, s))
            log_x0 = denoise(x, t_B).float()
            if temperature != 1:
                log_x0 = (log_x0 / temperature).log_softmax(-1)
            x = draw(self.log_reverse(log_x0.clamp(LOG_ZERO, 0), x, s_B, t_B))
        return x


def log_one_hot(x_BL: Tensor, codes: int) -> Tensor:
    """log of 1 at the token and of (clamped) 0 elsewhere, (B, L, V)."""
    return _log(_one_hot(x_BL, codes))


def gumbel(u: Tensor) -> Tensor:
    """Gumbel noise from uniform draws in [0, 1)."""
    return -(-u.clamp(1e-30, 1 - 1e-7).log()).log()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def vb_terms(
    process: DiscreteProcess, log_x0_BLV: Tensor, x0_BL: Tensor, x_t_BL: Tensor, t_B: Tensor
) -> Tensor:
    """L_{t-1} of the variational bound for each token, (B, L), nats (VQ-Diffusion Eq. 9):
    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), which at t = 1 is -log p(x_0 | x_1).

    Summed over t = 1..T, with `vb_prior`, it bounds -log p(x_0); one uniformly drawn t counts T
    fold.
    """
    before = t_B - 1
    target = process.log_posterior(x0_BL, x_t_BL, before, t_B)
    return kl(target, process.log_reverse(log_x0_BLV, x_t_BL, before, t_B))


def vb_prior(process: DiscreteProcess, x0_BL: Tensor, prior_S: Tensor | None = None) -> Tensor:
    """L_T = KL(q(x_T | x_0) || p(x_T)) of each token, (B, L); it has no parameters."""
    rows = process.matrix(0, process.steps)[:-1].to(x0_BL.device)[x0_BL]
    prior = process.prior(x0_BL.device) if prior_S is None else prior_S
    return kl(_log(rows), _log(prior))


def auxiliary(log_x0_BLV: Tensor, x0_BL: Tensor) -> Tensor:
    """KL(x_0 || p(x_0 | x_t)) = -log p(x_0 | x_t) of each token, (B, L) (VQ-Diffusion Eq. 12)."""
    return -log_x0_BLV.gather(-1, x0_BL[..., None])[..., 0]


def _one_hot(x_BL: Tensor, codes: int) -> Tensor:
    return torch.nn.functional.one_hot(x_BL, codes).float()


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=math.exp(LOG_ZERO)).log().clamp(min=LOG_ZERO)
