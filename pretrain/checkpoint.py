"""Checkpoints that are whole or not there: written aside, hashed, renamed, and committed by a
marker last.

checkpoints/samples-000012800/
    engine/...      each rank's part, as DeepSpeed writes it
    run.json        progress, tokenizer, world size, resolved config
    manifest.json   size and SHA-256 of every file above
    COMMITTED       written last; a folder without it is never read
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pretrain import comm, storage
from pretrain.config import Config
from pretrain.engine import Engine
from pretrain.errors import CheckpointError

TAG = "engine"
MARKER = "COMMITTED"


class CheckpointConfig(Config):
    """Attributes:
    every_samples: samples between checkpoints; one more is written when training ends or is
        stopped.
    keep: newest checkpoints that are kept.
    """

    every_samples: int = Field(10_000, ge=1)
    keep: int = Field(2, ge=1)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk."""

    folder: Path
    samples: int
    run: dict[str, Any]


class Checkpointer:
    """Saves, finds and restores the checkpoints of one run.

    Args:
        folder: of all checkpoints of the run; on storage that every rank sees.
        config: how often, how many.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig) -> None:
        self.folder = Path(folder)
        self.config = config

    def save(self, engine: Engine, samples: int, run: dict[str, Any]) -> Path:
        """Write and commit the state after ``samples`` samples. Collective.

        Args:
            engine: every rank writes its own part of it.
            samples: progress; names the folder.
            run: JSON-serialisable facts that a resume checks and restores.
        """
        final = self.folder / f"samples-{samples:012d}"
        temporary = self.folder / f".{final.name}.tmp"
        if comm.broadcast_object((final / MARKER).exists()):
            return final  # resumed and stopped with no step between
        if comm.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        comm.barrier()
        engine.save(str(temporary), TAG)
        comm.barrier()
        if comm.is_main():
            facts = {**run, "samples": samples, "world_size": comm.world_size()}
            storage.write_bytes(str(temporary / "run.json"), _json(facts))
            storage.write_bytes(str(temporary / "manifest.json"), _json(_hashes(temporary)))
            if final.exists():  # uncommitted: killed between rename and marker
                shutil.rmtree(final)
            temporary.rename(final)
            storage.write_bytes(str(final / MARKER), b"")
            self._prune()
        comm.barrier()
        return final

    def committed(self) -> list[Checkpoint]:
        """Committed checkpoints, oldest first."""
        return list_committed(self.folder)

    def restore(
        self, engine: Engine, check: Callable[[Checkpoint], None] = lambda _: None
    ) -> Checkpoint | None:
        """Load the newest committed checkpoint; None if there is none. Collective.

        Args:
            engine: takes the state.
            check: called before any state is loaded; raises if the run must not go on from it.

        Raises:
            CheckpointError: it is damaged, or was written by another number of ranks.
        """
        found = comm.broadcast_object(self.committed()[-1:] if comm.is_main() else None)
        if not found:
            return None
        newest: Checkpoint = found[0]
        problem = comm.broadcast_object(damage(newest.folder) if comm.is_main() else None)
        if problem:
            raise CheckpointError(
                f"checkpoint={str(newest.folder)!r} is damaged: {problem}; delete that folder to "
                "resume from the one before"
            )
        if newest.run["world_size"] != comm.world_size():
            raise CheckpointError(
                f"checkpoint={str(newest.folder)!r} was written by {newest.run['world_size']} "
                "ranks "
                f"and this run has {comm.world_size()}; start it with "
                f"{newest.run['world_size']} ranks, or with a new output"
            )
        check(newest)
        engine.load(str(newest.folder), TAG)
        return newest

    def _prune(self) -> None:
        for old in self.committed()[: -self.config.keep]:
            # The marker goes first: a half-deleted checkpoint must not look whole.
            (old.folder / MARKER).unlink()
            shutil.rmtree(old.folder)


def list_committed(folder: Path) -> list[Checkpoint]:
    """Committed checkpoints under ``folder``, oldest first."""
    found = []
    for path in sorted(folder.glob("samples-*")):
        if (path / MARKER).exists():
            try:
                run = json.loads((path / "run.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                run = {}  # `damage` names it before anything is restored
            found.append(Checkpoint(path, int(path.name.removeprefix("samples-")), run))
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint's files, or None if every size and hash agrees."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"
    for name, facts in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were written"
        if storage.sha256(str(path)) != facts["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": storage.sha256(str(p)),
        }
        for p in files
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, default=str).encode()
