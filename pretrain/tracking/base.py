"""What the trainer knows of tracking: five methods."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Status = Literal["finished", "failed", "preempted"]


@dataclass(frozen=True)
class RunInfo:
    """Who a run is.

    Attributes:
        name: what people call it; need not be unique.
        experiment: the group of runs it belongs to.
        output: its output folder. The same folder is the same run, before and after a resume.
        tags: short strings to find it by.
    """

    name: str
    experiment: str
    output: str
    tags: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Where a run's story goes. No method waits for a network or raises for one, but for `finish`.

    Rank 0 alone has a real one.
    """

    def start(self, run: RunInfo) -> None:
        """Begin, or take up again, the run of ``run.output``."""

    def params(self, params: Mapping[str, Any]) -> None:
        """Settings, nested as they are; logged once, the first value of each name stays."""

    def metrics(self, metrics: Mapping[str, float], samples: int) -> None:
        """Named scalars after ``samples`` samples seen."""

    def artifact(self, path: str, folder: str = "") -> None:
        """A file or folder, kept below ``folder``. It is read later: do not change or remove it."""

    def finish(self, status: Status) -> None:
        """End the run; waits for what is unsent, no longer than configured."""


class NullTracker:
    """Keeps nothing: for ranks other than 0."""

    def start(self, run: RunInfo) -> None: ...

    def params(self, params: Mapping[str, Any]) -> None: ...

    def metrics(self, metrics: Mapping[str, float], samples: int) -> None: ...

    def artifact(self, path: str, folder: str = "") -> None: ...

    def finish(self, status: Status) -> None: ...
