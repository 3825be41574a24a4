"""How good generated images are: their distance from a set's real pictures (KID, FID, precision and
recall), how well they show their prompts, and what they cost.

Prompts are the captions of the set's own pictures. How to read the numbers: docs/EVALUATION.md.
"""

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pretrain import distances, plugins, storage
from pretrain.data.evalset import EvalSet
from pretrain.data.loader import DataConfig
from pretrain.diffusion.sampler import Method
from pretrain.errors import ConfigError, DataError, NonFiniteError
from pretrain.evaluators._embed import embed_texts
from pretrain.evaluators._generated import Drawing, Rows, generate
from pretrain.evaluators._reals import real_features
from pretrain.evaluators._sets import SetsConfig, details_of, open_sets
from pretrain.evaluators.base import Evaluator, EvaluatorConfig, Result, Subject
from pretrain.features import base as features
from pretrain.features.base import Extractor, FeaturesConfig, from_uint8
from pretrain.inference import Predictor, to_pil
from pretrain.rng import generator

WHERE = "evaluators.generation"
LARGEST_SUBSET = 1000  # of KID, as published figures have it


class Settings(SetsConfig):
    """Attributes:
    images: generated for each set, each for a picture's first caption, or its class name.
    sampler, steps, guidance: of the sampler; None takes the run's ``inference`` settings.
    seed: of the first image (image i has seed + i), of the choice of prompts, and of KID's subsets.
    features: the extractor.
    judge: folder of an exported model (`export`) that tells how well images show their prompts,
        beside the evaluated model itself.
    kid_subsets: random subsets over which KID is averaged.
    kid_subset_size: images of a subset; None takes half of the smaller side, at most 1,000.
    neighbours: k of precision and recall.
    chunk: images drawn at a time; finished chunks survive a stop.
    examples: images in the report, over all sets.
    """

    images: int = Field(1000, ge=2)
    sampler: Method | None = None
    steps: int | None = Field(None, ge=1)
    guidance: float | None = Field(None, ge=0)
    seed: int = 0
    features: FeaturesConfig = FeaturesConfig()
    judge: str | None = None
    kid_subsets: int = Field(100, ge=1)
    kid_subset_size: int | None = Field(None, ge=2)
    neighbours: int = Field(3, ge=1)
    chunk: int = Field(32, ge=1)
    examples: int = Field(64, ge=0)


