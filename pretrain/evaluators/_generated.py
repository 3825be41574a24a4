"""Generated images in chunks over the ranks, with what is measured on each; a chunk that is done is
kept, so that a stopped evaluation goes on.

Image i is drawn from seed + i, and chunk k holds the same images on any number of ranks, drawn in
one batch: results do not depend on the ranks, to the last bit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from pretrain import storage
from pretrain.diffusion.sampler import Method
from pretrain.errors import NonFiniteError
from pretrain.evaluators.base import Subject, share, together
from pretrain.features.base import Extractor, from_uint8, to_uint8
from pretrain.inference import Predictor, to_pil

FEATURE_BATCH = 8  # larger ones are slower on a CPU: they leave its cache


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    Attributes:
        prompts: of image 0, 1, ...
        seed: of image 0.
        sampler, steps, guidance: of each.
        chunk: images drawn at a time.
    """

    prompts: tuple[str, ...]
    seed: int
    sampler: Method
    steps: int
    guidance: float
    chunk: int


@dataclass(frozen=True)
class Rows:
    """What is kept of n images.

    Attributes:
        pixels: uint8 (n, 3, H, W); of no image but the first few once chunks are joined.
        features: (n, D) of the extractor.
        own: ê_0 (n, E) by the model's own discriminative head; E = 0 if it has none.
        judged: (n, E) by another model's; E = 0 without one.
        cost: float64 (2,): seconds of drawing on one rank, samples put through the network.
    """

    pixels: Tensor
    features: Tensor
    own: Tensor
    judged: Tensor
    cost: Tensor


def generate(
    subject: Subject,
    drawing: Drawing,
    extractor: Extractor,
    own: bool,
    judge: Predictor | None,
    folder: Path | None,
    examples: int,
) -> Rows:
    """Rows of all images in order, on every rank. Collective.

    Args:
        own: whether the model's own head embeds the images.
        folder: where finished chunks are kept, seen by all ranks; None keeps none. It must belong
            to this model, drawing, extractor and judge.
        examples: the pixels of so many images are returned.

    Raises:
        Stopped: on every rank, if one was to stop; finished chunks are kept.
        NonFiniteError: on every rank, if the model draws NaN.
    """
    starts = range(0, len(drawing.prompts), drawing.chunk)
    mine = share(len(starts), subject.rank, subject.world)
    found: dict[int, Rows] = {}
    bad: list[int] = []
    left = False
    for k in mine:
        numbers = range(starts[k], min(starts[k] + drawing.chunk, len(drawing.prompts)))
        path = folder / f"{k:06d}.safetensors" if folder else None
        rows = _read(path) if path else None
        if rows is None:
            left = subject.pulse()
            if left:
                break
            pixels, bad, cost = _draw(subject, drawing, numbers)
            if bad:
                break
            rows = _measured(subject, pixels, cost, extractor, own, judge)
            if path:
                _write(path, rows)
        keep = max(0, min(len(numbers), examples - numbers[0]))
        found[k] = Rows(rows.pixels[:keep], rows.features, rows.own, rows.judged, rows.cost)
    parts = together((found, bad), left)
    wrong = sorted(i for _, numbers_ in parts for i in numbers_)
    if wrong:
        raise NonFiniteError(
            f"generated image {wrong[0]} (seed {drawing.seed + wrong[0]}, prompt "
            f"{drawing.prompts[wrong[0]]!r}) is not finite; the weights have diverged, or "
            f"guidance={drawing.guidance:g} is too much for them"
        )
    chunks = {k: rows for rows_of, _ in parts for k, rows in rows_of.items()}
    return _joined([chunks[k] for k in range(len(starts))])


def in_rows(images_NCHW: Tensor, call: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """``call`` on a few images at a time; its rows, on the CPU."""
    parts = [call(part.to(device)).float().cpu() for part in images_NCHW.split(FEATURE_BATCH)]
    return torch.cat(parts)


def _draw(
    subject: Subject, drawing: Drawing, numbers: Sequence[int]
) -> tuple[Tensor, list[int], Tensor]:
    """(pixels, numbers of images that are not finite, cost) of a chunk."""
    model = subject.heads.model
    device = model.null_tokens_L.device
    passes = 0

    def count(_: object, inputs: tuple[Tensor, ...]) -> None:
        nonlocal passes
        passes += len(inputs[0])

    prompts = [drawing.prompts[i] for i in numbers]
    tokens, mask = subject.tokenizer.encode(prompts, model.config.text_encoder.length)
    hook = model.trunk.unet.conv_in.register_forward_pre_hook(count)  # once a pass
    began = time.monotonic()
    try:
        images = subject.heads.generate_tokens(
            tokens.to(device),
            mask.to(device),
            [drawing.seed + i for i in numbers],
            drawing.steps,
            drawing.guidance,
            drawing.sampler,
        ).cpu()
    finally:
        hook.remove()
    cost = torch.tensor([time.monotonic() - began, passes], dtype=torch.float64)
    finite = images.isfinite().flatten(1).all(1)
    bad = [i for i, fine in zip(numbers, finite.tolist(), strict=True) if not fine]
    return to_uint8(images), bad, cost


def _measured(
    subject: Subject,
    pixels: Tensor,
    cost: Tensor,
    extractor: Extractor,
    own: bool,
    judge: Predictor | None,
) -> Rows:
    # What is measured is what a PNG would hold, so that kept pixels give the same numbers.
    images, n = from_uint8(pixels), len(pixels)
    device = subject.heads.model.null_tokens_L.device
    empty = torch.zeros(n, 0)
    return Rows(
        pixels,
        in_rows(images, extractor, device),
        subject.heads.embed_images(images.to(device)).float().cpu() if own else empty,
        torch.from_numpy(judge.embed_image([to_pil(x) for x in images])) if judge else empty,
        cost,
    )


def _read(path: Path) -> Rows | None:
    """What was kept there; None where nothing was, or it is damaged: it is made anew."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return Rows(**load(path.read_bytes()))
    except (OSError, SafetensorError, TypeError):
        return None


def _write(path: Path, rows: Rows) -> None:
    from safetensors.torch import save

    tensors = {f.name: getattr(rows, f.name).contiguous() for f in fields(rows)}
    storage.write_bytes(str(path), save(tensors))


def _joined(chunks: Sequence[Rows]) -> Rows:
    return Rows(
        torch.cat([c.pixels for c in chunks]),
        torch.cat([c.features for c in chunks]),
        torch.cat([c.own for c in chunks]),
        torch.cat([c.judged for c in chunks]),
        torch.stack([c.cost for c in chunks]).sum(0),
    )
