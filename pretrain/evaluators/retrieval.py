"""Image-to-text and text-to-image retrieval by the cosine of ê_0 (image) and e (caption)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pretrain.data.evalset import EvalSet
from pretrain.data.loader import DataConfig
from pretrain.errors import DataError
from pretrain.evaluators._embed import EmbedConfig, embed_images, embed_texts
from pretrain.evaluators._examples import thumbnails
from pretrain.evaluators._metrics import ranks_of_best, recall
from pretrain.evaluators._sets import details_of, open_sets
from pretrain.evaluators.base import Evaluator, EvaluatorConfig, Result, Subject
from pretrain.rng import generator

FOUND = 5  # shown of each example


class Settings(EmbedConfig):
    """Attributes:
    ks: the K of recall at K.
    chunk: queries whose similarities are held at once, 11 bytes each for every item of the gallery.
    """

    ks: tuple[int, ...] = (1, 5, 10)
    chunk: int = Field(256, ge=1)


class Texts(NamedTuple):
    """What is retrieved. Of a set of captions each text belongs to its one image; of a set of
    classes the texts are the class names, and images of one class share theirs.

    Attributes:
        texts: captions or class names.
        group_T, group_N: int64; a text and an image belong together where these are equal.
    """

    texts: list[str]
    group_T: Tensor
    group_N: Tensor


def texts_of(data: EvalSet) -> Texts:
    """The texts of a set.

    Raises:
        DataError: there is one text alone.
    """
    if data.task == "classification":
        found = Texts(list(data.classes), torch.arange(len(data.classes)), data.labels_N)
    else:
        owners = [i for i, captions in enumerate(data.captions) for _ in captions]
        texts = [caption for captions in data.captions for caption in captions]
        found = Texts(texts, torch.tensor(owners), torch.arange(len(data)))
    if len(found.texts) < 2:
        raise DataError(
            f"evaluation set {data.name!r} has one text, {found.texts[0]!r}: every answer would be "
            "right; retrieval needs two at least"
        )
    return found


class Retrieval:
    """R@K both ways."""

    def __init__(self, settings: Settings) -> None:
        settings.need_sets("retrieval")
        self.settings = settings

    def check(self, data: DataConfig, beat: Callable[[], object]) -> None:
        for found in open_sets(self.settings.sets, data, beat).values():
            texts_of(found)

    def run(self, subject: Subject) -> Result:
        s = self.settings
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name, data in open_sets(s.sets, subject.data, subject.pulse).items():
            texts = texts_of(data)
            embedded = embed_images(subject, data, s)
            e_TE = embed_texts(subject, texts.texts)
            to_text = ranks_of_best(embedded.rows_NE, e_TE, texts.group_N, texts.group_T, s.chunk)
            to_image = ranks_of_best(e_TE, embedded.rows_NE, texts.group_T, texts.group_N, s.chunk)
            for k in s.ks:
                metrics[f"retrieval/{name}/image_to_text_r{k}"] = recall(to_text, k)
                metrics[f"retrieval/{name}/text_to_image_r{k}"] = recall(to_image, k)
            metrics |= embedded.cost(name)
            if subject.rank == 0:
                details[name] = {"examples": self._examples(data, texts, embedded.rows_NE, e_TE)}
        return Result(metrics, details=details_of(subject, details))

    def _examples(
        self, data: EvalSet, texts: Texts, rows_NE: Tensor, e_TE: Tensor
    ) -> list[dict[str, Any]]:
        """As many texts as images, drawn by the seed, each with the best that was found for it."""
        half = self.settings.examples // 2
        draw = generator(self.settings.seed, "examples")
        some_texts = torch.randperm(len(texts.texts), generator=draw)[:half]
        some_images = torch.randperm(len(data), generator=draw)[:half]
        if not half:
            return []
        images = (e_TE[some_texts] @ rows_NE.T).topk(min(FOUND, len(data)), dim=1)
        captions = (rows_NE[some_images] @ e_TE.T).topk(min(FOUND, len(texts.texts)), dim=1)
        truths = {
            t: (texts.group_N == texts.group_T[t]).nonzero()[:FOUND, 0].tolist()
            for t in some_texts.tolist()
        }
        shown = [*images.indices.flatten().tolist(), *some_images.tolist()]
        png = thumbnails(data, shown)
        found: list[dict[str, Any]] = []
        for t, best, scores in zip(
            some_texts.tolist(), images.indices.tolist(), images.values.tolist(), strict=True
        ):
            right = [bool(texts.group_N[i] == texts.group_T[t]) for i in best]
            found.append(
                {
                    "query": texts.texts[t],
                    "kind": "text",
                    "truth": [data.keys[i] for i in truths[t]],
                    "found": [
                        {"caption": data.captions[i][0], "png": png[i], "right": r, "score": v}
                        for i, r, v in zip(best, right, scores, strict=True)
                    ],
                }
            )
        for i, best, scores in zip(
            some_images.tolist(), captions.indices.tolist(), captions.values.tolist(), strict=True
        ):
            right = [bool(texts.group_T[t] == texts.group_N[i]) for t in best]
            found.append(
                {
                    "query": png[i],
                    "kind": "image",
                    "truth": list(data.captions[i]),
                    "found": [
                        {"caption": texts.texts[t], "png": None, "right": r, "score": v}
                        for t, r, v in zip(best, right, scores, strict=True)
                    ],
                }
            )
        return found


def build(settings: EvaluatorConfig) -> Evaluator:
    """The evaluator."""
    assert isinstance(settings, Settings)
    return Retrieval(settings)
