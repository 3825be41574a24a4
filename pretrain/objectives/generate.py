"""L_IG, image generation from text (DiffDis Eq. 4): the image stream denoises z_t given the
caption."""

from typing import ClassVar

import torch.nn.functional as F

from pretrain.model.diffdis import DiffDis
from pretrain.objectives.base import Context, Half, Objective, ObjectiveConfig
from pretrain.types import LossTerm


class Settings(ObjectiveConfig):
    """No field of its own; what is predicted is ``model.image_path``."""


class Generate(Objective):
    """Mean square error between the image stream's output and the one that would be right."""

    reads: ClassVar[frozenset[Half]] = frozenset({"generation"})

    def forward(self, context: Context) -> LossTerm:
        noised, f_z = context.noised, context.output.f_z_BCHW
        assert f_z is not None
        target = context.model.image_path.f_target(noised.x0_z_BCHW, noised.z_t_BCHW, noised.t_z_B)
        return LossTerm(F.mse_loss(f_z.float(), target.float()))


def build(settings: ObjectiveConfig, model: DiffDis) -> Objective:
    """The objective."""
    return Generate()
