"""Plain denoising of the text query: the mean square error of ê_0, in place of contrast (an
ablation)."""

from typing import ClassVar

from pydantic import Field

from pretrain.model.diffdis import DiffDis
from pretrain.objectives.base import Context, Half, Objective, ObjectiveConfig
from pretrain.types import LossTerm


class Settings(ObjectiveConfig):
    """Off unless a config gives it a weight."""

    weight: float = Field(0.0, ge=0)


class DenoiseText(Objective):
    """|ê_0 - e_0|^2, summed over the query's coordinates (e_0 has unit norm), averaged over
    samples.

    e_0 is a fixed target: with a text encoder in training the loss could otherwise be had by
        collapse.
    """

    reads: ClassVar[frozenset[Half]] = frozenset({"alignment"})

    def forward(self, context: Context) -> LossTerm:
        e0_hat_BE, e_BE = context.output.e0_hat_BE, context.noised.text.e_BE
        assert e0_hat_BE is not None
        return LossTerm((e0_hat_BE.float() - e_BE.detach().float()).square().sum(-1).mean())


def build(settings: ObjectiveConfig, model: DiffDis) -> Objective:
    """The objective."""
    return DenoiseText()
