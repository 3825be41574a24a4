"""A journal whose events a process of its own sends to MLflow (sender.py)."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pretrain import mlflow_env
from pretrain.tracking.base import RunInfo, Status
from pretrain.tracking.journal import Journal
from pretrain.tracking.sender import read_progress

_log = logging.getLogger(__name__)

_RESPAWN_SECONDS = 60.0  # at least, between two starts of a sender that dies


class MlflowTracker(Journal):
    """A journal whose events a child process sends on.

    Args:
        output: the run's local output folder.
        uri: MLflow's tracking URI.
        drain_seconds: the longest that `finish` waits for events to be sent.
    """

    def __init__(self, output: str, uri: str, drain_seconds: float) -> None:
        super().__init__(output, mlflow_env.public(uri))
        self.uri = uri
        self.drain_seconds = drain_seconds
        self.unsent = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._spawned = 0.0

    def start(self, run: RunInfo) -> None:
        """Begin or go on with the run; the sender starts beside it."""
        super().start(run)
        self._child = self._spawn()

    def metrics(self, metrics: Mapping[str, float], samples: int) -> None:
        """Write scalars; a sender that somebody killed is started again."""
        super().metrics(metrics, samples)
        dead = self._child is not None and self._child.poll() is not None
        if dead and time.monotonic() - self._spawned > _RESPAWN_SECONDS:
            self._child = self._spawn()

    def finish(self, status: Status) -> None:
        """End the run, wait for the sender, and say how many events it has left."""
        super().finish(status)
        if self._child is None or self._child.poll() is not None:
            self._child = self._spawn()  # never started, or killed: one more chance
        try:
            self._child.wait(self.drain_seconds)
        except subprocess.TimeoutExpired:
            self._child.terminate()
            self._child.wait()
        _, sent, owed = read_progress(self.folder, self.uri)
        self.unsent = self.sequence - sent + len(owed)
        if self.unsent:
            _log.warning(
                "%d of %d events have not reached MLflow at %s; they are kept in %s: "
                "send them with `python -m pretrain sync --output %s`",
                *(
                    self.unsent,
                    self.sequence,
                    mlflow_env.public(self.uri),
                    self.path,
                    self.folder.parent,
                ),
            )

    def _spawn(self) -> subprocess.Popen[bytes]:
        package_parent = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pretrain.tracking", str(self.folder.parent)]
        self._spawned = time.monotonic()
        return subprocess.Popen(
            [*command, "--parent", str(os.getpid()), "--patience", str(self.drain_seconds)],
            env={**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": self.uri},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer, which then calls finish()
        )
