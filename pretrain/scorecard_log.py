"""A scorecard's metrics in the run's own MLflow run, through the journal that training wrote."""

from collections.abc import Callable, Mapping

from pretrain import comm
from pretrain.results import Finished, Folder
from pretrain.tracking import TrackingConfig
from pretrain.tracking import build as build_tracker
from pretrain.tracking.base import Status, Tracker
from pretrain.tracking.journal import JournalReader
from pretrain.tracking.journal import folder as journal_folder
from pretrain.watchdog import ENDED, FAILED, read_heartbeats


class ScorecardLog:
    """Metrics into the run's MLflow run, under scorecard/ENTRY/METRIC, through its journal. Rank 0
    only. Whatever fails here is told, and the evaluation goes on; the next one sends what is left.
    """

    def __init__(
        self,
        output: str,
        tracking: TrackingConfig,
        folder: Folder,
        samples: int,
        say: Callable[[str], None],
    ) -> None:
        self.output, self.tracking, self.folder = output, tracking, folder
        self.samples, self.say = samples, say
        self.status: Status = "finished"
        self._tracker: Tracker | None = None
        self._failed = not comm.is_main()

    def add(self, done: Mapping[str, Finished]) -> None:
        """Log the entries that are not in the journal yet."""
        if self._failed:
            return
        try:
            tracked = self.folder.tracked()
            fresh = [e for e in done.values() if e.key not in tracked]
            if not fresh:
                return
            self._tracker = self._tracker or self._open()
            if self._tracker is None:
                return
            for entry in fresh:
                metrics = {
                    f"scorecard/{entry.name}/{name}": value
                    for name, value in entry.metrics.items()
                    if value is not None
                }
                self._tracker.metrics(metrics, self.samples)
            self.folder.note_tracked(tracked | {e.key for e in fresh})
        except Exception as error:  # tracking must never cost an evaluation
            self._give_up(error)

    def close(self, done: Mapping[str, Finished]) -> None:
        """Log what is left, and end the tracked run as training had ended it."""
        self.add(done)
        try:
            if self._tracker is not None:
                self._tracker.finish(self.status)
        except Exception as error:
            self._give_up(error)

    def _open(self) -> Tracker | None:
        output = self.output
        alive = [
            h
            for h in read_heartbeats(output)
            if h.phase not in (ENDED, FAILED) and h.written_seconds_ago < 3 * h.every_seconds
        ]
        if alive:  # a journal has one writer
            self._failed = True
            self.say(
                "[suite] not tracked: the run is still training, and its journal has one writer; "
                "the same command after it sends these metrics to MLflow"
            )
            return None
        events = JournalReader(journal_folder(output) / "events.jsonl").read()
        ends = [e.payload["status"] for e in events if e.kind == "finish"]
        self.status = ends[-1] if ends else self.status
        tracker = build_tracker(self.tracking, output, comm.rank())
        tracker.start(self.tracking.run_info(output))
        return tracker

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        self.say(f"[suite] WARNING: not tracked ({type(error).__name__}: {error})")
