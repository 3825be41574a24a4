"""What a person does with a run's checkpoints: see them, check them, mend the folder, convert one.

Nothing here needs DeepSpeed, a process group or the model.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain import storage
from pretrain.checkpoint import (
    DAMAGED,
    MARKER,
    METRICS,
    RECEIPTS,
    BestConfig,
    Checkpoint,
    best,
    damage,
    list_committed,
)
from pretrain.errors import CheckpointError
from pretrain.partitions import even_part
from pretrain.parts import FORMAT, STATE, Parts, digest, file_name
from pretrain.weights import Entry, write


@dataclass(frozen=True)
class Row:
    """A checkpoint in a listing.

    Attributes:
        samples: progress.
        ranks: that wrote it.
        kinds: of state in it: weights, moments, averages.
        bytes: of all its files.
        written: seconds since 1970.
        metrics: of evaluations at this state.
        best: whether the run's ``checkpoint.best`` keeps it.
    """

    folder: Path
    samples: int
    ranks: int
    kinds: tuple[str, ...]
    bytes: int
    written: float
    metrics: dict[str, float]
    best: bool


@dataclass(frozen=True)
class Finding:
    """Something in a run's checkpoints that a person should know.

    Attributes:
        folder: where.
        what: is the matter.
        remedy: what ``doctor --fix`` does about it; None if nothing is to be done.
    """

    folder: Path
    what: str
    remedy: str | None


def folder_of(output: str | Path) -> Path:
    """The checkpoints of the run in ``output``.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = Path(output) / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(
            f"output={str(output)!r} has no folder checkpoints; give the output folder of a run"
        )
    return folder


def rows(output: str | Path) -> list[Row]:
    """Committed checkpoints, oldest first. One whose state.json cannot be read has 0 ranks."""
    found = list_committed(folder_of(output))
    champion = best(found, _best_of(found))
    return [_row(checkpoint, checkpoint is champion) for checkpoint in found]


def choose(output: str | Path, which: str = "newest") -> Checkpoint:
    """A committed checkpoint of the run in ``output``, its hashes verified.

    Args:
        which: "newest", "best" (by the run's ``checkpoint.best``), or a number of samples.

    Raises:
        CheckpointError: there is none such, or it is damaged.
    """
    found = list_committed(folder_of(output))
    if not found:
        raise CheckpointError(
            f"output={str(output)!r} holds no committed checkpoint; train it first"
        )
    chosen: Checkpoint | None = found[-1]
    if which == "best":
        by = _best_of(found)
        chosen = best(found, by)
        if chosen is None:
            raise CheckpointError(
                f"checkpoint='best': checkpoint.best={by!r} of this run names no metric that a "
                "checkpoint has; set it in the configuration, or take newest"
            )
    elif which != "newest":
        chosen = next((c for c in found if str(c.samples) == which), None)
    if chosen is None:
        raise CheckpointError(
            f"checkpoint={which!r} is not in {str(output)!r}; there are newest, best, "
            f"{', '.join(str(c.samples) for c in found)}"
        )
    problem = damage(chosen.folder)
    if problem:
        raise CheckpointError(f"checkpoint={str(chosen.folder)!r} is damaged: {problem}")
    return chosen


def verify(output: str | Path, which: str = "all") -> Iterator[tuple[Checkpoint, str | None]]:
    """Each checkpoint with what is wrong with it, or None; every byte is read.

    Args:
        which: "all", "newest" or a number of samples.

    Raises:
        CheckpointError: there is none such.
    """
    found = list_committed(folder_of(output))
    chosen = {
        "all": found,
        "newest": found[-1:],
    }.get(which, [c for c in found if str(c.samples) == which])
    if not chosen:
        known = ", ".join(str(c.samples) for c in found) or "none"
        raise CheckpointError(f"checkpoint={which!r} is not in {str(output)!r}; there are: {known}")
    for checkpoint in chosen:
        yield checkpoint, damage(checkpoint.folder)


