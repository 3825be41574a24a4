"""Runs a suite on a checkpoint: the entries without a result, each kept as soon as it ends.

Every rank calls it. Rank 0 alone looks at the results folder, decides what is missing, and writes;
it tells the others, errors included, so that no rank waits for one that has left.
"""

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain import comm, config, export, storage
from pretrain.ckpt_tools import choose
from pretrain.data.evalset import look
from pretrain.data.loader import DataConfig
from pretrain.data.setconfig import SetConfig
from pretrain.errors import ConfigError, DataError, PretrainError
from pretrain.evaluators.base import Kept, Result, Subject
from pretrain.inference import Heads
from pretrain.results import Finished, Folder, Model, Scorecard, finite
from pretrain.run_config import RunConfig
from pretrain.scorecard_log import ScorecardLog
from pretrain.stop import REQUEUE_EXIT_CODE, Stop, Stopped
from pretrain.suite import Entry, Suite
from pretrain.tracking import TrackingConfig


@dataclass(frozen=True)
class Choice:
    """Which model of a run is scored, as asked for.

    Attributes:
        output: the run's folder.
        which, weights: see `export.load_task`.
        overrides: ``field=value`` over the run's configuration.
    """

    output: str
    which: str = "newest"
    weights: str | None = None
    overrides: tuple[str, ...] = ()

    def settings(self, tree: Mapping[str, Any]) -> RunConfig:
        """The configuration saved with a checkpoint, with the overrides.

        Raises:
            ConfigError: a bad override.
        """
        for text in self.overrides:
            tree = config.merge(tree, config.parse_override(text))
        return config.build(RunConfig, tree)


@dataclass(frozen=True)
class Plan:
    """What is to be done; made on rank 0, the same on all.

    Attributes:
        keys: of each entry, by name.
        done: entries that have a result, by name.
    """

    model: Model
    data: DataConfig
    tracking: TrackingConfig
    keys: dict[str, str]
    done: dict[str, Finished]


def plan(suite: Suite, choice: Choice, folder: Folder) -> Plan:
    """What of a suite has results and what has not. Loads no weights.

    Raises:
        ConfigError: bad overrides.
        CheckpointError: no such checkpoint or weights.
        DataError: a set cannot be read.
    """
    if any(text.startswith("evaluators") for text in choice.overrides):
        raise ConfigError("--set evaluators.…: a suite's entries have settings of their own")
    checkpoint = choose(choice.output, choice.which)
    settings = choice.settings(checkpoint.run["config"])
    weights = export.weights_of(checkpoint, settings, choice.weights)
    model = Model(
        settings.name,
        str(Path(choice.output).absolute()),
        checkpoint.folder.name,
        checkpoint.samples,
        weights,
    )
    identity = {
        "checkpoint": storage.sha256(str(checkpoint.folder / "manifest.json")),
        "weights": weights,
        "overrides": sorted(choice.overrides),
    }
    keys = {e.name: key_of(identity, e, settings.data.read.retry) for e in suite.entries}
    found = {name: folder.finished(key) for name, key in keys.items()}
    # What an entry is called is no part of its key: a renamed one keeps its result.
    done = {n: replace(f, name=n) for n, f in found.items() if f is not None}
    return Plan(model, settings.data, settings.tracking, keys, done)


def key_of(identity: Mapping[str, Any], entry: Entry, retry: storage.Retry | None = None) -> str:
    """sha256 of all that an entry's numbers depend on: model, settings, what its sets hold, and the
    files that other settings name. Where a set lies is no part of it.

    Raises:
        DataError: a set is not there.
    """
    others = {k: v for k, v in entry.resolved().items() if k != "sets"}
    sets: dict[str, SetConfig] = getattr(entry.settings, "sets", {})
    tree = {
        **identity,
        "evaluator": entry.evaluator,
        "settings": others,
        "sets": {name: _told(name, s, retry or storage.Retry()) for name, s in sets.items()},
        "files": {text: storage.sha256(file) for text, file in sorted(_files(others))},
    }
    return storage.sha256_bytes(json.dumps(tree, sort_keys=True).encode())


def _told(name: str, config: SetConfig, retry: storage.Retry) -> dict[str, Any]:
    """Of a set what a score can depend on."""
    fields = config.model_dump(mode="json", include={"task", "class_names", "templates", "metric"})
    return fields | {"holds": look(name, config, retry).version()}


def _files(tree: Any) -> Iterator[tuple[str, str]]:
    """Texts anywhere in settings that are paths of files, or of exported models, with the file."""
    if isinstance(tree, Mapping | list):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _files(value)
    elif isinstance(tree, str) and ("/" in tree or Path(tree).suffix):
        for file in (Path(tree), Path(tree, "model.safetensors")):
            if file.is_file():
                yield tree, str(file)


