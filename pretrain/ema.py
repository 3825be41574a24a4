"""Moving averages of the weights, each rank's own part where it lies: no gather, no collective.

Averages are taken over samples, not steps, so that the batch size may change: a weight of ``half
life`` samples ago counts half of one of now.
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import Config


class EmaConfig(Config):
    """Moving averages of the weights that are kept beside them.

    Attributes:
        half_lives: in samples, one average each; none for none.
        use: the half life whose average evaluation, sampling and export take; null takes the
            weights themselves.
        ramp: early on the half life is at most this share of the samples seen, so that the random
            start is forgotten (Karras et al. 2022, EDM, app. F.2: 0.05).
    """

    half_lives: tuple[Annotated[int, Field(ge=1)], ...] = ()
    use: int | None = None
    ramp: float = Field(0.05, gt=0)

    @model_validator(mode="after")
    def _used_is_kept(self) -> "EmaConfig":
        if self.use is not None and self.use not in self.half_lives:
            raise ValueError(
                f"use={self.use} is not one of half_lives={list(self.half_lives)}; add it there, "
                "or set use: null"
            )
        return self


class Ema:
    """The averages of one rank's flat fp32 tensors.

    Args:
        flats: the weights; read at each `update`.
        config: which averages.
    """

    def __init__(self, flats: list[Tensor], config: EmaConfig) -> None:
        self._flats = flats
        self.config = config
        self.copies: dict[int, list[Tensor]] = {
            half_life: [flat.detach().clone() for flat in flats] for half_life in config.half_lives
        }

    @torch.no_grad()
    def update(self, samples: int, batch: int) -> None:
        """Take the weights in that a step of ``batch`` samples left, ``samples`` seen in all."""
        weights = [flat.detach() for flat in self._flats]
        for half_life, copies in self.copies.items():
            torch._foreach_lerp_(copies, weights, 1 - decay(self.config, half_life, samples, batch))

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at the weights of now."""
        for copies in self.copies.values():
            torch._foreach_copy_(copies, [flat.detach() for flat in self._flats])

    def tensors(self) -> dict[str, list[Tensor]]:
        """The averages by the name under which a checkpoint keeps them."""
        return {kind(half_life): copies for half_life, copies in self.copies.items()}


def decay(config: EmaConfig, half_life: int, samples: int, batch: int) -> float:
    """What a step of ``batch`` samples leaves of the average: 0.5 ** (batch / half life)."""
    return 0.5 ** (batch / min(half_life, max(config.ramp * samples, 1e-9)))


def kind(half_life: int) -> str:
    """Name of an average: ema-2000."""
    return f"ema-{half_life}"