def examine(output: str | Path) -> list[Finding]:
    """Everything unusual in a run's checkpoints. It reads every byte of the committed ones."""
    folder = folder_of(output)
    found: list[Finding] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(DAMAGED):
            found.append(Finding(path, "was put aside as damaged by a resume", "deleted"))
        elif path.name.startswith("samples-") and not (path / MARKER).exists():
            age = time.time() - path.stat().st_mtime
            what = f"was never committed: a save under way, or killed {_age(age)} ago"
            # A save that is under way now must not be deleted under its ranks.
            found.append(Finding(path, what, "deleted" if age > 3600 else None))
    whole = 0
    for checkpoint, problem in verify(output) if list_committed(folder) else ():
        if problem:
            found.append(Finding(checkpoint.folder, f"is damaged: {problem}", "put aside"))
        else:
            whole += 1
    if not whole:
        what = "holds no checkpoint that a resume could take: the run would start anew"
        found.append(Finding(folder, what, None))
    return found


def mend(findings: list[Finding]) -> None:
    """Do what the findings' remedies say."""
    for finding in findings:
        if finding.remedy == "deleted":
            shutil.rmtree(finding.folder)
        elif finding.remedy == "put aside":
            aside = finding.folder.with_name(DAMAGED + finding.folder.name)
            shutil.rmtree(aside, ignore_errors=True)
            finding.folder.rename(aside)


def convert(checkpoint: Checkpoint, to: str | Path, ranks: int) -> Path:
    """The same checkpoint as ``ranks`` ranks would have written it; a committed one.

    A resume takes any number of ranks as it is. This is for fewer or more files: one rank for tools
    that read whole parameters, as many as will read it for the fastest start.

    Raises:
        CheckpointError: it is damaged, or ``to`` holds something.
    """
    target = Path(to)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"to={str(to)!r} is not empty; give a folder that does not exist yet")
    problem = damage(checkpoint.folder)
    if problem:
        raise CheckpointError(f"checkpoint={str(checkpoint.folder)!r} is damaged: {problem}")
    parts = Parts(checkpoint.folder)
    files: dict[str, Any] = {}
    (target / RECEIPTS).mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        mine = {}
        for kind in parts.kinds:
            (target / kind).mkdir(exist_ok=True)
            name = file_name(kind, rank)
            entries = list(_entries(parts, kind, rank, ranks))
            mine[name] = write(target / name, entries, {}).facts()
        storage.write_bytes(str(target / RECEIPTS / f"rank-{rank:05d}.json"), _json(mine))
        files |= mine
    state = {
        "format": FORMAT,
        "world_size": ranks,
        "steps": parts.steps,
        "kinds": parts.kinds,
        "shapes": {name: list(shape) for name, shape in parts.shapes.items()},
    }
    for name, tree in ((STATE, state), ("run.json", checkpoint.run | {"world_size": ranks})):
        storage.write_bytes(str(target / name), _json(tree))
        files[name] = digest(target / name).facts()
    metrics = checkpoint.folder / METRICS
    if metrics.exists():
        shutil.copy(metrics, target / METRICS)
    storage.write_bytes(str(target / "manifest.json"), _json(files))
    storage.write_bytes(str(target / MARKER), b"")
    return target


def _entries(parts: Parts, kind: str, rank: int, ranks: int) -> Iterator[Entry]:
    for name, shape in parts.shapes.items():
        if not parts.has(kind, name):
            continue  # frozen: it has weights alone
        start, stop = even_part(torch.Size(shape).numel(), rank, ranks)
        if stop > start:
            yield Entry(
                name,
                torch.float32,
                (stop - start,),
                partial(parts.read, kind, name, start, stop),
            )


def _row(checkpoint: Checkpoint, champion: bool) -> Row:
    folder = checkpoint.folder
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = {"world_size": 0, "kinds": []}
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metrics = {}
    return Row(
        folder=folder,
        samples=checkpoint.samples,
        ranks=state["world_size"],
        kinds=tuple(state["kinds"]),
        bytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        written=(folder / MARKER).stat().st_mtime,
        metrics=metrics,
        best=champion,
    )


def _best_of(found: list[Checkpoint]) -> BestConfig | None:
    tree = (found[-1].run.get("config") or {}).get("checkpoint", {}).get("best") if found else None
    return BestConfig(**tree) if tree else None


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _json(tree: object) -> bytes:
    return json.dumps(tree, indent=1, sort_keys=True, default=str).encode()
