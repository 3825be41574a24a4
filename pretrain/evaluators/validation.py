"""The training objectives on held-out samples: the same losses, on data no step has seen."""

from collections.abc import Callable

import torch
from pydantic import Field

from pretrain import comm
from pretrain.data.evalset import EvalSet, open_set
from pretrain.data.loader import DataConfig
from pretrain.data.setconfig import SetConfig
from pretrain.errors import ConfigError, DataError
from pretrain.evaluators.base import Evaluator, EvaluatorConfig, Result, Subject
from pretrain.stop import Stopped
from pretrain.types import Batch


class Settings(EvaluatorConfig):
    """Attributes:
    manifest: the held-out set.
    global_batch: samples that contrast with each other; over all ranks, and so the same on any
        number.
    repeats: times each sample is noised anew.
    """

    manifest: str | None = None
    global_batch: int = Field(128, ge=2)
    repeats: int = Field(2, ge=1)


class Validation:
    """Mean of each objective's loss over whole global batches; the set is walked round to fill the
    last one."""

    def __init__(self, settings: Settings) -> None:
        if settings.manifest is None:
            raise ConfigError(
                "evaluators.validation.manifest: required, but not given; name a held-out manifest"
            )
        self.settings = settings

    def check(self, data: DataConfig, beat: Callable[[], object]) -> None:
        self._open(data, beat)

    def _open(self, data: DataConfig, beat: Callable[[], object]) -> EvalSet:
        s, ranks = self.settings, comm.world_size()
        if s.global_batch % ranks:
            raise ConfigError(
                f"evaluators.validation.global_batch={s.global_batch} is not a multiple of {ranks} "
                "ranks"
            )
        found = open_set("validation", SetConfig(manifest=s.manifest), data, beat)
        if not len(found):
            raise DataError(f"evaluators.validation.manifest={s.manifest!r} holds no sample")
        return found

    @torch.no_grad()
    def run(self, subject: Subject) -> Result:
        s, data = self.settings, self._open(subject.data, subject.pulse)
        n, mine = len(data), s.global_batch // subject.world
        length = subject.task.model.config.text_encoder.length
        device = subject.task.model.null_tokens_L.device
        sums: dict[str, float] = {}
        batches = -(-n * s.repeats // s.global_batch)
        for b in range(batches):
            if comm.agree_any(subject.pulse()):  # the contrast below is collective
                raise Stopped
            start = b * s.global_batch + subject.rank * mine
            positions = torch.arange(start, start + mine)
            indices = (positions % n).tolist()
            captions = tuple(data.captions[i][0] for i in indices)
            tokens, mask = subject.tokenizer.encode(list(captions), length)
            batch = Batch(data.images(indices), tokens, mask, positions, captions=captions)
            for name, value in subject.task(batch.to(device)).metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) / batches
        return Result(
            {f"validation/{name}": value for name, value in comm.mean_over_ranks(sums).items()}
        )


def build(settings: EvaluatorConfig) -> Evaluator:
    """The evaluator."""
    assert isinstance(settings, Settings)
    return Validation(settings)
