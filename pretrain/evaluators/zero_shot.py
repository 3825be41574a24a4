"""Zero-shot classification by denoising the text query given the image (DiffDis Alg. 3)."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from pretrain.data.evalset import EvalSet
from pretrain.data.loader import DataConfig
from pretrain.errors import ConfigError, DataError
from pretrain.evaluators._embed import EmbedConfig, embed_images, embed_texts
from pretrain.evaluators._examples import thumbnails
from pretrain.evaluators._metrics import Classified, classify, confusion, per_class, within
from pretrain.evaluators._sets import details_of, open_sets
from pretrain.evaluators.base import Evaluator, EvaluatorConfig, Result, Subject
from pretrain.rng import generator

CLASS = re.compile(r"\{c?\}")  # `{c}` as clip-benchmark writes it, `{}` as CLIP does


class Settings(EmbedConfig):
    """Attributes:
    templates: class prompts; ``{c}`` or ``{}`` stands for the class name. None takes the set's own,
        or the bare name where it has none. A class's query is the normalised mean over them.
    shuffle_images: leak test: images are exchanged among samples, and accuracy must fall to chance.
    """

    templates: tuple[str, ...] | None = None
    shuffle_images: bool = False
    examples: int = Field(48, ge=0)

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if templates is not None:
            check_templates(templates)
        return templates


def check_templates(templates: Sequence[str]) -> None:
    """Raise a ValueError unless each has one place for the class at least."""
    if not templates:
        raise ValueError("[]: give at least one template, such as '{c}'")
    for template in templates:
        if not CLASS.search(template):
            raise ValueError(
                f"template {template!r} has no place for the class; write {{c}} or {{}} there"
            )


def prompts_of(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Each class in each template, class by class."""
    return [_filled(template, name) for name in classes for template in templates]


def _filled(template: str, name: str) -> str:
    return CLASS.sub(lambda _: name, template)  # a function: a name may hold a backslash


def templates_of(
    evaluator: str, templates: Sequence[str] | None, name: str, data: EvalSet
) -> Sequence[str]:
    """Those given, else the set's own, else the bare class name.

    Raises:
        ConfigError, DataError: the set holds no classes to tell apart, or a template no place.
    """
    if data.task != "classification":
        raise ConfigError(
            f"evaluators.{evaluator}.sets.{name}: {data.config.place} holds captions and no "
            "classes; evaluators.retrieval scores it"
        )
    if len(data.classes) < 2:
        raise DataError(
            f"evaluation set {name!r} has one class, {data.classes[0]!r}: every answer would "
            "be right; zero-shot classification needs two at least"
        )
    templates = templates or data.templates or ("{}",)
    try:
        check_templates(templates)
    except ValueError as error:
        raise DataError(f"evaluation set {name!r}: {error}") from None
    return templates


def scored(
    evaluator: str, name: str, data: EvalSet, found: Classified, templates: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics of a set, with chance beside them, and its details for the report."""
    accuracies = per_class(found.rank_N < 1, data.labels_N, len(data.classes))
    known = [a for a in accuracies if a is not None]
    metrics = {
        f"{evaluator}/{name}/top1": within(found.rank_N, 1),
        f"{evaluator}/{name}/top5": within(found.rank_N, 5),
        f"{evaluator}/{name}/mean_per_class": sum(known) / len(known),
        f"{evaluator}/{name}/chance": 1 / len(data.classes),
    }
    details = {
        "metric": data.config.metric or "top1",
        "templates": list(templates),
        "classes": list(data.classes),
        "confusion": confusion(data.labels_N, found.predicted_N, len(data.classes)),
        "per_class": accuracies,
    }
    return metrics, details


class ZeroShot:
    """Top-1, top-5 and the mean of per-class accuracies over each set's own classes, with chance
    beside them."""

    def __init__(self, settings: Settings) -> None:
        settings.need_sets("zero_shot")
        self.settings = settings

    def check(self, data: DataConfig, beat: Callable[[], object]) -> None:
        for name, found in open_sets(self.settings.sets, data, beat).items():
            templates_of("zero_shot", self.settings.templates, name, found)

    def run(self, subject: Subject) -> Result:
        s = self.settings
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name, data in open_sets(s.sets, subject.data, subject.pulse).items():
            templates = templates_of("zero_shot", s.templates, name, data)
            embedded = embed_images(subject, data, s)
            rows_NE = embedded.rows_NE
            if s.shuffle_images:  # an image's row depends on it alone
                order = torch.randperm(len(data), generator=generator(s.seed, "shuffle"))
                rows_NE = rows_NE[order]
            classes_KE = embed_texts(subject, prompts_of(data.classes, templates), len(templates))
            found = classify(rows_NE, classes_KE, data.labels_N)
            numbers, told = scored("zero_shot", name, data, found, templates)
            metrics |= {**numbers, **embedded.cost(name)}
            if subject.rank == 0:
                examples = self._examples(data, found, rows_NE, classes_KE)
                details[name] = told | {"examples": examples}
        return Result(metrics, details=details_of(subject, details))

    def _examples(
        self, data: EvalSet, found: Classified, rows_NE: Tensor, classes_KE: Tensor
    ) -> list[dict[str, Any]]:
        """The images that are furthest from right, and what they were taken for."""
        worst = found.margin_N.argsort(stable=True)[: self.settings.examples].tolist()
        if self.settings.shuffle_images or not worst:
            return []
        best = (rows_NE[worst] @ classes_KE.T).topk(min(5, len(data.classes)), dim=1)
        pictures = thumbnails(data, worst)
        return [
            {
                "key": data.keys[i],
                "true": data.classes[int(data.labels_N[i])],
                "predicted": [data.classes[c] for c in indices],
                "scores": [round(v, 4) for v in values],
                "png": pictures[i],
            }
            for i, indices, values in zip(
                worst, best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]


def build(settings: EvaluatorConfig) -> Evaluator:
    """The evaluator."""
    assert isinstance(settings, Settings)
    return ZeroShot(settings)
