"""What crosses module boundaries: small frozen dataclasses, never dicts of tensors.

Shape legend: B samples of a rank's micro-batch, C/H/W latent channels, height and width, L tokens,
D width of the text condition, E width of the global text query.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Reject:
    """A sample that was refused: by what reason, in which shard, under which key."""

    reason: str
    shard: str
    key: str


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one micro-step.

    Attributes:
        images_BCHW: uint8 pixels, 3 channels, as decoded: a quarter of the bytes on the way from
            the workers to the device. Tests may give fp32 in [-1, 1].
        tokens_BL: int64 token ids, padded to L.
        mask_BL: bool, True at real tokens (the end token included).
        positions_B: int64 global sample numbers; they seed every draw for the sample.
        keys: the samples' names, in order.
        captions: the texts that were tokenised, in order.
        rejects: samples refused while this batch was filled; counted, never silent.
        latents_BCHW: of encoded data, as stored; the pictures are then of no pixel, (B, 3, 0, 0).
        text: of encoded text, the captions' features as stored.
    """

    images_BCHW: Tensor
    tokens_BL: Tensor
    mask_BL: Tensor
    positions_B: Tensor
    keys: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    rejects: tuple[Reject, ...] = ()
    latents_BCHW: Tensor | None = None
    text: "TextFeatures | None" = None

    def __len__(self) -> int:
        return int(self.positions_B.shape[0])

    @property
    def pixels_BCHW(self) -> Tensor:
        """What the autoencoder takes: fp32 in [-1, 1], on the batch's device."""
        x = self.images_BCHW
        return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | TextFeatures)
        }
        return dataclasses.replace(self, **moved)

    def split(self, parts: int) -> list[Self]:
        """``parts`` equal micro-batches in order; rejects stay with the first.

        Raises:
            ValueError: the batch does not divide.
        """
        size, rest = divmod(len(self), parts)
        if rest:
            raise ValueError(f"a batch of {len(self)} does not divide into {parts} micro-batches")
        slices = [slice(i * size, (i + 1) * size) for i in range(parts)]
        return [
            dataclasses.replace(
                self,
                images_BCHW=self.images_BCHW[s],
                tokens_BL=self.tokens_BL[s],
                mask_BL=self.mask_BL[s],
                positions_B=self.positions_B[s],
                keys=self.keys[s],
                captions=self.captions[s],
                rejects=self.rejects if i == 0 else (),
                latents_BCHW=None if self.latents_BCHW is None else self.latents_BCHW[s],
                text=None if self.text is None else self.text.part(s),
            )
            for i, s in enumerate(slices)
        ]


@dataclass(frozen=True)
class TextFeatures:
    """What a text encoder gives.

    Attributes:
        c_BLD: the token-wise condition that cross-attention reads.
        e_BE: the global text query, L2-normalised.
    """

    c_BLD: Tensor
    e_BE: Tensor

    def part(self, rows: slice) -> Self:
        """Of some of the samples."""
        return dataclasses.replace(self, c_BLD=self.c_BLD[rows], e_BE=self.e_BE[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same features on ``device``."""
        return dataclasses.replace(
            self,
            c_BLD=self.c_BLD.to(device, non_blocking=non_blocking),
            e_BE=self.e_BE.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class Noised:
    """The inputs of the two halves of a trunk pass, and what noised them.

    Attributes:
        z_BCHW: clean latents, as the alignment half sees them (zero where the image is dropped).
        x0_z_BCHW: clean latents, the target of the generation half.
        z_t_BCHW: noisy latents of the generation half, alpha z + sigma eps.
        noise_z_BCHW: eps of the image stream.
        t_z_B: image time, in the image path's unit.
        text: features of the captions (e is the clean query e_0).
        c_BLD: the generation half's condition, with captions dropped for guidance.
        null_c_BLD: the null prompt's condition, for the alignment half.
        e_t_BE: noisy text query of the alignment half.
        noise_e_BE: eps of the text stream.
        t_e_B: text time, in the text path's unit.
        extras: what an objective's `condition` leaves for its own term, one dataclass each.
    """

    z_BCHW: Tensor
    x0_z_BCHW: Tensor
    z_t_BCHW: Tensor
    noise_z_BCHW: Tensor
    t_z_B: Tensor
    text: TextFeatures
    c_BLD: Tensor
    null_c_BLD: Tensor
    e_t_BE: Tensor
    noise_e_BE: Tensor
    t_e_B: Tensor
    extras: tuple[object, ...] = ()

    def extra(self, kind: type[T]) -> T:
        """The one of ``extras`` that is a ``kind``."""
        (found,) = (extra for extra in self.extras if isinstance(extra, kind))
        return found


@dataclass(frozen=True)
class ModelOutput:
    """What the two streams predict.

    Attributes:
        f_z_BCHW: the image stream's raw output F (what it stands for is the parametrisation's
            business); None where no objective reads the generation half.
        e0_hat_BE: the estimate of the clean query e_0 that the text stream's output stands for,
            not normalised; None where no objective reads the alignment half.
        token_BW: the alignment head's final text token, from which ê_0 is read; of the weights'
            type, W its width; None as ê_0.
    """

    f_z_BCHW: Tensor | None
    e0_hat_BE: Tensor | None
    token_BW: Tensor | None = None


@dataclass(frozen=True)
class LossTerm:
    """An objective's value.

    Attributes:
        loss: fp32 scalar whose mean over ranks is the global mean.
        metrics: named detached scalars for the log.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOutput:
    """The weighted sum that is differentiated, and every term's metrics as ``objective/name``."""

    loss: Tensor
    metrics: dict[str, Tensor]

    @classmethod
    def weighted(cls, terms: dict[str, LossTerm], weights: dict[str, float]) -> Self:
        """Sum of weight × loss; metrics get their objective's name as prefix."""
        total = torch.stack([weights[name] * term.loss for name, term in terms.items()]).sum()
        metrics = {f"{name}/loss": term.loss.detach() for name, term in terms.items()}
        for name, term in terms.items():
            metrics |= {f"{name}/{key}": value.detach() for key, value in term.metrics.items()}
        return cls(total, {"loss": total.detach(), **metrics})
