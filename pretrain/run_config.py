"""The whole configuration of a run: one frozen tree, composed of the nodes that each part
declares."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from pretrain import plugins
from pretrain.checkpoint import CheckpointConfig
from pretrain.config import Config, build
from pretrain.data.loader import DataConfig
from pretrain.ema import EmaConfig
from pretrain.engine_config import EngineConfig, accumulation
from pretrain.errors import ConfigError
from pretrain.evaluators.base import EvaluatorConfig
from pretrain.guard import GuardConfig
from pretrain.inference import InferenceConfig
from pretrain.model.diffdis import ModelConfig
from pretrain.optim import OptimizerConfig
from pretrain.registry.gate import GateConfig
from pretrain.task import TaskConfig, check_objectives
from pretrain.tracking import TrackingConfig
from pretrain.watchdog import WatchdogConfig

EVALUATORS = "pretrain.evaluators"


class TrainingConfig(Config):
    """How long, and in what steps. Progress is counted in samples, so the batch size may change in
    mid-run.

    Attributes:
        samples: samples to see in all.
        global_batch: samples of one optimizer step over all ranks; also what contrast is drawn
            from.
        log_every_samples: samples between log lines.
        mfu: log the model FLOPs utilisation; counting operations takes seconds of every start.
    """

    samples: int = Field(ge=1)
    global_batch: int = Field(128, ge=1)
    log_every_samples: int = Field(1280, ge=1)
    mfu: bool = True


class RunConfig(Config):
    """A run.

    Attributes:
        name: of the model, for the registry and the log.
        output: folder of everything the run leaves.
        seed: of initialisation, order, noise and augmentation.
        objectives, evaluators: settings by plug-in name, checked against each plug-in's own file.
        gate: what `promote` asks of the model.
    """

    name: str = Field(min_length=1)
    output: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objectives: dict[str, dict[str, Any]]
    task: TaskConfig = TaskConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    inference: InferenceConfig = InferenceConfig()
    evaluators: dict[str, dict[str, Any]] = Field(default_factory=dict)
    ema: EmaConfig = EmaConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    gate: GateConfig = GateConfig()

    @field_validator("objectives", "evaluators", mode="before")
    @classmethod
    def _without_null(cls, tree: Any) -> Any:
        """``name: null`` leaves a plug-in of the base config out."""
        return {k: v for k, v in tree.items() if v is not None} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        if self.data.size != self.model.image_size:
            raise ValueError(
                f"data.size={self.data.size} and model.image_size={self.model.image_size} differ; "
                "make them equal"
            )
        if self.data.tokens != self.model.text_encoder.length:
            raise ValueError(
                f"data.tokens={self.data.tokens} and "
                f"model.text_encoder.length={self.model.text_encoder.length} "
                "differ; make them equal"
            )
        if self.data.encoded_text and not self.model.text_encoder.frozen:
            raise ValueError(
                "data.encoded_text=true needs model.text_encoder.frozen_from, or a frozen encoder "
                "of kind transformers: features of a text encoder in training would be of weights "
                "long gone; name what encoded them, or set data.encoded_text: false"
            )
        step = self.model.size_multiple
        if self.data.bucket_group and self.data.bucket_multiple % step:
            raise ValueError(
                f"data.bucket_multiple={self.data.bucket_multiple} is not a multiple of {step}, "
                f"which the model's sides must be; set it to {step}"
            )
        if self.data.bucket_group and self.data.bucket_group % self.training.global_batch:
            raise ValueError(
                f"data.bucket_group={self.data.bucket_group} is not a multiple of "
                f"training.global_batch={self.training.global_batch}; a batch has one shape: try "
                f"{self.training.global_batch}"
            )
        try:
            self.optimizer.check_length(self.training.samples)
            self._check_recomputing()
            check_evaluators(self.evaluators)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def _check_recomputing(self) -> None:
        """Recomputed units go back one by one (see `model/recompute.py`): a parameter that two
        passes read would be reduced twice, and ZeRO keeps the second gradient alone or fails."""
        again = [n for n, o in check_objectives(self.objectives).items() if o.further_passes]
        if again and self.engine.activation_checkpointing and self.engine.zero_stage > 0:
            raise ConfigError(
                f"engine.activation_checkpointing=true and objectives.{again[0]}, which passes the "
                f"trunk a second time, cannot be used together under engine.zero_stage="
                f"{self.engine.zero_stage}; set engine.activation_checkpointing: false, or for "
                "cdcd mechanism: step"
            )

    def check_ranks(self, world: int) -> None:
        """What can only be known with the number of ranks.

        Raises:
            ConfigError: the batch does not divide.
        """
        accumulation(self.engine, self.training.global_batch, world)

    def resolved(self) -> dict[str, Any]:
        """The tree with every default filled in, those of plug-ins too; JSON types only."""
        tree = self.model_dump(mode="json")
        for name, settings in check_objectives(self.objectives).items():
            tree["objectives"][name] = settings.model_dump(mode="json")
        for name, checked in check_evaluators(self.evaluators).items():
            tree["evaluators"][name] = checked.model_dump(mode="json")
        return tree


def check_evaluators(tree: Mapping[str, Any]) -> dict[str, EvaluatorConfig]:
    """Settings of each evaluator, validated by its own file.

    Raises:
        ConfigError: an unknown evaluator or field.
    """
    checked = {}
    for name, fields in tree.items():
        module = plugins.load(EVALUATORS, name, f"evaluators.{name}")
        checked[name] = build(module.Settings, fields or {}, where=f"evaluators.{name}")
    return checked
