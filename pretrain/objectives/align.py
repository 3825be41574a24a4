"""L_ITA, image–text alignment (DiffDis Eq. 8): ê_0, denoised from the image, must match its own
caption's query.

InfoNCE in both directions over the global batch. The learnable logit scale and the normalisation of
ê_0 are CLIP's; Eq. 8 as printed has neither, and on cosines in [-1, 1] it is nearly flat without a
scale.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain import comm
from pretrain.model.diffdis import DiffDis
from pretrain.objectives.base import Context, Half, Objective, ObjectiveConfig
from pretrain.types import LossTerm


class Settings(ObjectiveConfig):
    """Attributes:
    scale: initial logit scale, 1 / temperature.
    scale_max: the scale is clamped here (CLIP: 100).
    normalize: whether ê_0 is put on the unit sphere before the product.
    """

    scale: float = Field(1 / 0.07, gt=0)
    scale_max: float = Field(100.0, gt=0)
    normalize: bool = True


class LogitScale(nn.Module):
    """exp(s), clamped, as shape (1,); a leaf module, so that ZeRO-3 gathers s by its own hook."""

    def __init__(self, initial: float, largest: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(initial)))
        self.largest = largest

    def forward(self) -> Tensor:
        return self.log_scale.float().exp().clamp(max=self.largest)


class Align(Objective):
    """Symmetric InfoNCE between ê_0 of this rank's images and e of every rank's captions, and
    back."""

    reads: ClassVar[frozenset[Half]] = frozenset({"alignment"})

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.normalize = settings.normalize
        self.logit_scale = LogitScale(settings.scale, settings.scale_max)

    def forward(self, context: Context) -> LossTerm:
        e0_hat_BE, e_BE = context.output.e0_hat_BE, context.noised.text.e_BE.float()
        assert e0_hat_BE is not None
        e0_hat_BE = F.normalize(e0_hat_BE.float(), dim=-1) if self.normalize else e0_hat_BE.float()
        scale = self.logit_scale()
        # Rows of this rank against columns of all ranks; the gathered side carries gradient to its
        # owner.
        by_image = scale * e0_hat_BE @ comm.all_gather_with_grad(e_BE).T
        by_text = scale * e_BE @ comm.all_gather_with_grad(e0_hat_BE).T
        own = torch.arange(len(e_BE), device=e_BE.device) + comm.rank() * len(e_BE)
        loss = 0.5 * (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own))
        accuracy = (by_image.argmax(1) == own).float().mean()
        return LossTerm(loss, {"accuracy": accuracy, "logit_scale": scale.mean()})


def build(settings: ObjectiveConfig, model: DiffDis) -> Objective:
    """The objective."""
    assert isinstance(settings, Settings)
    return Align(settings)
