"""The sets of an evaluator: how they are named, opened, and told apart in what it says."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from pretrain.data.evalset import EvalSet, open_set
from pretrain.data.loader import DataConfig
from pretrain.data.setconfig import SetConfig
from pretrain.errors import ConfigError, DataError
from pretrain.evaluators.base import EvaluatorConfig, Subject


class SetsConfig(EvaluatorConfig):
    """Attributes:
    sets: the sets by name: a manifest, the URL of a folder in clip-benchmark's form, or fields of
        `SetConfig`.
    """

    sets: dict[str, SetConfig] = Field(default_factory=dict)

    def need_sets(self, evaluator: str) -> None:
        """Raise a ConfigError where no set is named."""
        if not self.sets:
            raise ConfigError(
                f"evaluators.{evaluator}.sets={{}}: name at least one set, as "
                "{name: manifest.json} or {name: folder}"
            )


def open_sets(
    sets: Mapping[str, SetConfig], data: DataConfig, beat: Callable[[], object]
) -> dict[str, EvalSet]:
    """The sets, each of two images at least; what was opened before is at hand.

    Args:
        data: what the model's images are like, and how shards are reached.
        beat: called every second or so while a set is read for the first time.

    Raises:
        DataError: one is missing or unfit.
    """
    found = {}
    for name, config in sets.items():
        found[name] = open_set(name, config, data, beat)
        n = len(found[name])
        if n < 2:
            raise DataError(
                f"evaluation set {name!r} at {config.place} has {n} image{'s' if n != 1 else ''}; "
                "a score needs two at least"
            )
    return found


def details_of(
    subject: Subject, found: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Details by set as a result holds them, on rank 0: those of the one set themselves, with its
    name; of several, under ``sets``."""
    if subject.rank != 0:
        return None
    if len(found) > 1:
        return {"sets": dict(found)}
    ((name, fields),) = found.items()
    return {"set": name, **fields}
