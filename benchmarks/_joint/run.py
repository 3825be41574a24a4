"""Cells of the study as real processes: train, score, one line; several at a time."""

import ctypes
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._joint import results
from benchmarks._joint.cells import PRESET, Cell
from benchmarks._joint.corpus import Corpus

ROOT = Path(__file__).resolve().parents[2]
FINISHED = "_FINISHED"
REQUEUE = 75  # a training that was asked to stop has saved, and goes on when it is started again


@dataclass(frozen=True)
class Study:
    """Where and how cells are run.

    Attributes:
        corpus: trained and scored on.
        runs: folder of the trainings.
        results: file of the lines.
        images: generated for KID.
        more: overrides of every training.
        jobs: trainings at a time, one thread each.
    """

    corpus: Corpus
    runs: Path
    results: Path
    images: int
    more: tuple[str, ...] = ()
    jobs: int = 2

    def todo(self, cells: list[Cell]) -> list[Cell]:
        """Those without a line of their own key."""
        done = results.read(self.results)
        return [cell for cell in cells if self.key(cell) not in done]

    def key(self, cell: Cell) -> str:
        """Of the cell's line."""
        return cell.key(self.corpus, self.images, self.more)

    def folder(self, cell: Cell) -> Path:
        """Of the cell's training: another configuration has another."""
        trained = cell.trained
        return (
            self.runs.resolve() / f"{trained.name}-{cell.training_key(self.corpus, self.more)[:8]}"
        )


class Stopped(Exception):
    """A training was asked to stop, and has saved."""


def run(study: Study, cells: list[Cell]) -> int:
    """Run what is left of ``cells``; 0 if all are done. A cell that fails does not end the others.

    Grids at inference wait for the trainings they are scored on: they come last.
    """
    left = study.todo(cells)
    print(f"{len(cells) - len(left)} of {len(cells)} cells are done already", flush=True)
    failed = []
    pool = ThreadPoolExecutor(study.jobs)
    try:
        for grids in (False, True):
            wave = [cell for cell in left if bool(cell.variant.of) == grids]
            waiting = {pool.submit(run_cell, study, cell): cell for cell in wave}
            for future in as_completed(waiting):
                cell, error = waiting[future], future.exception()
                if error is not None:
                    failed.append(cell)
                    print(f"{cell.name}: {error}", file=sys.stderr, flush=True)
    finally:  # Ctrl-C has reached the trainings as well: they save and end
        pool.shutdown(cancel_futures=True)
    return 1 if failed else 0


def run_cell(study: Study, cell: Cell) -> dict[str, Any]:
    """Train a cell, unless its run has finished, score it, and append its line.

    Raises:
        Stopped: the training was asked to stop.
        RuntimeError: a process failed; the message names its log.
    """
    folder = study.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    config = cell.config(study.corpus, folder, study.more)
    with _alone(folder):
        if not (folder / FINISHED).exists():
            say(f"{cell.trained.name}: training on {cell.samples:,} samples in {folder}")
            _process(train_command(study, cell, config.resolved()), folder, study.jobs)
        finished = json.loads((folder / FINISHED).read_text())
        say(f"{cell.name}: scoring")
        task = {
            "kind": cell.trained.variant.kind,
            "folder": str(folder),
            "config": config.resolved(),
            "sets": study.corpus.heldout,
            "chain": cell.variant.chain,
            "grid": cell.variant.grid,
            "images": cell.images(study.images),
        }
        ask, answer = folder / f"{cell.name}.task.json", folder / f"{cell.name}.result.json"
        ask.write_text(json.dumps(task))
        _process(["-m", "benchmarks._joint.score", str(ask), str(answer)], folder, study.jobs)
        scored = json.loads(answer.read_text())
    seconds = finished["progress"]["seconds"]
    line = {
        "key": study.key(cell),
        "variant": cell.variant.name,
        "seed": cell.seed,
        "samples": cell.samples,
        "overrides": [*cell.trained.variant.overrides, *study.more],
        "seconds": round(seconds, 1),
        "images_per_second": round(cell.samples / max(seconds, 1e-9), 2),
        **scored,
        "corpus": study.corpus.fingerprint,
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {study.jobs} jobs",
        "date": time.strftime("%Y-%m-%d"),
    }
    results.append(study.results, line)
    say(f"{cell.name}: done in {seconds:.0f} s + {scored['score_seconds']:.0f} s of scoring")
    return line


def train_command(study: Study, cell: Cell, resolved: dict[str, Any]) -> list[str]:
    """What Python is given to train the cell."""
    kind, folder = cell.trained.variant.kind, study.folder(cell)
    if kind == "task":
        sets = cell.overrides(study.corpus, folder, study.more)
        pairs = [part for text in sets for part in ("--set", text)]
        return ["-m", "pretrain", "train", "--config", PRESET, *pairs]
    path = folder / "peer.json"
    path.write_text(json.dumps(resolved))
    return ["-m", "benchmarks._joint.peers", kind, str(folder), str(path)]


def say(text: str) -> None:
    """A line of the study's progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def _process(command: list[str], folder: Path, jobs: int) -> None:
    """Run Python to its end, its output going to the folder's log.txt."""
    # One thread each: the trainer divides the processors among the ranks it is told of.
    threads = {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count() or 1)}
    with (folder / "log.txt").open("ab") as log:
        code = subprocess.call(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | threads,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
        )
    if code == REQUEUE or code == -signal.SIGTERM:
        raise Stopped("stopped; the same command takes it up again")
    if code:
        end = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"ended with {code}; see {folder / 'log.txt'}: {' | '.join(end)}")


def _die_with_parent() -> None:
    """SIGTERM when the study is killed, however: a training then saves and ends (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The only study at work in ``folder``; waits for another one."""
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _commit() -> str:
    with _git:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    return done.stdout.strip() or "unknown"


_git = threading.Lock()
