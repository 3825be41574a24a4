"""A run's story on the local disk: one JSON line an event, written before anything is sent.

A process that dies in a write leaves a torn last line; readers pass over it, and the next writer
cuts it off.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.storage import is_remote
from pretrain.tracking.base import RunInfo, Status

_log = logging.getLogger(__name__)

_REMEMBERED = 4096  # metrics events: more than a killed run does again after its last checkpoint


@dataclass(frozen=True)
class Event:
    """One line of a journal.

    Attributes:
        sequence: 1, 2, 3, ... over the whole life of the output folder.
        time: seconds since the epoch; never less than the event's before, whatever the clock does.
        kind: start, params, metrics, artifact or finish.
        payload: what that method of the tracker was given.
    """

    sequence: int
    time: float
    kind: str
    payload: dict[str, Any]


def folder(output: str) -> Path:
    """Where the journal of a run with this output folder is.

    Raises:
        ConfigError: ``output`` is not on a local disk; a journal must be appended to.
    """
    if is_remote(output):
        raise ConfigError(
            f"output={output!r} is remote, but a run's journal is appended to; give a local folder"
        )
    return Path(output.removeprefix("file://")).absolute() / "journal"


class JournalReader:
    """Reads events in order, and goes on where it stopped when the file has grown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0  # bytes of complete lines read so far

    def read(self, limit: int | None = None) -> list[Event]:
        """Up to ``limit`` more events; a line without its end waits, a damaged one is skipped."""
        events: list[Event] = []
        if not self.path.exists():
            return events
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            for line in stream:
                if not line.endswith(b"\n") or (limit is not None and len(events) == limit):
                    break
                self.offset += len(line)
                try:
                    events.append(Event(**json.loads(line)))
                except (ValueError, TypeError):
                    if line.strip():
                        _log.warning("%s: a damaged line before byte %d", self.path, self.offset)
        return events


class Journal:
    """A tracker that only writes the journal; others replay it. Threads may call it."""

    def __init__(self, output: str, uri: str | None = None) -> None:
        """Open the journal of ``output``; an earlier one goes on with its next sequence number.

        Args:
            output: the run's output folder.
            uri: the server that the run is meant for, without password; kept with its start.

        Raises:
            ConfigError: ``output`` is not a local folder that can be written.
        """
        self.folder = folder(output)
        self.meant_for = uri
        self.path = self.folder / "events.jsonl"
        self.sequence, self.id = 0, ""
        self._time = 0.0
        # What earlier attempts wrote last of metrics, {samples: {name: value as text}}.
        self._before: dict[int, dict[str, str]] = {}
        reader = JournalReader(self.path)
        while events := reader.read(1000):
            for event in events:
                self._take_up(event)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("ab", buffering=0)  # a line reaches the system at once
            self._stream.truncate(reader.offset)  # the torn line of a process that was killed
        except OSError as error:
            raise ConfigError(
                f"output={output!r} cannot be written ({error.strerror}); give another folder"
            ) from None
        self._lock = threading.Lock()
        self._torn = False
        self._warned = False

    def start(self, run: RunInfo) -> None:
        """Write who the run is."""
        # Two clusters may have output folders of one name.
        self.id = self.id or uuid.uuid4().hex
        payload = {"name": run.name, "experiment": run.experiment, "tags": dict(run.tags)}
        payload |= {"id": self.id, "output": str(self.folder.parent)}
        self._write("start", {**payload, "uri": self.meant_for})

    def params(self, params: Mapping[str, Any]) -> None:
        """Write settings under dotted names."""
        self._write("params", flatten(params))

    def metrics(self, metrics: Mapping[str, float], samples: int) -> None:
        """Write scalars; NaN and infinities are kept as Python's JSON spells them.

        A killed run does again what it had done since its last checkpoint: a value that an earlier
        attempt wrote last under this name at this sample is not written again.
        """
        before = self._before.get(int(samples), {})
        values = {name: float(value) for name, value in metrics.items()}
        fresh = {n: value for n, value in values.items() if repr(value) != before.get(n)}
        before |= {name: repr(value) for name, value in fresh.items()}
        if fresh or not values:
            self._write("metrics", {"samples": int(samples), "values": fresh})

    def artifact(self, path: str, folder: str = "") -> None:
        """Write where a file is: relative if it is in the output folder, so that this may move."""
        absolute, output = Path(path).absolute(), self.folder.parent
        inside = absolute.is_relative_to(output)
        where = str(absolute.relative_to(output) if inside else absolute)
        self._write("artifact", {"path": where, "folder": folder})

    def finish(self, status: Status) -> None:
        """Write how the run ended."""
        self._write("finish", {"status": status})

    def _take_up(self, event: Event) -> None:
        """Know an event of an earlier attempt."""
        self.sequence = max(self.sequence, event.sequence)
        self._time = max(self._time, event.time)
        if event.kind == "start":
            self.id = self.id or event.payload.get("id", "")
        if event.kind == "metrics":
            samples = event.payload["samples"]
            names = self._before.pop(samples, {})  # the newest stand last
            for name, value in event.payload["values"].items():
                names[name] = repr(value)
            self._before[samples] = names
            if len(self._before) > _REMEMBERED:
                del self._before[next(iter(self._before))]

    def _write(self, kind: str, payload: dict[str, Any]) -> None:
        with self._lock:
            # A requeued run may be on a host whose clock is behind; MLflow orders by time.
            self._time = max(self._time, time.time())
            event = Event(self.sequence + 1, self._time, kind, payload)
            line = json.dumps(vars(event), default=str).encode() + b"\n"
            line = b"\n" + line if self._torn else line
            try:
                if self._stream.write(line) < len(line):
                    raise OSError("the disk is full")
                self._torn = False
                self.sequence = event.sequence
            except OSError as error:  # a full disk must not end the training
                self._torn = True
                if not self._warned:
                    _log.warning("%s cannot be written (%s); events are lost", self.path, error)
                    self._warned = True


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` as ``{"a.b": "1"}``; lists stay one value."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
