"""Embeddings of a labelled set, split over ranks: shared by zero-shot and retrieval."""

import torch
from torch import Tensor

from pretrain.evaluators.base import Subject, share, together


def embed_images(
    subject: Subject, images_NCHW: Tensor, seed: int, steps: int, noises: int, guidance: float
) -> Tensor:
    """Rows of ê_0 for all images, on every rank, on the CPU; each rank embeds its share."""
    mine = share(len(images_NCHW), subject.rank, subject.world)
    device = subject.heads.model.null_tokens_L.device
    rows: dict[int, Tensor] = {}
    left = False
    for start in range(0, len(mine), 64):
        left = subject.pulse()
        if left:
            break
        part = mine[start : start + 64]
        e = subject.heads.embed_images(
            images_NCHW[part].to(device), seed, steps, noises, guidance
        ).cpu()
        rows |= dict(zip(part, e, strict=True))
    found = {i: row for part in together(rows, left) for i, row in part.items()}
    return torch.stack([found[i] for i in range(len(images_NCHW))])


def embed_texts(subject: Subject, texts: list[str]) -> Tensor:
    """Queries e of texts, on every rank, on the CPU. Text is cheap: every rank embeds all."""
    device = subject.heads.model.null_tokens_L.device
    length = subject.heads.model.config.text_encoder.length
    rows = []
    for start in range(0, len(texts), 256):
        tokens, mask = subject.tokenizer.encode(texts[start : start + 256], length)
        rows.append(subject.heads.embed_tokens(tokens.to(device), mask.to(device)).cpu())
    return torch.cat(rows)
