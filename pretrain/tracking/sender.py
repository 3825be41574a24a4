"""Replays a run's journal into MLflow, in a process of its own beside the training.

A process and not a thread: MLflow's import and a new SQLite file's migrations are ten seconds of
pure Python, which as a thread held the interpreter lock (a step of 10 ms took up to 344 ms), and
data workers forked in the midst of an import inherit its locks. Run as

    python -m pretrain.tracking OUTPUT --parent PID --patience SECONDS

with the tracking URI in MLFLOW_TRACKING_URI, since a command line is no place for a password.
"""

import argparse
import fcntl
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import tenacity

from pretrain import mlflow_env, storage
from pretrain.tracking import journal
from pretrain.tracking.journal import Event, JournalReader
from pretrain.tracking.timeout import RequestTimeout

_log = logging.getLogger(__name__)

_EVENTS_PER_BATCH = 1000
_METRICS_PER_REQUEST = 1000  # as many as MLflow takes
_FEWEST_METRICS = 50
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
# Answers that stay the same however often one asks; everything else is worth another try.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
_KEY = "pretrain.journal"  # the tag by which a run is found again whose id was never written down
_POLL_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 10.0
_LONGEST_WAIT_AT_THE_END = 1.0  # the trainer waits for us, and holds its hardware


class Sender:
    """Sends one journal to one server, in order, remembering after each batch how far it came.

    What was acknowledged is not sent again. A batch whose acknowledgement was lost is, and MLflow
    stores equal metrics, parameters and tags once. Artifacts come after the other events of their
    batch, and are owed until they are sent: no metric waits for an object store.
    """

    def __init__(self, output: str, uri: str) -> None:
        self.uri = uri
        self.folder = journal.folder(output)
        self.reader = JournalReader(self.folder / "events.jsonl")
        self.run_id, self.sent, owed = read_progress(self.folder, uri)
        self.ended = False  # the last event read was `finish`
        self.answers = 0  # steps of the work that are done, and need not be done again
        self._pending: list[Event] = []
        self._room = _METRICS_PER_REQUEST
        self._timeout = RequestTimeout(mlflow_env.request_timeout())
        self._tagged = -1  # the `finish` whose tag is there
        self._owed: dict[int, Event] = {}
        if owed:
            events = JournalReader(self.reader.path).read()
            self._owed = {event.sequence: event for event in events if event.sequence in owed}
        self._client: Any = None
        self._experiment: str | None = None
        self._params: set[str] = set()

    def step(self) -> int:
        """Send up to a batch of events, then artifacts that are owed; the number sent.

        Raises:
            Exception: whatever MLflow raised; the next call goes on with what was not acknowledged.
        """
        if not self._pending:
            while events := self.reader.read(_EVENTS_PER_BATCH):
                self.ended = events[-1].kind == "finish"
                self._pending = [event for event in events if event.sequence > self.sent]
                if self._pending:
                    break
        count = len(self._pending)
        while self._pending:
            together = self._together()
            if together[0].kind == "artifact":
                self._owed[together[0].sequence] = together[0]
            else:
                self._send(together)
            self.sent = together[-1].sequence
            self._acknowledge()
            del self._pending[: len(together)]
        for sequence in list(self._owed):
            event = self._owed.pop(sequence)
            self._owed[sequence] = event  # the last in turn, should it fail
            self._send([event])
            del self._owed[sequence]
            self._acknowledge()
            count += 1
        return count

    @property
    def unsent(self) -> int:
        """Events of the journal, as it is now, that are not sent."""
        events = JournalReader(self.reader.path).read()
        return sum(event.sequence > self.sent for event in events) + len(self._owed)

    def _together(self) -> list[Event]:
        """The pending events that go in the next request: metrics as far as there is room in it,
        anything else alone."""
        together: list[Event] = []
        values = 0
        for event in itertools.takewhile(lambda event: event.kind == "metrics", self._pending):
            values += len(event.payload["values"])
            if together and values > self._room:
                break
            together.append(event)
        return together or self._pending[:1]

    def _send(self, events: Sequence[Event]) -> None:
        """Send events of one kind; one that the server refuses is dropped with a warning."""
        client = self._connected()
        from mlflow.exceptions import MlflowException

        send = getattr(self, f"_send_{events[0].kind}")
        # (An object store's time is not the server's, and a file's is as long as the file.)
        timed = self._timeout.request() if send != self._send_artifact else nullcontext()
        try:
            with timed:
                send(client, events)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            if client.get_run(self.run_id).info.lifecycle_stage != "active":
                raise RuntimeError(
                    f"MLflow run {self.run_id} was deleted; restore it there, and all is sent"
                ) from error
            if len(events) > 1:
                half = len(events) // 2
                self._send(events[:half])
                self._send(events[half:])
                return
            event = events[0]
            _log.warning("MLflow refused event %d (%s): %s", event.sequence, event.kind, error)

    def _send_start(self, client: Any, events: Sequence[Event]) -> None:
        client.update_run(self.run_id, status="RUNNING")  # a resumed run had an end

    def _send_params(self, client: Any, events: Sequence[Event]) -> None:
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        # MLflow's parameters cannot change: a resumed run's first values stay.
        fresh = {mlflow_env.key(key): value for key, value in events[0].payload.items()}
        fresh = {key: value for key, value in fresh.items() if key not in self._params}
        params = [Param(key, value[:MAX_PARAM_VAL_LENGTH]) for key, value in fresh.items()]
        for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
            client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS_TAGS_PER_BATCH])
        self._params |= fresh.keys()

    def _send_metrics(self, client: Any, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.validation import MAX_METRICS_PER_BATCH

        metrics = [
            Metric(mlflow_env.key(key), value, int(event.time * 1000), event.payload["samples"])
            for event in events
            for key, value in event.payload["values"].items()
        ]
        # A slow server may time out on a large request again and again, and each time do its work:
        # fewer are tried until one comes through.
        room, self._room = self._room, max(_FEWEST_METRICS, self._room // 2)
        for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])
        self._room = min(_METRICS_PER_REQUEST, 2 * room)

    def _send_artifact(self, client: Any, events: Sequence[Event]) -> None:
        path = self.folder.parent / events[0].payload["path"]
        folder = events[0].payload["folder"] or None
        if path.is_dir():
            client.log_artifacts(self.run_id, str(path), folder)
        elif path.exists():
            client.log_artifact(self.run_id, str(path), folder)
        else:
            _log.warning("artifact %s is gone; MLflow goes without it", path)

    def _send_finish(self, client: Any, events: Sequence[Event]) -> None:
        status, sequence = events[0].payload["status"], events[0].sequence
        if self._tagged != sequence:
            client.set_tag(self.run_id, "pretrain.status", status)
            self._tagged = sequence
            self.answers += 1
        client.set_terminated(self.run_id, _STATUS[status], end_time=int(events[0].time * 1000))

    def _connected(self) -> Any:
        """A client whose run exists; the journal's first `start` says what to make."""
        if self._client is None:
            client = mlflow_env.load().MlflowClient(self.uri)
            if self.run_id is None:
                self.run_id = self._find_or_create_run(client)
            self._params = set(client.get_run(self.run_id).data.params)
            self._client = client
            self.answers += 1
        return self._client

    def _find_or_create_run(self, client: Any) -> str:
        start = next(e for e in JournalReader(self.reader.path).read() if e.kind == "start")
        info = start.payload
        if self._experiment is None:
            self._experiment = mlflow_env.experiment_id(client, self.uri, info["experiment"])
            self.answers += 1
        experiment = self._experiment
        key = info.get("id") or f"{info['output']}@{start.time}"
        # A sender that died between making the run and writing its id left it under this tag.
        quoted = key.replace("'", "_")
        found = client.search_runs([experiment], f"tags.`{_KEY}` = '{quoted}'", max_results=1)
        run = found[0] if found else None
        if run is None:
            run = client.create_run(
                experiment,
                start_time=int(start.time * 1000),
                tags={**info["tags"], _KEY: quoted},
                run_name=info["name"],
            )
        run_id = str(run.info.run_id)
        self._write("sent.json", {"sequence": 0})
        self._write("run.json", {"run_id": run_id, "uri": mlflow_env.public(self.uri)})
        self.answers += 1
        return run_id

    def _acknowledge(self) -> None:
        self.answers += 1
        owed = {"owed": sorted(self._owed)} if self._owed else {}
        self._write("sent.json", {"sequence": self.sent, **owed})

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        storage.write_bytes(str(self.folder / name), json.dumps(content).encode())


