"""An evaluator is a file in this folder: given a trained model, it returns metrics (and may leave
pictures)."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import Field

from pretrain import comm
from pretrain.config import Config
from pretrain.data.loader import DataConfig
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


class Kept:
    """What evaluators of one model share, up to 512 MB: the embeddings of a set, which zero-shot
    and retrieval both read."""

    MOST_BYTES = 512 << 20

    def __init__(self) -> None:
        self._values: OrderedDict[str, Any] = OrderedDict()

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The value of ``key``, made at the first asking; what was not asked for lately goes. Where
        ``make`` is collective every rank must ask in the same order.

        Args:
            make: gives a tensor, or what tells its bytes as ``nbytes``.
        """
        if key not in self._values:
            self._values[key] = make()
            while len(self._values) > 1 and self._bytes() > self.MOST_BYTES:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        value: T = self._values[key]
        return value

    def _bytes(self) -> int:
        return sum(getattr(value, "nbytes", 0) for value in self._values.values())


@dataclass(frozen=True)
class Subject:
    """What is evaluated: an unpartitioned copy of the task on this rank, and what reads text and
    images.

    Attributes:
        task: in eval mode, on this rank's device.
        heads: its inference procedures.
        tokenizer: `pretrain.data.tokenizer.Tokenizer`.
        data: of the run.
        folder: where pictures go (rank 0 writes).
        samples: progress, for file names.
        rank, world: this rank's share of the work is every item i with i % world == rank.
        pulse: called between pieces of work of some seconds; True if the run is to stop, and the
            work to be left (see `together`).
        scratch: folder that all ranks see and that belongs to this very model; finished pieces of
            work are kept there, so that an evaluation that was stopped goes on with them. None
            keeps nothing.
        kept: what the evaluators of this very model share in memory.
    """

    task: PretrainTask
    heads: Heads
    tokenizer: Any
    data: DataConfig
    folder: Path
    samples: int
    rank: int = 0
    world: int = 1
    pulse: Callable[[], bool] = lambda: False
    scratch: Path | None = None
    kept: Kept = field(default_factory=Kept, repr=False, compare=False)

    def weights_sha256(self) -> str:
        """Of the model's tensors: what they made is no other weights'. Taken once."""
        return self.kept.get("weights", lambda: _sha256(self.heads.model))


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
    """What ``build(settings)`` of a file returns. Building reads no file: `check` does."""

    def check(self, data: DataConfig, beat: Callable[[], object]) -> None:
        """Find what is wrong with sets and other files before a run begins, and not hours later
        when it first evaluates. Called by every rank, each for itself.

        Args:
            data: of the run.
            beat: to be called every second or so.

        Raises:
            ConfigError, DataError: something is missing or unfit.
        """

    def run(self, subject: Subject) -> Result:
        """Evaluate. Called by every rank; may use `comm` collectives, the same ones on every
        rank.

        Raises:
            NonFiniteError: on every rank, if the model says NaN. Training goes on without these
                metrics.
        """


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


def _sha256(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