def run(
    suite: Suite,
    choice: Choice,
    results: str | Path,
    only: Collection[str] = (),
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Run what has no result yet. Collective.

    Args:
        only: names of entries to run, of a sweep's too; all without any.

    Returns:
        The process's exit code: 0 when each of them has a result, 75 when a signal stopped it.

    Raises:
        PretrainError: as `plan`, and what an evaluator raises; the same on every rank.
    """
    folder, main = Folder(results), comm.is_main()
    todo: Plan = _on_main(lambda: plan(suite, choice, folder))
    stop = Stop()
    stop.share(folder.path / "control")
    done = dict(todo.done)
    missing = [e for e in suite.chosen(only) if e.name not in done]
    say = say if main else lambda text: None
    say(f"[suite] {suite.name}: {len(missing)} entries to run, {len(done)} have results")

    def write() -> None:
        ended = tuple(done[e.name] for e in suite.entries if e.name in done)
        folder.write(Scorecard(suite.name, todo.model, ended))

    if main:
        write()
    log = ScorecardLog(choice.output, todo.tracking, folder, todo.model.samples, say)
    try:
        if missing:
            for entry in missing:  # before the first has taken its time
                _check(entry, todo.data, stop)
            choice = replace(choice, which=str(todo.model.samples))  # a newer one may come to be
            parts = export.load_task(choice.output, which=choice.which, weights=choice.weights)
            task, saved, tokenizer, _ = parts
            settings = choice.settings(saved.model_dump(mode="json"))
            task, kept = task.to(comm.device()).eval(), Kept()
        for number, entry in enumerate(missing, 1):
            if stop.agreed():
                raise Stopped
            say(f"[suite] {number}/{len(missing)} {entry.name} ({entry.evaluator})")
            key = todo.keys[entry.name]
            subject = Subject(
                task=task,
                heads=Heads(task.model, settings.inference, task.conditions),
                tokenizer=tokenizer,
                data=settings.data,
                folder=folder.files(entry.name, key),
                samples=todo.model.samples,
                rank=comm.rank(),
                world=comm.world_size(),
                pulse=stop.seen,
                scratch=folder.scratch(key),
                kept=kept,
            )
            ended = _run(entry, key, subject, folder)
            if main:
                done[entry.name] = ended
                folder.keep(ended)
                shutil.rmtree(folder.scratch(key), ignore_errors=True)
                write()
                log.add(done)
                say(f"[suite] {number}/{len(missing)} {entry.name}: {summary(ended)}")
    except Stopped:
        say("[suite] stopped; the same command goes on with what is left")
        return REQUEUE_EXIT_CODE
    finally:
        log.close(done)
    say(
        f"[suite] {len(done)} of {len(suite.entries)} entries have results: "
        f"{folder.path / 'results.json'}"
    )
    return 0


def summary(entry: Finished) -> str:
    """An entry's result on one line."""
    told = [f"{k} {v:.4g}" for k, v in entry.metrics.items() if v is not None and "cost/" not in k]
    more = f" (and {len(told) - 4} more)" if len(told) > 4 else ""
    shown = f"{', '.join(told[:4])}{more}" or f"files: {', '.join(entry.files) or 'none'}"
    return f"{entry.seconds:.1f} s  {shown}"


def _check(entry: Entry, data: DataConfig, stop: Stop) -> None:
    """Find what is wrong with an entry's sets and files, on every rank. Collective."""
    said = None
    try:
        entry.build().check(data, stop.seen)
    except PretrainError as error:
        said = str(error)
    wrong = [text for text in comm.gather_objects(said) if text]
    if wrong:
        raise DataError(f"entries.{entry.name}: {wrong[0]}")


def _run(entry: Entry, key: str, subject: Subject, folder: Folder) -> Finished:
    """Evaluate, and write what belongs to the result but the result itself."""
    assert subject.scratch is not None
    if comm.is_main():
        shutil.rmtree(subject.folder, ignore_errors=True)  # left half written by a killed one
        subject.folder.mkdir(parents=True)
        subject.scratch.mkdir(parents=True, exist_ok=True)
    comm.barrier()
    began = time.monotonic()
    result: Result = entry.build().run(subject)
    comm.barrier()  # the scratch is removed after this
    details = None
    if comm.is_main() and result.details is not None:
        path = subject.folder / "details.json"
        storage.write_bytes(str(path), json.dumps(_plain(result.details)).encode())
        details = str(path.relative_to(folder.path))
    settings = entry.resolved() | ({"sets": entry.sets} if entry.sets else {})
    return Finished(
        name=entry.name,
        evaluator=entry.evaluator,
        settings=settings,
        key=key,
        seconds=round(time.monotonic() - began, 3),
        ranks=comm.world_size(),
        metrics=finite(result.metrics),
        files=[str(Path(f).relative_to(folder.path)) for f in result.files],
        details=details,
    )


def _plain(tree: Any) -> Any:
    """Mappings and tuples as JSON knows them; numbers that are not finite as None."""
    if isinstance(tree, Mapping):
        return {str(k): _plain(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(v) for v in tree]
    if isinstance(tree, float) and not (abs(tree) < float("inf")):
        return None
    return tree


def _on_main(made: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank; its error too. Collective."""
    found: Any = None
    if comm.is_main():
        try:
            found = made()
        except PretrainError as error:
            found = error
    found = comm.broadcast_object(found)
    if isinstance(found, PretrainError):
        raise found
    return found