class Generation:
    """See the module."""

    def __init__(self, settings: Settings) -> None:
        s = settings
        s.need_sets("generation")
        if s.images <= s.neighbours:
            raise ConfigError(
                f"{WHERE}.images={s.images}: precision and recall over neighbours={s.neighbours} "
                f"need at least {s.neighbours + 1} images"
            )
        if s.kid_subset_size is not None and s.kid_subset_size > s.images:
            raise ConfigError(
                f"{WHERE}.kid_subset_size={s.kid_subset_size} is more than images={s.images}; "
                "lower it, or generate more"
            )
        plugins.load(features.PACKAGE, s.features.kind, f"{WHERE}.features.kind")
        self.settings = s

    def check(self, data: DataConfig, beat: Callable[[], object]) -> None:
        self._open(data, beat)
        features.build(self.settings.features)

    def _open(self, data: DataConfig, beat: Callable[[], object]) -> dict[str, EvalSet]:
        s = self.settings
        if s.judge is not None and not Path(s.judge, "config.json").is_file():
            raise ConfigError(
                f"{WHERE}.judge={s.judge!r} is not an exported model; make one with `export`"
            )
        sets = open_sets(s.sets, data, beat)
        for name, found in sets.items():
            self._check(name, len(found))
        return sets

    def run(self, subject: Subject) -> Result:
        s = self.settings
        sets = self._open(subject.data, subject.pulse)
        device = subject.heads.model.null_tokens_L.device
        extractor = features.build(s.features, device)
        judge = Predictor.load(s.judge) if s.judge else None
        if judge:
            judge.model.to(device)
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name, data in sets.items():
            real = real_features(subject, data, extractor)
            distances.check(real, real)  # before the long part
            order = torch.randperm(len(data), generator=generator(s.seed, "prompts")).tolist()
            pictures = [order[i % len(order)] for i in range(s.images)]
            drawing = self._drawing(subject, tuple(data.captions[p][0] for p in pictures))
            own = "alignment" in subject.task.halves  # an untrained head has nothing to say
            rows = generate(
                subject,
                drawing,
                extractor,
                own,
                judge,
                self._folder(subject, drawing, extractor, own),
                s.examples // len(sets),
            )
            metrics |= self._distances(name, real, rows.features)
            metrics |= _agreement(f"generation/{name}/agreement", subject, judge, drawing, rows)
            metrics |= _cost(name, rows.cost, s.images)
            if subject.rank == 0:
                notes = _notes(name, real, rows.features)
                for note in notes:
                    print(f"[generation] {note}", file=sys.stderr, flush=True)
                details[name] = {
                    "samples": _samples(drawing, rows, data, pictures),
                    "notes": notes,
                }
        return Result(metrics, details=details_of(subject, details))

    def _check(self, name: str, pictures: int) -> None:
        s = self.settings
        if pictures <= s.neighbours:
            raise DataError(
                f"{WHERE}.sets.{name}: {pictures} real pictures are too few for neighbours="
                f"{s.neighbours} of precision and recall; take a larger set"
            )
        if s.kid_subset_size is not None and s.kid_subset_size > pictures:
            raise ConfigError(
                f"{WHERE}.kid_subset_size={s.kid_subset_size} is more than the {pictures} real "
                f"pictures of set {name!r}; lower it"
            )

    def _drawing(self, subject: Subject, prompts: tuple[str, ...]) -> Drawing:
        s, default = self.settings, subject.heads.config
        return Drawing(
            prompts,
            s.seed,
            s.sampler or default.sampler,
            s.steps or default.steps,
            default.guidance if s.guidance is None else s.guidance,
            s.chunk,
        )

    def _folder(
        self, subject: Subject, drawing: Drawing, extractor: Extractor, own: bool
    ) -> Path | None:
        """Of the chunks of this very drawing, as measured by these very networks."""
        if subject.scratch is None:
            return None
        judge = self.settings.judge
        what = {
            "drawing": vars(drawing),
            "inference": subject.heads.config.model_dump(mode="json"),
            "weights": subject.weights_sha256(),
            "features": extractor.fingerprint,
            "own": own,
            "judge": judge and storage.sha256(str(Path(judge, "model.safetensors"))),
        }
        key = storage.sha256_bytes(json.dumps(what, sort_keys=True).encode())
        return subject.scratch / f"generation-{key[:24]}"

    def _distances(self, name: str, real: Tensor, made: Tensor) -> dict[str, float]:
        s = self.settings
        size = s.kid_subset_size or max(2, min(LARGEST_SUBSET, len(real) // 2, len(made) // 2))
        mean, deviation = distances.kid(real, made, size, s.kid_subsets, s.seed)
        precision, recall = distances.precision_recall(real, made, s.neighbours)
        found = {
            "kid": mean,
            "kid_std": deviation,
            "fid": distances.fid(real, made),
            "precision": precision,
            "recall": recall,
        }
        return {f"generation/{name}/{key}": value for key, value in found.items()}


def agreement(images_NE: Tensor, texts_KE: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Mean cosine of each image and its own prompt, and the share of images whose own prompt has
    the highest of all; ties count against the image.

    Args:
        images_NE: any length.
        texts_KE: distinct prompts, any length.
        labels_N: of each image's own prompt.
    """
    cosines = F.normalize(images_NE.double(), dim=-1) @ F.normalize(texts_KE.double(), dim=-1).T
    truth = cosines.gather(1, labels_N[:, None])
    better = (~(cosines < truth)).sum(1) - 1  # so put, NaN counts against the image too
    return float(truth.mean()), float((better < 1).double().mean())


def _agreement(
    prefix: str, subject: Subject, judge: Predictor | None, drawing: Drawing, rows: Rows
) -> dict[str, float]:
    distinct = sorted(set(drawing.prompts))
    number = {prompt: k for k, prompt in enumerate(distinct)}
    labels = torch.tensor([number[p] for p in drawing.prompts])
    found: dict[str, float] = {}
    for who, embeddings in (("the model's own head", rows.own), ("judge", rows.judged)):
        bad = int((~embeddings.isfinite().all(1)).sum())
        if bad:
            raise NonFiniteError(
                f"{prefix}: embeddings by {who} of {bad} of {len(embeddings)} generated images are "
                "not finite; its weights have diverged, take an earlier checkpoint"
            )
    if rows.own.shape[1]:
        mean, top1 = agreement(rows.own, embed_texts(subject, distinct), labels)
        found |= {prefix: mean, f"{prefix}_top1": top1}
    if judge:
        texts = torch.from_numpy(judge.embed_text(distinct))
        mean, top1 = agreement(rows.judged, texts, labels)
        found |= {f"{prefix}_independent": mean, f"{prefix}_independent_top1": top1}
    return found


def _cost(name: str, cost: Tensor, images: int) -> dict[str, float]:
    seconds, passes = cost.tolist()
    return {
        f"cost/{name}/seconds": seconds,
        f"cost/{name}/images_per_second": images / max(seconds, 1e-9),
        f"cost/{name}/passes_per_image": passes / images,
    }


def _notes(name: str, real: Tensor, made: Tensor) -> list[str]:
    n, width = min(len(real), len(made)), real.shape[1]
    if n > width and n >= distances.FEW:
        return []
    fewer = f", fewer than the {width} features" if n <= width else ""
    return [
        f"{name}: FID of {len(made)} generated and {len(real)} real images{fewer}: it is biased "
        "upwards and compares only with FID of as many images; prefer KID"
    ]


def _samples(
    drawing: Drawing, rows: Rows, data: EvalSet, pictures: list[int]
) -> list[dict[str, Any]]:
    """Generated images and, beside each, the real picture whose caption it was drawn for."""
    shown = from_uint8(rows.pixels)
    beside = data.images(pictures[: len(shown)]) if len(shown) else shown
    return [
        {
            "prompt": drawing.prompts[i],
            "seed": drawing.seed + i,
            "png": _png(image),
            "real": _png(real),
        }
        for i, (image, real) in enumerate(zip(shown, beside, strict=True))
    ]


def _png(image_CHW: Tensor) -> str:
    stream = io.BytesIO()
    to_pil(image_CHW).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def build(settings: EvaluatorConfig) -> Evaluator:
    """The evaluator."""
    assert isinstance(settings, Settings)
    return Generation(settings)
