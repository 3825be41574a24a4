"""Model and objectives as one module: a batch goes in, one weighted loss comes out.

This is what the engine wraps and ZeRO-3 partitions. It names no objective.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain import plugins
from pretrain.config import Config, build
from pretrain.errors import ConfigError
from pretrain.inference import ConditionsAt, captions_alone
from pretrain.model.diffdis import DiffDis
from pretrain.objectives.base import Context, Objective, ObjectiveConfig
from pretrain.rng import SampleRandom, derive_seed
from pretrain.types import Batch, Noised, StepOutput, TextFeatures

PACKAGE = "pretrain.objectives"


class TaskConfig(Config):
    """How a batch is noised and conditioned in training.

    Attributes:
        caption_drop: share of samples whose generation condition is the null prompt (for guidance).
        image_drop: share of samples whose alignment half sees no image, a zero latent (for
            guidance, Alg. 3).
    """

    caption_drop: float = Field(0.1, ge=0, le=1)
    image_drop: float = Field(0.0, ge=0, le=1)


def check_objectives(tree: Mapping[str, Any]) -> dict[str, ObjectiveConfig]:
    """Settings of each objective in ``tree`` that has a weight, validated by the objective's own
    file.

    Raises:
        ConfigError: an unknown objective or field, or none with a weight.
    """
    settings: dict[str, ObjectiveConfig] = {}
    for name, fields in tree.items():
        module = plugins.load(PACKAGE, name, f"objectives.{name}")
        checked = build(module.Settings, fields or {}, where=f"objectives.{name}")
        if checked.weight > 0:
            settings[name] = checked
    for name, checked in settings.items():
        missing = sorted(checked.needs - settings.keys())
        if missing:
            raise ConfigError(
                f"objectives.{name} works through objectives.{missing[0]}, which has no weight; "
                f"set objectives.{missing[0]}.weight > 0, or remove objectives.{name}"
            )
    if not settings:
        raise ConfigError(
            f"objectives={dict(tree)!r}: no objective has a weight; give at least one of "
            f"{', '.join(plugins.names(PACKAGE))} a weight > 0"
        )
    return settings


class PretrainTask(nn.Module):
    """``task(batch)`` is one training step's forward pass.

    Args:
        model: the network.
        objectives: settings by name, from `check_objectives`.
        config: noising and conditioning.
        seed: the run's seed; every draw is a function of it and the sample's number.
    """

    def __init__(
        self,
        model: DiffDis,
        objectives: Mapping[str, ObjectiveConfig],
        config: TaskConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        built: dict[str, Objective] = {}
        for name, settings in objectives.items():
            with torch.random.fork_rng(devices=[]):
                # A stream of its own: no other objective starts from other weights beside it.
                torch.manual_seed(derive_seed(seed, "objectives", name))
                module = plugins.load(PACKAGE, name, "objectives")
                built[name] = module.build(settings, model)
        self.objectives = nn.ModuleDict(built)
        self.weights = {name: settings.weight for name, settings in objectives.items()}
        self.halves = frozenset().union(*(objective.reads for objective in built.values()))
        self.config = config
        self.seed = seed

    def forward(self, batch: Batch) -> StepOutput:
        context = self.context(batch)
        terms = {name: objective(context) for name, objective in self.objectives.items()}
        return StepOutput.weighted(terms, self.weights)

    def context(self, batch: Batch) -> Context:
        """What the objectives read of ``batch``: noised, conditioned by each, through the trunk."""
        noised, rng = self.noise(batch), SampleRandom(self.seed, batch.positions_B)
        for objective in self._built():
            noised = objective.condition(batch, noised, self.model, rng)
        output = self.model(noised, "generation" in self.halves, "alignment" in self.halves)
        return Context(batch, noised, output, self.model, rng)

    def conditions(
        self, c_BLD: Tensor, null_c_BLD: Tensor, guidance: float, seeds: Sequence[int]
    ) -> ConditionsAt:
        """Those of generation with this task's objectives (see `inference.Heads`)."""
        for objective in self._built():
            c_BLD = objective.condition_at_inference(c_BLD)
            null_c_BLD = objective.condition_at_inference(null_c_BLD)
        return captions_alone(c_BLD, null_c_BLD, guidance, seeds)

    def _built(self) -> list[Objective]:
        return [cast(Objective, objective) for objective in self.objectives.values()]

    def noise(self, batch: Batch) -> Noised:
        """Encode the batch and noise both streams, at times of their own (DiffDis Alg. 1)."""
        model, rng, device = (
            self.model,
            SampleRandom(self.seed, batch.positions_B),
            batch.images_BCHW.device,
        )
        if batch.latents_BCHW is not None:
            z = batch.latents_BCHW.float()
        else:
            z = model.autoencoder.encode(batch.pixels_BCHW)
        if batch.text is not None:
            text = TextFeatures(batch.text.c_BLD.float(), batch.text.e_BE.float())
            null_c = model.null_condition()
        else:
            text, null_c = model.encode_text(batch.tokens_BL, batch.mask_BL)
        null_c = null_c.expand_as(text.c_BLD)

        t_z = model.image_path.schedule.training_times(rng.uniform("t_z", device))
        t_e = model.text_path.schedule.training_times(rng.uniform("t_e", device))
        noise_z = rng.normal("noise_z", z.shape[1:], device)
        noise_e = rng.normal("noise_e", text.e_BE.shape[1:], device)
        # The query is data to the text stream: what teaches the text encoder is the loss on its
        # clean output.
        e_t = model.text_path.noised(text.e_BE.detach(), noise_e, t_e)
        return Noised(
            z_BCHW=self._dropped(z, rng.uniform("image_drop", device), self.config.image_drop),
            x0_z_BCHW=z,
            z_t_BCHW=model.image_path.noised(z, noise_z, t_z),
            noise_z_BCHW=noise_z,
            t_z_B=t_z,
            text=text,
            c_BLD=torch.where(
                (rng.uniform("caption_drop", device) < self.config.caption_drop)[:, None, None],
                null_c,
                text.c_BLD,
            ),
            null_c_BLD=null_c,
            e_t_BE=e_t,
            noise_e_BE=noise_e,
            t_e_B=t_e,
        )

    @staticmethod
    def _dropped(z_BCHW: Tensor, u_B: Tensor, share: float) -> Tensor:
        return torch.where((u_B < share)[:, None, None, None], torch.zeros_like(z_BCHW), z_BCHW)