class _Ending:
    """Whether the journal's last event is its run's end."""

    def __init__(self, path: Path) -> None:
        self._reader, self._ended = JournalReader(path), False

    def __call__(self) -> bool:
        if events := self._reader.read():
            self._ended = events[-1].kind == "finish"
        return self._ended


def replay(output: str, uri: str, over: Callable[[], bool], patience: float) -> int:
    """Send the journal of ``output`` until the run has finished or ``over()``.

    Failures are retried for ever while ``over()`` is false, then for ``patience`` more seconds.
    Each cause is warned of once.

    Returns:
        The number of events left unsent.
    """
    folder = journal.folder(output)
    deadline: float | None = None
    warned: set[str] = set()

    def give_up(state: tenacity.RetryCallState) -> bool:
        nonlocal deadline
        if deadline is None and over():
            deadline = time.monotonic() + patience
        return deadline is not None and time.monotonic() > deadline

    def warn(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        text = mlflow_env.public(f"{type(error).__name__}: {error}")[:300]
        cause = re.sub(r"0x[0-9a-f]+|\d+", "#", text)
        if cause not in warned:
            warned.add(cause)
            where = mlflow_env.public(uri)
            _log.warning("MLflow at %s: %s; events wait in %s", where, text, folder)

    ending = _Ending(folder / "events.jsonl")

    def pause(seconds: float) -> None:
        ends = time.monotonic() + seconds
        at_the_end = time.monotonic() + min(seconds, _LONGEST_WAIT_AT_THE_END)
        while (left := (at_the_end if ending() else ends) - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))

    retry = tenacity.Retrying(
        # (Spread from nothing to the whole wait: a server that comes back meets all its runs.)
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT_SECONDS),
        stop=give_up,
        before_sleep=warn,
        sleep=pause,
    )
    with (folder / "sender.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a killed run's sender may still be at it
        sender = Sender(output, uri)

        def step() -> int:
            mlflow_env.read_credentials()  # they may have changed since the last try
            before = sender.answers
            try:
                return sender.step()
            except Exception:
                if sender.answers == before:
                    raise
                return 1  # a server that answers some of the time is not one to wait for

        try:
            while True:
                last_look = over()  # before the step: what was written until now is sent
                if retry(step) == 0:
                    if sender.ended or last_look:
                        return 0
                    time.sleep(_POLL_SECONDS)
        except tenacity.RetryError:
            return sender.unsent


def main() -> int:
    """The child process: sends until the run has finished or its trainer is gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--patience", type=float, required=True)
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s tracking: %(message)s", level=logging.WARNING)
    logging.raiseExceptions = False  # the terminal may be gone before us
    os.nice(10)  # the training comes first
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # the retries here are ours,
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # and so is their warning

    def orphaned() -> bool:
        return os.getppid() != args.parent

    uri = os.environ["MLFLOW_TRACKING_URI"]
    return 1 if replay(args.output, uri, orphaned, args.patience) else 0


def read_run(folder: Path) -> dict[str, str]:
    """``run_id`` and ``uri`` of the run that this journal was sent to; empty before that."""
    return _read_json(folder / "run.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def read_progress(folder: Path, uri: str) -> tuple[str | None, int, list[int]]:
    """The run's id at this server, the last sequence number it acknowledged, and those of earlier
    artifacts that it has not.

    Another server knows nothing of what this one was sent.
    """
    run = read_run(folder)
    if run.get("uri") != mlflow_env.public(uri):
        return None, 0, []
    sent = _read_json(folder / "sent.json")
    return run["run_id"], int(sent.get("sequence", 0)), list(sent.get("owed", []))
