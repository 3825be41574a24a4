"""CDCD (arXiv 2206.07771) on the continuous latents of the trunk: the image stream must denoise
worse for a wrong pair of picture and caption than for the right one.

The paper's setting, discrete diffusion over tokens, is `_cdcd_tokens.py`. Its loss per token is
here the stream's mean square error D = |F - F*|^2, Eq. 4 of DiffDis, for which the bound's KL
between Gaussians stands up to a factor of time:

=========  ===================================================  ==================================
negatives  ``mechanism: sample``                                ``mechanism: step``
=========  ===================================================  ==================================
inter      own z_t denoised for another's caption               own output against another's z_0
intra      own z_0 shuffled, noised, denoised for own caption   own output against own z_0 shuffled
=========  ===================================================  ==================================

``sample`` asks the trunk for one more pass over `count` times the batch; ``step`` for none: its
posterior mean is at the positive's z_t, as in the released code. What is learned is used by the
samplers as they are, with fewer steps (`_cdcd_steps.py`).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.model.diffdis import DiffDis
from pretrain.objectives import _cdcd_loss as loss
from pretrain.objectives.base import Context, Half, Objective, ObjectiveConfig
from pretrain.types import LossTerm


class Settings(ObjectiveConfig):
    """Attributes:
    contrast: w; with ``weight`` the whole weight of the negatives beside that of `generate`.
    mechanism, negatives: see the file's table.
    count: K, negatives a sample.
    chunks: into which a latent's positions are cut for intra-negatives (the paper: 8).
    gather: whether inter-negatives come from every rank's samples.
    bound: ``clamp`` (min(D, margin)), ``info_nce``, or ``none`` as published.
    margin: in units of D, in which 1 is the error of an eps-prediction that says 0.
    temperature: of InfoNCE, in the same units.
    """

    contrast: float = Field(0.01, gt=0)
    mechanism: Literal["sample", "step"] = "sample"
    negatives: Literal["inter", "intra"] = "inter"
    count: int = Field(1, ge=1, le=10)
    chunks: int = Field(8, ge=2)
    gather: bool = True
    bound: loss.Bound = "clamp"
    margin: float = Field(1.0, gt=0)
    temperature: float = Field(0.1, gt=0)

    @property
    def further_passes(self) -> int:
        """One, over all negatives, sample-wise; none step-wise."""
        return int(self.mechanism == "sample")

    @model_validator(mode="after")
    def _bearable(self) -> "Settings":
        loss.check_weight(self.weight * self.contrast, self.bound, "weight × contrast")
        return self


class Contrast(Objective):
    """-w mean_k min(D_k, margin), or w InfoNCE over D; weighed by 1 + t/T."""

    reads: ClassVar[frozenset[Half]] = frozenset({"generation"})

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, context: Context) -> LossTerm:
        s, noised, f = self.settings, context.noised, context.output.f_z_BCHW
        assert f is not None
        path = context.model.image_path
        target = path.f_target(noised.x0_z_BCHW, noised.z_t_BCHW, noised.t_z_B)
        positive_B = _error(f, target)
        # Of no caption no other is the wrong one. (An objective before this one may have appended
        # tokens to the condition; the caption's come first.)
        length = noised.null_c_BLD.shape[1]
        captioned_B = (noised.c_BLD[:, :length] != noised.null_c_BLD).flatten(1).any(1)
        if s.negatives == "inter":
            negative_BK, real_BK = self._inter(context, f)
        else:
            negative_BK, real_BK = self._intra(context, f)
        real_BK = real_BK & captioned_B[:, None]
        share = context.model.image_path.schedule.embed(noised.t_z_B)  # time in [0, 1000]
        weight_B = loss.time_weight(share, 1000.0)
        bounds = (s.bound, s.margin, s.temperature)
        term = loss.contrast(negative_BK, real_BK, positive_B, *bounds, weight_B)
        many = real_BK.sum().clamp(min=1)
        lost_BK = positive_B[:, None] >= negative_BK
        blind_B = positive_B > target.float().square().flatten(1).mean(1)
        metrics = {
            "positive": positive_B.mean(),
            "negative": (negative_BK * real_BK).sum() / many,
            "agreement": 1 - (lost_BK & real_BK).sum() / many,
            "bounded": ((negative_BK >= s.margin) & real_BK).sum() / many,
            # Share of samples whose error is over that of the output 0: the sign of divergence.
            "alarm": blind_B.float().mean(),
        }
        return LossTerm(s.contrast * term, metrics)

    def _inter(self, context: Context, f: Tensor) -> tuple[Tensor, Tensor]:
        s, noised, model = self.settings, context.noised, context.model
        u_B = context.rng.uniform("cdcd_others", f.device)
        positions = context.batch.positions_B.to(f.device)
        others = loss.others(positions, u_B, s.count, s.gather)
        # The same caption again is no negative.
        e_BE = noised.text.e_BE.float()
        same_BK = (others.of(e_BE) - e_BE.detach()[:, None]).abs().amax(-1) < 1e-5
        if s.mechanism == "step":
            target = _target(context, others.of(noised.x0_z_BCHW))
            return _errors(f, target), others.real_BK & ~same_BK
        c = others.of(noised.text.c_BLD).to(noised.c_BLD.dtype)
        own = noised.c_BLD[:, None, c.shape[2] :].expand(-1, s.count, -1, -1)
        f_k = _predict(model, _repeated(noised.z_t_BCHW, s.count), noised.t_z_B, c, own)
        target = _target(context, noised.x0_z_BCHW[:, None])
        return _errors(f_k, target.expand_as(f_k)), others.real_BK & ~same_BK

    def _intra(self, context: Context, f: Tensor) -> tuple[Tensor, Tensor]:
        s, noised, model = self.settings, context.noised, context.model
        x0, (_, _, height, width) = noised.x0_z_BCHW, noised.x0_z_BCHW.shape
        chunks = min(s.chunks, height * width)
        keys = context.rng.normal("cdcd_chunks", (s.count, chunks), f.device)
        rows = loss.shuffled(x0.flatten(2).transpose(1, 2), keys)  # (B, K, HW, C)
        x0_k = rows.transpose(2, 3).unflatten(3, (height, width))
        real = torch.ones(x0_k.shape[:2], dtype=torch.bool, device=f.device)
        if s.mechanism == "step":
            return _errors(f, _target(context, x0_k)), real
        t = noised.t_z_B.repeat_interleave(s.count)
        noise = _repeated(noised.noise_z_BCHW, s.count)
        z_k = model.image_path.noised(x0_k.flatten(0, 1), noise.flatten(0, 1), t)
        z_k = z_k.unflatten(0, x0_k.shape[:2])
        c = _repeated(noised.c_BLD, s.count)
        f_k = _predict(model, z_k, noised.t_z_B, c, c[:, :, :0])
        target = model.image_path.f_target(x0_k.flatten(0, 1), z_k.flatten(0, 1), t)
        return _errors(f_k, target.view_as(f_k)), real


def _repeated(x_B: Tensor, count: int) -> Tensor:
    """(B, K, ...), each sample K times."""
    return x_B[:, None].expand(-1, count, *(-1,) * (x_B.ndim - 1))


def _target(context: Context, x0_BKCHW: Tensor) -> Tensor:
    """The output F* that these clean latents would make right at the positive's z_t."""
    noised, (_, count) = context.noised, x0_BKCHW.shape[:2]
    z_t = _repeated(noised.z_t_BCHW, count).flatten(0, 1)
    t = noised.t_z_B.repeat_interleave(count)
    target = context.model.image_path.f_target(x0_BKCHW.flatten(0, 1), z_t, t)
    return target.view_as(x0_BKCHW)


def _predict(model: DiffDis, z_BKCHW: Tensor, t_B: Tensor, c: Tensor, more: Tensor) -> Tensor:
    """F of K wrong pairs a sample, in one pass of the trunk; (B, K, C, H, W)."""
    condition = torch.cat([c, more.to(c.dtype)], dim=2).flatten(0, 1)
    t = t_B.repeat_interleave(z_BKCHW.shape[1])
    return model.predict_image(z_BKCHW.flatten(0, 1), t, condition).view_as(z_BKCHW)


def _error(f: Tensor, target: Tensor) -> Tensor:
    """Mean square over a sample's coordinates, fp32, (B,)."""
    return (f.float() - target.float()).square().flatten(1).mean(1)


def _errors(f: Tensor, target_BKCHW: Tensor) -> Tensor:
    """The same for K targets each, (B, K); ``f`` is (B, ...) or (B, K, ...)."""
    f = f[:, None] if f.ndim < target_BKCHW.ndim else f
    return (f.float() - target_BKCHW.float()).square().flatten(2).mean(2)


def build(settings: ObjectiveConfig, model: DiffDis) -> Objective:
    """The objective."""
    assert isinstance(settings, Settings)
    return Contrast(settings)
