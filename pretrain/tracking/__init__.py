"""Tracking: an event of a run is first a line in its local journal, and sent to MLflow from it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from pretrain import mlflow_env
from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.tracking import journal, mlflow_tracker, sender
from pretrain.tracking.base import NullTracker, RunInfo, Status, Tracker
from pretrain.tracking.journal import Journal, JournalReader

__all__ = [
    "NullTracker",
    "RecordedRun",
    "RunInfo",
    "Status",
    "Tracker",
    "TrackingConfig",
    "build",
    "recorded_run",
    "sync",
]


class TrackingConfig(Config):
    """Where runs are tracked."""

    kind: Literal["mlflow", "none"] = Field(
        "mlflow", description="none: the journal alone is written; `sync` can send it later"
    )
    uri: str | None = Field(
        None,
        description="tracking URI; else MLFLOW_TRACKING_URI, else mlflow.db in the output folder",
    )
    experiment: str = Field("diffdis", min_length=1, max_length=500)
    run_name: str | None = Field(None, description="else the output folder's name")
    drain_seconds: float = Field(
        60.0, ge=0, description="the longest wait at the end for events to be sent"
    )

    system_seconds: float = Field(
        10.0,
        ge=0,
        description="between two looks at each node's CPU, memory, disk, network and GPUs; 0: none",
    )

    def run_info(self, output: str, tags: dict[str, str] | None = None) -> RunInfo:
        """The run that this configuration describes."""
        name = self.run_name or Path(output).absolute().name
        return RunInfo(name, self.experiment, output, tags or {})


def build(config: TrackingConfig, output: str, rank: int) -> Tracker:
    """The tracker of this rank: one that keeps nothing except on rank 0.

    Raises:
        ConfigError: ``output`` is not a local folder that can be written.
    """
    if rank != 0:
        return NullTracker()
    if config.kind == "none":
        return Journal(output)
    uri = mlflow_env.resolve_uri(config.uri, default_uri(output))
    return mlflow_tracker.MlflowTracker(output, uri, config.drain_seconds)


def default_uri(output: str) -> str:
    """The SQLite file in the output folder."""
    return f"sqlite:///{journal.folder(output).parent / 'mlflow.db'}"


def sync(output: str, uri: str | None = None, patience: float = 10.0) -> int:
    """Send what a run's server has not acknowledged of its journal; to another server, all of it.

    Args:
        output: the run's output folder.
        uri: else MLFLOW_TRACKING_URI, else the one the run was meant for, else the SQLite default.
        patience: seconds to retry a server that does not answer.

    Returns:
        The number of events that are still unsent.

    Raises:
        ConfigError: there is no journal.
    """
    path = journal.folder(output) / "events.jsonl"
    starts = [event for event in JournalReader(path).read() if event.kind == "start"]
    if not starts:
        raise ConfigError(f"output={output!r} holds no journal ({path}); give the folder of a run")
    uri = mlflow_env.resolve_uri(uri, starts[-1].payload["uri"] or default_uri(output))
    return sender.replay(output, uri, lambda: True, patience)


@dataclass(frozen=True)
class RecordedRun:
    """The MLflow run of an output folder."""

    run_id: str
    uri: str


def recorded_run(output: str) -> RecordedRun:
    """The run that ``output`` was tracked as.

    Raises:
        ConfigError: it has not reached a server yet.
    """
    run = sender.read_run(journal.folder(output))
    if not run:
        raise ConfigError(
            f"output={output!r} has no MLflow run yet; first run "
            f"`python -m pretrain sync --output {output}`"
        )
    # Written down without its password; the environment may know the same server with it.
    full = os.environ.get("MLFLOW_TRACKING_URI", "")
    uri = full if mlflow_env.public(full) == run["uri"] else run["uri"]
    return RecordedRun(run["run_id"], uri)
