"""Embeddings of an evaluation set, made once, by all ranks; shared by zero-shot and retrieval.

Images go in chunks: chunk i is rank i % world's. A chunk that is done is kept in the subject's
scratch folder, so an evaluation that was stopped goes on with it, on any number of ranks.
"""

import hashlib
import io
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pretrain import storage
from pretrain.data.evalset import EvalSet
from pretrain.errors import NonFiniteError
from pretrain.evaluators._sets import SetsConfig
from pretrain.evaluators.base import Subject, share, together

CHUNK = 64  # images embedded together
TEXTS = 256  # prompts embedded together


class EmbedConfig(SetsConfig):
    """Attributes:
    steps, noises, guidance: of the alignment chain; ê_0 is averaged over noises. (The network has
        no image embedding of its own: steps 1 and noises 1, one look from pure noise, is the
        cheapest that it trains.)
    seed: of its noises.
    examples: pictures in the details for a report, at most; 0 leaves them out.
    """

    steps: int = Field(4, ge=1)
    noises: int = Field(4, ge=1)
    guidance: float = Field(0.0, ge=0)
    seed: int = 0
    examples: int = Field(24, ge=0)


@dataclass(frozen=True)
class Embedded:
    """Attributes:
    rows_NE: ê_0 of every image, fp32 unit rows, on the CPU.
    seconds: of work on all ranks together (on one, of the clock), when they were made.
    passes: of the encoder for each image.
    """

    rows_NE: Tensor
    seconds: float
    passes: int

    @property
    def nbytes(self) -> int:
        """Of the rows."""
        return self.rows_NE.nbytes

    def cost(self, name: str) -> dict[str, float]:
        """Metrics of a set. Images per second are those of one rank."""
        seconds = max(self.seconds, 1e-9)
        return {
            f"cost/{name}/seconds": seconds,
            f"cost/{name}/images_per_second": len(self.rows_NE) / seconds,
            f"cost/{name}/passes_per_image": float(self.passes),
        }


def embed_images(subject: Subject, data: EvalSet, settings: EmbedConfig) -> Embedded:
    """ê_0 of all images, on every rank. Collective.

    Raises:
        Stopped: on every rank, if one was asked to stop.
        NonFiniteError: the model gives NaN or infinity.
    """
    s = settings
    # Smaller chunks for a small set that is not resumed: no rank is to stand by.
    even = -(-len(data) // subject.world)
    chunk = CHUNK if subject.scratch else min(CHUNK, max(1, even))
    what = (data.images_sha256, subject.data.size, s.steps, s.noises, s.guidance, s.seed, chunk)
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    found = subject.kept.get(key, lambda: _all_chunks(subject, data, s, chunk, key))
    bad = int((~found.rows_NE.isfinite().all(1)).sum())
    if bad:
        raise NonFiniteError(
            f"evaluation set {data.name!r}: {bad} of {len(data)} image embeddings are not finite; "
            "the weights have diverged, evaluate an earlier checkpoint"
        )
    return found


def _all_chunks(subject: Subject, data: EvalSet, s: EmbedConfig, chunk: int, key: str) -> Embedded:
    parts = [range(i, min(i + chunk, len(data))) for i in range(0, len(data), chunk)]
    width = subject.heads.model.config.text_encoder.query_dim
    folder = None
    if subject.scratch is not None:
        weights = subject.weights_sha256()
        folder = subject.scratch / "embeddings" / f"{key[:24]}-{weights[:24]}"
    mine: list[int] = []
    rows: list[Tensor] = []
    seconds, left = 0.0, False
    for number in share(len(parts), subject.rank, subject.world):
        left = subject.pulse()
        if left:
            break
        made = _chunk(subject, data, s, parts[number], width, folder and folder / f"{number}.npz")
        mine.append(number)
        rows.append(made[0])
        seconds += made[1]
    packed = torch.cat(rows) if rows else torch.empty(0, width)
    all_NE = torch.empty(len(data), width)
    total = 0.0
    for numbers, rows_nE, spent in together((mine, packed, seconds), left):
        at = [i for number in numbers for i in parts[number]]
        all_NE[at] = rows_nE
        total += spent
    return Embedded(all_NE, total, s.steps * s.noises * (2 if s.guidance > 0 else 1))


def _chunk(
    subject: Subject, data: EvalSet, s: EmbedConfig, part: range, width: int, path: Path | None
) -> tuple[Tensor, float]:
    """Rows of some images and the seconds they took, from ``path`` if they are there, else made and
    left there."""
    if path is not None:
        with suppress(OSError, ValueError, KeyError, BadZipFile):  # damaged: made anew
            held = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            if held["rows"].shape == (len(part), width):
                return torch.from_numpy(held["rows"]), float(held["seconds"])
    began = time.monotonic()
    images = data.images(part).to(subject.heads.model.null_tokens_L.device)
    rows = subject.heads.embed_images(images, s.seed, s.steps, s.noises, s.guidance).float().cpu()
    seconds = time.monotonic() - began
    if path is not None:
        stream = io.BytesIO()
        np.savez(stream, rows=rows.numpy(), seconds=np.float64(seconds))
        storage.write_bytes(str(path), stream.getvalue())
    return rows, seconds


def embed_texts(subject: Subject, texts: Sequence[str], each: int = 1) -> Tensor:
    """Queries e of texts, fp32 unit rows, on every rank, on the CPU. Collective.

    Args:
        each: so many texts in a row make one row, the normalised mean of their queries.

    Raises:
        Stopped: on every rank, if one was asked to stop.
        NonFiniteError: the model gives NaN or infinity.
    """
    texts = list(texts)
    what = f"{each}\n" + "\n".join(map(repr, texts))
    key = hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()
    rows = subject.kept.get(key, lambda: _all_texts(subject, texts, each))
    if not rows.isfinite().all():
        raise NonFiniteError(
            f"texts such as {texts[0]!r} have embeddings that are not finite; the weights have "
            "diverged, evaluate an earlier checkpoint"
        )
    return rows


def _all_texts(subject: Subject, texts: list[str], each: int) -> Tensor:
    device = subject.heads.model.null_tokens_L.device
    length = subject.heads.model.config.text_encoder.length
    piece = max(1, TEXTS // each) * each
    starts = range(0, len(texts), piece)
    made: dict[int, Tensor] = {}
    left = False
    for number in share(len(starts), subject.rank, subject.world):
        left = subject.pulse()
        if left:
            break
        start = starts[number]
        rows = []
        for at in range(start, min(start + piece, len(texts)), TEXTS):
            some = texts[at : min(at + TEXTS, start + piece)]
            tokens, mask = subject.tokenizer.encode(some, length)
            rows.append(subject.heads.embed_tokens(tokens.to(device), mask.to(device)).cpu())
        e = torch.cat(rows).float()
        if each > 1:
            e = F.normalize(e.view(-1, each, e.shape[1]).mean(1), dim=-1)
        made[number] = e
    found = {i: row for part in together(made, left) for i, row in part.items()}
    return torch.cat([found[i] for i in range(len(starts))])
