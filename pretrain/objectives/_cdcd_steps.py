"""What contrast is to buy: the same agreement of output and condition in fewer sampling steps.

A run with `cdcd` samples by the same procedures as one without; only the number of steps changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Sampler(Protocol):
    """What is needed of `pretrain.inference.Heads`."""

    def generate_tokens(
        self, tokens_BL: Tensor, mask_BL: Tensor, seeds: Sequence[int], steps: int | None
    ) -> Tensor:
        """Pictures for captions."""

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Their queries, unit rows."""

    def embed_tokens(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The captions' queries, unit rows."""


@dataclass(frozen=True)
class Agreement:
    """Of pictures generated in some number of steps with their captions.

    Attributes:
        cosine: of a picture's query with its caption's, mean.
        accuracy: share of pictures whose nearest caption is their own.
        spread: entropy of the pictures' coordinates as independent Gaussians, nats a coordinate;
            where agreement rises and this falls, the model may only have sharpened.
    """

    cosine: float
    accuracy: float
    spread: float


@torch.no_grad()
def agreement_by_steps(
    sampler: Sampler,
    tokens_BL: Tensor,
    mask_BL: Tensor,
    seeds: Sequence[int],
    steps: Sequence[int],
) -> dict[int, Agreement]:
    """Generate for the same captions and seeds in each number of steps, and compare."""
    text_BE, found = sampler.embed_tokens(tokens_BL, mask_BL), {}
    own = torch.arange(len(text_BE), device=text_BE.device)
    for n in steps:
        images = sampler.generate_tokens(tokens_BL, mask_BL, seeds, n)
        cosines = F.normalize(sampler.embed_images(images), dim=-1) @ text_BE.T
        variance = images.flatten(1).var(0).clamp(min=1e-8)
        spread = 0.5 * (2 * torch.pi * torch.e * variance).log().mean()
        right = (cosines.argmax(1) == own).float().mean()
        found[n] = Agreement(float(cosines.diagonal().mean()), float(right), float(spread))
    return found


def fewest_steps(quality: Mapping[int, float], target: float) -> int | None:
    """The least number of steps that reaches ``target``; None where none does."""
    return min((steps for steps, value in quality.items() if value >= target), default=None)
