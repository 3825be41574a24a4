"""Image-to-text and text-to-image retrieval by the cosine of ê_0 (image) and e (caption)."""

import torch
from pydantic import Field
from torch import Tensor

from pretrain.data.evalset import load_labelled
from pretrain.errors import ConfigError
from pretrain.evaluators._embed import embed_images, embed_texts
from pretrain.evaluators.base import Evaluator, EvaluatorConfig, Result, Subject


class Settings(EvaluatorConfig):
    """Attributes:
    sets: name of each labelled set and its manifest.
    ks: the K of recall at K.
    steps, noises, guidance, seed: of the alignment chain.
    """

    sets: dict[str, str] = Field(default_factory=dict)
    ks: tuple[int, ...] = (1, 10)
    steps: int = Field(4, ge=1)
    noises: int = Field(4, ge=1)
    guidance: float = Field(0.0, ge=0)
    seed: int = 0


def recall_at(scores_QG: Tensor, relevant_QG: Tensor, k: int) -> float:
    """Share of queries with a relevant item among the ``k`` best. Ties count against the model.

    Args:
        scores_QG: similarity of each query to each gallery item.
        relevant_QG: bool, True where the item answers the query; each query has one at least.
    """
    best = scores_QG.masked_fill(~relevant_QG, float("-inf")).max(1, keepdim=True).values
    better = (~(scores_QG < best) & ~relevant_QG).sum(1)  # so put, NaN counts against it too
    return (better < k).float().mean().item()


class Retrieval:
    """R@K both ways. Captions are the distinct class names, so pictures of one concept share a
    caption."""

    def __init__(self, settings: Settings) -> None:
        if not settings.sets:
            raise ConfigError(
                "evaluators.retrieval.sets={}: name at least one set, as {name: manifest.json}"
            )
        self.settings = settings

    def run(self, subject: Subject) -> Result:
        s = self.settings
        metrics: dict[str, float] = {}
        for name, manifest in s.sets.items():
            data = load_labelled(manifest, subject.data)
            e0_hat = embed_images(subject, data.images_NCHW, s.seed, s.steps, s.noises, s.guidance)
            scores = e0_hat @ embed_texts(subject, list(data.classes)).T
            relevant = data.labels_N[:, None] == torch.arange(len(data.classes))
            for k in s.ks:
                metrics[f"retrieval/{name}/image_to_text_r{k}"] = recall_at(scores, relevant, k)
                metrics[f"retrieval/{name}/text_to_image_r{k}"] = recall_at(scores.T, relevant.T, k)
        return Result(metrics)


def build(settings: EvaluatorConfig) -> Evaluator:
    """The evaluator."""
    assert isinstance(settings, Settings)
    return Retrieval(settings)
