"""An evaluator is a file in this folder: given a trained model, it returns metrics (and may leave
pictures)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import Field

from pretrain import comm
from pretrain.config import Config
from pretrain.inference import Heads
from pretrain.stop import Stopped
from pretrain.task import PretrainTask

T = TypeVar("T")


class EvaluatorConfig(Config):
    """Attributes:
    every_samples: samples of training between runs; None runs it at the end of training alone.
    at_start: also before the first step.
    """

    every_samples: int | None = Field(None, ge=1)
    at_start: bool = False


@dataclass(frozen=True)
class Subject:
    """What is evaluated: an unpartitioned copy of the task on this rank, and what reads text and
    images.

    Attributes:
        task: in eval mode, on this rank's device.
        heads: its inference procedures.
        tokenizer: `pretrain.data.tokenizer.Tokenizer`.
        data: the run's `DataConfig`.
        folder: where pictures go (rank 0 writes).
        samples: progress, for file names.
        rank, world: this rank's share of the work is every item i with i % world == rank.
        pulse: called between pieces of work of some seconds; True if the run is to stop, and the
            work to be left (see `together`).
        scratch: folder that all ranks see and that belongs to this very model; finished pieces of
            work are kept there, so that an evaluation that was stopped goes on with them. None
            keeps nothing.
    """

    task: PretrainTask
    heads: Heads
    tokenizer: Any
    data: Any
    folder: Path
    samples: int
    rank: int = 0
    world: int = 1
    pulse: Callable[[], bool] = lambda: False
    scratch: Path | None = None


@dataclass(frozen=True)
class Result:
    """Metrics by name, the same on every rank; and on rank 0 alone what a reader looks at.

    Attributes:
        metrics: numbers by flat name.
        files: to keep as artifacts.
        details: further data that JSON can hold, for a report: of which examples the numbers come.
    """

    metrics: dict[str, float]
    files: tuple[Path, ...] = ()
    details: Mapping[str, Any] | None = None


class Evaluator(Protocol):
    """What ``build(settings)`` of a file returns."""

    def run(self, subject: Subject) -> Result:
        """Evaluate. Called by every rank; may use `comm` collectives, the same ones on every
        rank."""


def together(value: T, left: bool) -> list[T]:
    """``value`` of every rank, in rank order, on every rank. Collective.

    Args:
        left: whether this rank left its share of the work unfinished, asked to stop.

    Raises:
        Stopped: on every rank, if one left.
    """
    if comm.agree_any(left):
        raise Stopped
    return comm.gather_objects(value)


def share(n: int, rank: int, world: int) -> list[int]:
    """Indices of ``range(n)`` that are this rank's."""
    return list(range(rank, n, world))
