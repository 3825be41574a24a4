"""The journal survives kills, torn lines and a full disk, and its sequence has no gap."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.tracking.base import RunInfo
from pretrain.tracking.journal import Event, Journal, JournalReader, flatten


def read(output: Path) -> list[Event]:
    return JournalReader(output / "journal" / "events.jsonl").read()


def test_events_come_back_as_written(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.start(RunInfo("a", "b", str(tmp_path), {"host": "h"}))
    journal.params({"optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}, "note": "ä"})
    journal.metrics({"loss": 0.5, "bad": math.nan, "worse": -math.inf}, samples=128)
    journal.artifact(str(tmp_path / "grids" / "0.png"), "grids")
    journal.artifact("/elsewhere/x")
    journal.finish("preempted")
    events = read(tmp_path)
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.kind for event in events] == [
        "start",
        "params",
        "metrics",
        *["artifact"] * 2,
        "finish",
    ]
    assert events[0].payload["tags"] == {"host": "h"}
    assert events[1].payload == {
        "optimizer.lr": "0.001",
        "optimizer.betas": "[0.9, 0.99]",
        "note": "ä",
    }
    values = events[2].payload["values"]
    assert values["loss"] == 0.5 and math.isnan(values["bad"]) and values["worse"] == -math.inf
    assert events[2].payload["samples"] == 128
    assert events[3].payload == {
        "path": "grids/0.png",
        "folder": "grids",
    }  # the folder may be moved
    assert events[4].payload["path"] == "/elsewhere/x"
    assert events[5].payload == {"status": "preempted"}


def test_any_torn_end_is_cut_off_and_the_sequence_goes_on(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    for i in range(3):
        journal.metrics({"loss": float(i)}, samples=i)
    whole = journal.path.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for cut in range(last, len(whole)):
        journal.path.write_bytes(whole[:cut])
        assert len(read(tmp_path)) == 2
        Journal(str(tmp_path)).metrics({"loss": 9.0}, samples=9)
        events = read(tmp_path)
        assert [event.sequence for event in events] == [1, 2, 3], f"cut at byte {cut}"
        assert events[-1].payload["values"] == {"loss": 9.0}


def test_a_reader_goes_on_where_it_stopped(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    reader = JournalReader(journal.path)
    for i in range(5):
        journal.metrics({}, samples=i)
    assert [event.sequence for event in reader.read(limit=2)] == [1, 2]
    assert [event.sequence for event in reader.read()] == [3, 4, 5]
    with journal.path.open("ab") as stream:
        stream.write(b'{"sequence": 6, "time": 0, "kind": "met')  # a write under way
        stream.flush()
        assert reader.read() == []
        stream.write(b'rics", "payload": {}}\n')
    assert [event.sequence for event in reader.read()] == [6]


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    for i in range(3):
        journal.metrics({}, samples=i)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + b"\x00" * 40 + b"\n" + lines[2])
    assert [event.sequence for event in read(tmp_path)] == [1, 3]
    assert Journal(str(tmp_path)).sequence == 3


def test_a_full_disk_loses_events_but_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(str(tmp_path))
    journal.metrics({}, samples=0)
    stream = journal._stream
    with open("/dev/full", "wb", buffering=0) as full:
        journal._stream = full
        journal.metrics({}, samples=1)
        journal.metrics({}, samples=2)
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text
    stream.write(b'{"sequence": 2, "ti')  # the part of the line that still had room
    journal._stream = stream
    journal.metrics({}, samples=3)
    assert [(e.sequence, e.payload["samples"]) for e in read(tmp_path)] == [(1, 0), (2, 3)]


def test_a_killed_writer_leaves_a_readable_journal(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from pretrain.tracking.journal import Journal\n"
        f"journal = Journal({str(tmp_path)!r})\n"
        "print('open', flush=True)\n"
        "for n in range(2000): journal.metrics({'loss': 1.0, 'text' * 300: 2.0}, samples=n)\n"
        "time.sleep(600)\n"  # (a test that is late must not find gigabytes)
    )
    for _ in range(2):  # killed, resumed, killed
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"open\n"
            path = tmp_path / "journal" / "events.jsonl"
            enough = path.stat().st_size + 50 * 1500
            while path.stat().st_size < enough:
                time.sleep(0.001)
            child.send_signal(signal.SIGKILL)
    sequences = [event.sequence for event in read(tmp_path)]
    assert len(sequences) > 90
    assert sequences == list(range(1, len(sequences) + 1))
    assert Journal(str(tmp_path)).sequence == len(sequences)


def test_a_place_that_cannot_be_appended_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output='s3://bucket/run' is remote"):
        Journal("s3://bucket/run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Journal(str(tmp_path / "file"))


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": None}}, "d": [1, {"e": 2}]}) == {
        "a.b.c": "None",
        "d": "[1, {'e': 2}]",
    }


def test_what_a_killed_run_does_again_is_written_once(tmp_path: Path) -> None:
    first = Journal(str(tmp_path))
    for samples in (16, 32, 48):
        values = {"loss": 1 / samples, "speed": 10.0, "bad": math.nan}
        first.metrics(values, samples)
    second = Journal(str(tmp_path))  # from the checkpoint at 16
    second.metrics({"loss": 1 / 32, "speed": 11.0, "bad": math.nan}, 32)  # to the bit, but for time
    second.metrics({"loss": 1 / 48}, 48)  # nothing new
    second.metrics({"loss": 0.9, "speed": 10.0, "bad": 1.0}, 48)  # after a rewind
    second.metrics({"loss": 1 / 48}, 64)  # another sample
    told = [(e.payload["samples"], e.payload["values"]) for e in read(tmp_path)[3:]]
    assert told == [(32, {"speed": 11.0}), (48, {"loss": 0.9, "bad": 1.0}), (64, {"loss": 1 / 48})]
    # A reader takes what was told last, so what was true before the last telling is told again.
    Journal(str(tmp_path)).metrics({"loss": 1 / 48}, 48)
    assert read(tmp_path)[-1].payload["values"] == {"loss": 1 / 48}


def test_a_clock_that_is_behind_changes_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now in (1000.0, 900.0, 1100.0):  # three hosts of a requeued run
        monkeypatch.setattr(time, "time", lambda now=now: now)
        Journal(str(tmp_path)).metrics({"loss": now}, samples=1)
    assert [event.time for event in read(tmp_path)] == [1000.0, 1000.0, 1100.0]


def test_a_run_keeps_its_id_and_no_other_has_it(tmp_path: Path) -> None:
    ids = []
    for folder in ("a", "a", "b"):
        journal = Journal(str(tmp_path / folder))
        journal.start(RunInfo("same", "same", "/same"))
        ids.append(read(tmp_path / folder)[-1].payload["id"])
    assert ids[0] == ids[1] != ids[2]
