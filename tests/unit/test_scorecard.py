"""`evaluate --suite`: what it leaves, what it does again and what not, killed at any point; on two
ranks as on one."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pretrain import results, scorecard, storage
from pretrain import suite as suites
from pretrain.data import clipfolder
from pretrain.errors import DataError
from pretrain.evaluators import retrieval, zero_shot
from pretrain.evaluators.base import Result, Subject
from pretrain.tracking.journal import JournalReader
from tests.support import ranks, scored, weights
from tests.support.clipset import write_folder

EVALUATE = "tests.support.scored:evaluate"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a set and a suite of four entries; results are made elsewhere."""
    folder = tmp_path_factory.mktemp("made")
    scored.make_run(folder / "run")
    manifest = scored.make_set(folder / "set")
    scored.make_suite(folder / "suite.yaml", manifest)
    return folder


@pytest.fixture(scope="module")
def finished(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one rank."""
    folder = tmp_path_factory.mktemp("finished") / "results"
    assert evaluate(made, folder) == 0
    return folder


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The suite's runner answers signals; pytest shall have its own again."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in kept.items():
        signal.signal(number, handler)


def arguments(made: Path, folder: Path, *more: str) -> list[str]:
    run, suite = str(made / "run"), str(made / "suite.yaml")
    return ["--output", run, "--suite", suite, "--results", str(folder), *more]


def evaluate(made: Path, folder: Path, *more: str) -> int:
    return scored.evaluate(*arguments(made, folder, *more))


def entries(folder: Path) -> dict[str, results.Finished]:
    return {e.name: e for e in results.read(folder).entries}


def same(a: results.Finished, b: results.Finished) -> bool:
    """But for what a clock and the number of ranks say."""
    cost = {k for e in (a, b) for k in e.metrics if k.startswith("cost/")}
    x, y = ({k: v for k, v in e.metrics.items() if k not in cost} for e in (a, b))
    return (a.name, a.settings, a.key, a.files) == (b.name, b.settings, b.key, b.files) and (
        x == pytest.approx(y, abs=1e-6)
    )


def test_results_are_what_the_format_says(made: Path, finished: Path) -> None:
    tree = json.loads((finished / "results.json").read_text())
    assert tree["version"] == 1 and tree["suite"] == "tried"
    assert tree["model"] == {
        "name": "diffdis-debug",
        "output": str(made / "run"),
        "checkpoint": "samples-000000000160",
        "samples": scored.SAMPLES,
        "weights": "weights",
    }
    names = ["swept[noises=1]", "swept[noises=2]", "found", "drawn"]
    assert [e["name"] for e in tree["entries"]] == names
    for entry in tree["entries"]:
        keys = "name evaluator settings key seconds ranks metrics files details"
        assert list(entry) == keys.split()
        assert entry["ranks"] == 1 and entry["seconds"] >= 0
        assert len(entry["key"]) == 64 and (finished / f"entries/{entry['key']}.json").exists()
        for file in [*entry["files"], *filter(None, [entry["details"]])]:
            assert file.startswith("files/") and (finished / file).is_file()
    swept, drawn = tree["entries"][1], tree["entries"][3]
    assert swept["settings"]["noises"] == 2
    assert swept["settings"]["sets"]["small"]["manifest"].endswith("small.json")
    assert 0 <= swept["metrics"]["zero_shot/small/top1"] <= 1
    assert drawn["files"] and not drawn["metrics"]
    assert not any((finished / "scratch").iterdir())
    # The same images with the same chain are embedded once for all entries.
    took = [tree["entries"][i]["metrics"]["cost/small/seconds"] for i in (0, 1, 2)]
    assert took[0] == took[2] != took[1]


def test_the_table_has_a_row_for_each_metric(finished: Path) -> None:
    table = pq.read_table(finished / "results.parquet").to_pylist()
    columns = "suite model checkpoint samples weights entry evaluator settings metric value"
    assert list(table[0]) == columns.split()
    found = {(row["entry"], row["metric"]): row["value"] for row in table}
    expected = {(n, k): v for n, e in entries(finished).items() for k, v in e.metrics.items()}
    assert found == expected and len(found) == len(table)
    assert all(json.loads(row["settings"])["steps"] == 1 for row in table)
    assert {row["samples"] for row in table} == {scored.SAMPLES}


def test_what_has_a_result_does_not_run_again(
    made: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(finished, folder)
    before = entries(folder)
    # Without loading the model, even.
    monkeypatch.setattr("pretrain.export.load_task", None)
    assert evaluate(made, folder) == 0
    assert entries(folder) == before
    capsys.readouterr()
    assert evaluate(made, folder, "--list") == 0
    said = capsys.readouterr().out
    assert said.count("done ") == 4 and "to run" not in said
    monkeypatch.undo()
    # Another setting, another result; the others stay.
    assert evaluate(made, folder, "--set", "data.bucket_multiple=4", "--list") == 0
    assert capsys.readouterr().out.count("to run") == 4
    (folder / f"entries/{before['found'].key}.json").unlink()
    assert evaluate(made, folder, "--only", "swept", "--list") == 0
    assert capsys.readouterr().out.count("done ") == 2
    assert evaluate(made, folder) == 0
    assert all(same(e, before[n]) for n, e in entries(folder).items())


def test_a_set_that_has_changed_is_scored_anew(made: Path, tmp_path: Path, capsys: Any) -> None:
    manifest = scored.make_set(tmp_path / "set")
    quick = {"evaluator": "zero_shot", "sets": ["small"], "steps": 1, "noises": 1}
    scored.make_suite(tmp_path / "suite.yaml", manifest, only=quick)
    call = ["--output", str(made / "run"), "--suite", str(tmp_path / "suite.yaml")]
    call += ["--results", str(tmp_path / "results")]
    assert scored.evaluate(*call) == 0
    shutil.rmtree(tmp_path / "set")
    scored.make_set(tmp_path / "set", pictures=5)
    capsys.readouterr()
    assert scored.evaluate(*call, "--list") == 0
    assert "to run" in capsys.readouterr().out
    (tmp_path / "set/small.json").unlink()
    assert scored.evaluate(*call) == 2
    assert "small.json" in capsys.readouterr().err


def test_a_file_that_a_setting_names_is_part_of_the_key(made: Path, tmp_path: Path) -> None:
    """Such as a validation's manifest, or an exported model: by content, not by name."""
    manifest = scored.make_set(tmp_path / "set")
    entry = {"evaluator": "validation", "manifest": manifest}
    identity = {"checkpoint": "c"}

    def key() -> str:
        path = scored.make_suite(tmp_path / "suite.yaml", manifest, losses=entry)
        return scorecard.key_of(identity, suites.load(path).entries[0])

    first = key()
    assert key() == first
    shutil.rmtree(tmp_path / "set")
    scored.make_set(tmp_path / "set", pictures=5)
    assert key() != first
    model = tmp_path / "judge"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    assert dict(
        scorecard._files({"judge": str(model), "x": ["owl", str(tmp_path / "no.bin")]})
    ) == {str(model): str(model / "model.safetensors")}


def test_a_folders_key_is_of_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts, shards and split of a folder in clip-benchmark's form; not its place or its title."""

    def key(**fields: Any) -> str:
        sets = {"pets": {"url": str(tmp_path / "wds"), **fields}}
        entry = {"evaluator": "zero_shot", "sets": ["pets"]}
        tree = {"name": "s", "sets": sets, "entries": {"e": entry}}
        (tmp_path / "suite.yaml").write_text(json.dumps(tree))
        return scorecard.key_of({}, suites.load(tmp_path / "suite.yaml").entries[0])

    write_folder(tmp_path / "wds", ["0", "1", "2"])
    first = key()
    assert key() == first == key(title="Pets")
    shutil.copytree(tmp_path / "wds", tmp_path / "moved")
    assert key(url=str(tmp_path / "moved")) == first
    assert key(templates=["{c}"]) != first
    # A page of the hub: small files are below `raw`, tars below `resolve`.
    monkeypatch.setattr(clipfolder, "HUB", f"{tmp_path}/hub/")
    shutil.copytree(tmp_path / "wds", tmp_path / "hub/user/pets/resolve/main")
    raw = tmp_path / "hub/user/pets/raw/main"
    shutil.move(tmp_path / "wds", raw)
    for tar in raw.rglob("*.tar"):
        tar.unlink()
    page = f"{tmp_path}/hub/user/pets/tree/main"
    assert key(url=page) == first
    (raw / "classnames.txt").write_text("cat\ndog\nowls\n")
    assert key(url=page) != first
    with pytest.raises(DataError, match=r"gone/test/nshards\.txt does not exist"):
        key(url=str(tmp_path / "gone"))


def test_what_is_wrong_with_the_last_entry_is_told_before_the_first(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("pretrain.export.load_task", None)
    good = {"evaluator": "retrieval", "sets": ["small"]}
    drawn = {"evaluator": "generation", "sets": ["small"]}
    lost = {"kind": "squeezenet", "path": "/nowhere.h5"}
    manifest = str(made / "set/small.json")
    suite = scored.make_suite(tmp_path / "s.yaml", manifest, a=good, b={**drawn, "features": lost})
    call = ["--output", str(made / "run"), "--suite", str(suite), "--results", str(tmp_path / "r")]
    assert scored.evaluate(*call, "--list") == 0  # which needs no weights
    assert capsys.readouterr().out.count("to run") == 2
    assert scored.evaluate(*call) == 2
    assert "entries.b: features.path='/nowhere.h5' is not there" in capsys.readouterr().err


def test_generation_over_a_folder_leaves_no_scratch(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_folder(tmp_path / "wds", [str(i % 3) for i in range(12)])
    path = weights.write_safetensors(tmp_path / "squeezenet.safetensors")
    entry = {"evaluator": "generation", "sets": ["pets"], "images": 4, "chunk": 2, "steps": 2}
    entry |= {"neighbours": 2, "kid_subsets": 2, "features": {"path": path}}
    tree = {"name": "s", "sets": {"pets": url}, "entries": {"drawn": entry}}
    (tmp_path / "suite.yaml").write_text(json.dumps(tree))
    kept: list[str] = []
    inner = storage.write_bytes

    def written(url: str, *data: Any) -> None:
        kept.append(url)
        inner(url, *data)

    monkeypatch.setattr(storage, "write_bytes", written)
    folder = tmp_path / "results"
    call = ["--output", str(made / "run"), "--suite", str(tmp_path / "suite.yaml")]
    assert scored.evaluate(*call, "--results", str(folder)) == 0
    pieces = [p for p in kept if p.startswith(str(folder / "scratch"))]
    assert len([p for p in pieces if "/reals/" in p]) == 1
    assert len([p for p in pieces if "/generation-" in p]) == 2
    assert not any((folder / "scratch").iterdir())
    (done,) = results.read(folder).entries
    assert done.metrics["generation/pets/kid"] is not None
    details = json.loads((folder / str(done.details)).read_text())
    assert details["set"] == "pets" and details["notes"]
    assert {s["prompt"] for s in details["samples"]} <= {"cat", "dog", "owl"}


def test_bad_choices_are_told_before_anything_is_loaded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("pretrain.export.load_task", None)
    for more, said in [
        (["--checkpoint", "7"], "checkpoint='7'"),
        (["--weights", "ema-7"], "weights='ema-7'"),
        (["--only", "swebt"], "did you mean 'swept'"),
        (["--set", "evaluators.samples.steps=2"], "entries have settings of their own"),
        (["--set", "inference.stebs=2"], "stebs"),
    ]:
        assert evaluate(made, tmp_path, *more) == 2
        assert said in capsys.readouterr().err
    assert scored.evaluate("--output", str(made / "run"), "--list") == 2
    assert "--suite" in capsys.readouterr().err


def test_an_entry_that_dies_leaves_the_ones_before_it(
    made: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of the third: its half-written files are no result, its scratch stays."""
    folder = tmp_path / "results"
    seen: list[tuple[list[str], bool]] = []
    real = retrieval.Retrieval.run

    def dies(self: retrieval.Retrieval, subject: Subject) -> Result:
        assert subject.scratch is not None and subject.folder.is_dir()
        seen.append(([p.name for p in subject.folder.iterdir()], (subject.scratch / "a").exists()))
        (subject.folder / "half.png").write_text("half")
        (subject.scratch / "a").write_text("finished piece")
        if len(seen) == 1:
            raise MemoryError
        return real(self, subject)

    monkeypatch.setattr(retrieval.Retrieval, "run", dies)
    with pytest.raises(MemoryError):
        evaluate(made, folder)
    assert list(entries(folder)) == ["swept[noises=1]", "swept[noises=2]"]
    again: list[str] = []
    real_zero_shot = zero_shot.ZeroShot.run
    monkeypatch.setattr(
        zero_shot.ZeroShot, "run", lambda s, x: (again.append("again"), real_zero_shot(s, x))[1]
    )
    assert evaluate(made, folder) == 0
    assert not again and seen == [([], False), ([], True)]
    assert all(same(e, entries(finished)[n]) for n, e in entries(folder).items())
    assert not any((folder / "scratch").iterdir())


def test_a_signal_stops_it_and_the_same_command_goes_on(
    made: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    # Of a process of its own: how a signal is remembered is a process's.
    with_signal = [*arguments(made, folder)]
    assert ranks.run("tests.unit.test_scorecard:stopped", 1, *with_signal) == [75]
    assert list(entries(folder)) == ["swept[noises=1]"]
    assert evaluate(made, folder) == 0
    assert all(same(e, entries(finished)[n]) for n, e in entries(folder).items())


def stopped(*arguments: str) -> int:
    """Evaluates, and gets SIGTERM in the first entry."""
    real = zero_shot.ZeroShot.run

    def run(self: zero_shot.ZeroShot, subject: Subject) -> Result:
        found = real(self, subject)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    zero_shot.ZeroShot.run = run  # type: ignore[method-assign]
    return scored.evaluate(*arguments)


def test_killed_between_entries_it_goes_on(made: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    (process,) = ranks.start(EVALUATE, 1, str(tmp_path), *arguments(made, folder))
    deadline = time.monotonic() + 60
    while not list((folder / "entries").glob("*.json")) and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    kept = len(list((folder / "entries").glob("*.json")))
    assert 1 <= kept <= 4
    for path in (folder / "entries").glob("*.json"):
        json.loads(path.read_text())
    assert evaluate(made, folder) == 0
    assert list(entries(folder)) == list(entries(finished))
    assert all(same(e, entries(finished)[n]) for n, e in entries(folder).items())


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(made: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    assert ranks.run(EVALUATE, 2, *arguments(made, folder)) == [0, 0]
    found, expected = entries(folder), entries(finished)
    assert list(found) == list(expected) and {e.ranks for e in found.values()} == {2}
    assert all(same(e, expected[n]) for n, e in found.items())
    bytes_of = lambda f, n: (f / entries(f)[n].files[0]).read_bytes()  # noqa: E731
    assert bytes_of(folder, "drawn") == bytes_of(finished, "drawn")
    # What is done is rank 0's to know; an error of its is every rank's.
    assert ranks.run(EVALUATE, 2, *arguments(made, folder)) == [0, 0]
    assert ranks.run(EVALUATE, 2, *arguments(made, folder, "--checkpoint", "7")) == [2, 2]


def metrics_in(run: Path) -> list[dict[str, float]]:
    events = JournalReader(run / "journal/events.jsonl").read()
    return [
        e.payload["values"]
        for e in events
        if e.kind == "metrics" and any(k.startswith("scorecard/") for k in e.payload["values"])
    ]


def test_metrics_go_into_the_runs_own_journal_once(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    (run / "journal/events.jsonl").write_bytes(
        b"".join(
            line
            for line in (run / "journal/events.jsonl").read_bytes().splitlines(keepends=True)
            if b"scorecard/" not in line
        )
    )
    call = ["--output", str(run), "--suite", str(made / "suite.yaml")]
    assert scored.evaluate(*call, "--only", "found") == 0
    assert scored.evaluate(*call) == 0
    assert scored.evaluate(*call) == 0
    logged = [k for values in metrics_in(run) for k in values]
    found = entries(run / "scorecard")
    expected = [f"scorecard/{n}/{k}" for n, e in found.items() for k in e.metrics]
    assert sorted(logged) == sorted(expected)
    events = JournalReader(run / "journal/events.jsonl").read()
    assert [e.sequence for e in events] == sorted({e.sequence for e in events})
    # Training was stopped and not finished: an evaluation does not change that.
    assert events[-1].kind == "finish" and events[-1].payload == {"status": "preempted"}
    steps = {e.payload["samples"] for e in events if "scorecard" in json.dumps(e.payload)}
    assert steps == {scored.SAMPLES}


def test_a_tracker_that_fails_costs_no_result(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no room for the journal")

    monkeypatch.setattr("pretrain.scorecard_log.build_tracker", fails)
    assert evaluate(made, tmp_path / "results", "--only", "drawn", "--only", "found") == 0
    assert "WARNING: not tracked (OSError: no room" in capsys.readouterr().out
    assert list(entries(tmp_path / "results")) == ["found", "drawn"]


def test_a_run_in_training_keeps_its_journal_to_itself(made: Path, tmp_path: Path) -> None:
    from pretrain.watchdog import Watchdog, WatchdogConfig

    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    before = (run / "journal/events.jsonl").read_bytes()
    call = ["--output", str(run), "--suite", str(made / "suite.yaml"), "--only", "drawn"]
    with Watchdog(run, 0, 1, WatchdogConfig()) as watchdog:
        watchdog.beat("step", 32)
        assert scored.evaluate(*call) == 0
    assert (run / "journal/events.jsonl").read_bytes() == before
    assert list(entries(run / "scorecard")) == ["drawn"]
