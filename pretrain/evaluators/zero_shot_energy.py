"""Zero-shot classification by the energy that `objectives.dcd` learns: argmin_c E(e_c | z)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.data.evalset import EvalSet
from pretrain.data.loader import DataConfig
from pretrain.evaluators._embed import CHUNK, embed_texts
from pretrain.evaluators._metrics import classify
from pretrain.evaluators._sets import details_of, open_sets
from pretrain.evaluators.base import Evaluator, EvaluatorConfig, Result, Subject, share, together
from pretrain.evaluators.zero_shot import Settings as ZeroShotSettings
from pretrain.evaluators.zero_shot import prompts_of, scored, templates_of
from pretrain.objectives import _dcd_inference as dcd
from pretrain.rng import generator


class Settings(ZeroShotSettings):
    """As `zero_shot`, but that no chain is run: ``steps`` and ``guidance`` are not read, and
    energies are means over ``noises``."""


class ZeroShotEnergy:
    """Top-1, top-5 and the mean of per-class accuracies over each set's own classes, with chance
    beside them."""

    def __init__(self, settings: Settings) -> None:
        settings.need_sets("zero_shot_energy")
        self.settings = settings

    def check(self, data: DataConfig, beat: Callable[[], object]) -> None:
        for name, found in open_sets(self.settings.sets, data, beat).items():
            templates_of("zero_shot_energy", self.settings.templates, name, found)

    def run(self, subject: Subject) -> Result:
        s = self.settings
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name, data in open_sets(s.sets, subject.data, subject.pulse).items():
            templates = templates_of("zero_shot_energy", s.templates, name, data)
            classes_CE = embed_texts(subject, prompts_of(data.classes, templates), len(templates))
            scores_NC = -self._energies(subject, data, classes_CE)
            if s.shuffle_images:
                order = torch.randperm(len(data), generator=generator(s.seed, "shuffle"))
                scores_NC = scores_NC[order]
            # The inner products of scores with the identity are the scores.
            found = classify(scores_NC, torch.eye(len(data.classes)), data.labels_N)
            numbers, details[name] = scored("zero_shot_energy", name, data, found, templates)
            metrics |= numbers
        return Result(metrics, details=details_of(subject, details))

    def _energies(self, subject: Subject, data: EvalSet, classes_CE: Tensor) -> Tensor:
        """E of every image and class, (N, C), on every rank. Collective."""
        s, model = self.settings, subject.task.model
        head = dcd.energy_of(subject.task.objectives.items())
        device = model.null_tokens_L.device
        parts = [range(i, min(i + CHUNK, len(data))) for i in range(0, len(data), CHUNK)]
        made: dict[int, Tensor] = {}
        left = False
        for number in share(len(parts), subject.rank, subject.world):
            left = subject.pulse()
            if left:
                break
            images = data.images(parts[number]).to(device)
            energies = dcd.class_energies(model, head, images, classes_CE, s.seed, s.noises)
            made[number] = energies.cpu()
        found = {i: rows for part in together(made, left) for i, rows in part.items()}
        return torch.cat([found[i] for i in range(len(parts))])


def build(settings: EvaluatorConfig) -> Evaluator:
    """The evaluator."""
    assert isinstance(settings, Settings)
    return ZeroShotEnergy(settings)
