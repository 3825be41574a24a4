"""What a report tells of a run: read from the files it left, never from a server."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain import results
from pretrain.checkpoint import list_committed
from pretrain.errors import CheckpointError, DataError
from pretrain.parts import Parts
from pretrain.results import Finished, Scorecard
from pretrain.tracking.journal import JournalReader
from pretrain.train import FINISHED

Series = dict[str, list[tuple[int, float]]]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Run:
    """One column of a report.

    Attributes:
        number: 0, 1, … in the order given.
        name: the output folder's.
        output: that folder.
        folder: of its results.
        config: resolved; empty if it left none.
        series: every metric of training and of evaluations in it, as (samples, value).
        progress: at the end of training; empty of a run that has not finished.
        parameters: of the model; None where no checkpoint says it.
        scorecard: None if there is none.
    """

    number: int
    name: str
    output: Path
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    scorecard: Scorecard | None = None

    @property
    def letter(self) -> str:
        """Its short name on the page."""
        return LETTERS[self.number]

    @property
    def samples(self) -> int | None:
        """Seen by the model that was scored; else at the end of training, or at the last log."""
        if self.scorecard:
            return self.scorecard.model.samples
        last = max((s[-1][0] for s in self.series.values() if s), default=None)
        return self.progress.get("samples", last)

    def entries(self, evaluator: str | None = None) -> list[Finished]:
        """Entries of its scorecard, of one evaluator or of all."""
        found = self.scorecard.entries if self.scorecard else ()
        return [e for e in found if evaluator in (None, e.evaluator)]


@dataclass(frozen=True)
class Details:
    """What an entry of a run says of one set beside its numbers.

    Attributes:
        set: its name; empty where the evaluator gives none.
    """

    run: Run
    entry: Finished
    set: str
    fields: Mapping[str, Any]


def load(paths: Sequence[str]) -> list[Run]:
    """The runs of a report.

    Args:
        paths: output folders of runs, or folders of results.

    Raises:
        DataError: one is neither, or there are more than letters.
    """
    if len(paths) > len(LETTERS):
        raise DataError(f"{len(paths)} runs: a report shows {len(LETTERS)} at most; name fewer")
    return [_load(number, Path(path)) for number, path in enumerate(paths)]


def details(runs: Sequence[Run], evaluator: str) -> Iterator[Details]:
    """Details of every entry of an evaluator, one set at a time.

    Raises:
        DataError: a file of details cannot be read.
    """
    for run in runs:
        for entry in run.entries(evaluator):
            if entry.details is None:
                continue
            path = run.folder / entry.details
            try:
                tree = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(
                    f"details={str(path)!r} cannot be read ({error}); remove "
                    f"{run.folder / 'entries' / entry.key}.json and evaluate again"
                ) from None
            for name, fields in tree.get("sets", {tree.get("set", ""): tree}).items():
                yield Details(run, entry, name, fields)


def _load(number: int, path: Path) -> Run:
    folder = path if (path / results.RESULTS).exists() else path / "scorecard"
    scorecard = results.read(folder) if (folder / results.RESULTS).exists() else None
    output = path
    if folder == path and scorecard:
        # The run may have moved with its results in it.
        beside = (path.parent / "config.json").exists()
        output = path.parent if beside else Path(scorecard.model.output)
    config = _json(output / "config.json")
    if not config and not scorecard:
        raise DataError(
            f"run={str(path)!r} holds neither config.json nor results.json; give the output folder "
            "of a run, or a folder of results of `evaluate --suite`"
        )
    name = output.absolute().name
    if folder == path:
        name = f"{name}/{path.absolute().name}"
    return Run(
        number=number,
        name=name,
        output=output,
        folder=folder,
        config=config,
        series=_series(output),
        progress=_json(output / FINISHED).get("progress", {}),
        parameters=_parameters(output),
        scorecard=scorecard,
    )


def _series(output: Path) -> Series:
    found: dict[str, dict[int, float]] = {}

    def add(samples: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)) and not name.startswith("scorecard/"):
                found.setdefault(name, {})[samples] = float(value)

    # After a rewind or a resume the later telling of the same samples holds.
    for event in JournalReader(output / "journal" / "events.jsonl").read():
        if event.kind == "metrics":
            add(event.payload["samples"], event.payload["values"])
    path = output / "evaluations.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        tree = json.loads(line)
        add(tree.pop("samples"), tree)
    return {name: sorted(points.items()) for name, points in found.items()}


def _parameters(output: Path) -> int | None:
    try:
        shapes = Parts(list_committed(output / "checkpoints")[-1].folder).shapes
    except (CheckpointError, IndexError, OSError, KeyError):
        return None
    total = 0
    for shape in shapes.values():
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
