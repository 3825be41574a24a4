"""Zero-shot classification by denoising the text query given the image (DiffDis Alg. 3)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pretrain.data.evalset import load_labelled
from pretrain.errors import ConfigError
from pretrain.evaluators._embed import embed_images, embed_texts
from pretrain.evaluators.base import Evaluator, EvaluatorConfig, Result, Subject
from pretrain.rng import generator


class Settings(EvaluatorConfig):
    """Attributes:
    sets: name of each labelled set and its manifest.
    templates: class prompts; ``{}`` stands for the class name.
    steps, noises, guidance: of the alignment chain.
    seed: of its noises.
    shuffle_images: leak test: images are exchanged among samples, and accuracy must fall to chance.
    """

    sets: dict[str, str] = Field(default_factory=dict)
    templates: tuple[str, ...] = ("{}",)
    steps: int = Field(4, ge=1)
    noises: int = Field(4, ge=1)
    guidance: float = Field(0.0, ge=0)
    seed: int = 0
    shuffle_images: bool = False


def ranks_of_truth(e0_hat_NE: Tensor, classes_KE: Tensor, labels_N: Tensor) -> Tensor:
    """How many classes score above the true one, (N,) int64; 0 is a top-1 hit. Ties count against
    the model."""
    scores = e0_hat_NE @ classes_KE.T
    truth = scores.gather(1, labels_N[:, None])
    return (~(scores < truth)).sum(1) - 1  # so put, NaN counts against the model too


class ZeroShot:
    """Top-1 and top-5 over each set's own classes, with chance beside them."""

    def __init__(self, settings: Settings) -> None:
        if not settings.sets:
            raise ConfigError(
                "evaluators.zero_shot.sets={}: name at least one set, as {name: manifest.json}"
            )
        self.settings = settings

    def run(self, subject: Subject) -> Result:
        s = self.settings
        metrics: dict[str, float] = {}
        for name, manifest in s.sets.items():
            data = load_labelled(manifest, subject.data)
            images = data.images_NCHW
            if s.shuffle_images:
                images = images[torch.randperm(len(images), generator=generator(s.seed, "shuffle"))]
            e0_hat = embed_images(subject, images, s.seed, s.steps, s.noises, s.guidance)
            prompts = [t.format(c) for c in data.classes for t in s.templates]
            e = embed_texts(subject, prompts).view(len(data.classes), len(s.templates), -1).mean(1)
            rank = ranks_of_truth(e0_hat, F.normalize(e, dim=-1), data.labels_N)
            metrics |= {
                f"zero_shot/{name}/top1": (rank < 1).float().mean().item(),
                f"zero_shot/{name}/top5": (rank < 5).float().mean().item(),
                f"zero_shot/{name}/chance": 1 / len(data.classes),
            }
        return Result(metrics)


def build(settings: EvaluatorConfig) -> Evaluator:
    """The evaluator."""
    assert isinstance(settings, Settings)
    return ZeroShot(settings)
