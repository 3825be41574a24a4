"""Checkpoints that are whole or not there, of any number of ranks, written beside the training.

checkpoints/samples-000012800/
    weights/rank-00001.safetensors ...   each rank's part (parts.py)
    receipts/rank-00001.json             what that rank wrote: sizes and SHA-256
    state.json                           shapes, number of ranks, AdamW's step count
    run.json                             progress, tokenizer, data, resolved config
    metrics.json                         of evaluations at this state, once there are any
    manifest.json                        size and SHA-256 of every file above but the receipts
    COMMITTED                            written last; a folder without it is never read
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pretrain import comm, storage
from pretrain.config import Config
from pretrain.engine import Engine
from pretrain.errors import CheckpointError
from pretrain.partitions import Copy
from pretrain.parts import STATE, Parts, digest, state_facts, write_part

MARKER = "COMMITTED"
RECEIPTS = "receipts"
METRICS = "metrics.json"  # not of the state: it may be added to a committed checkpoint
DAMAGED = "damaged-"
_POLL_SECONDS = 0.05


class BestConfig(Config):
    """Which checkpoint is kept however old it is.

    Attributes:
        metric: of an evaluation at the same number of samples, such as
            zero_shot/renderings/top1.
        mode: whether more of it is better.
    """

    metric: str = Field(min_length=1)
    mode: Literal["max", "min"] = "max"


class CheckpointConfig(Config):
    """When state is saved, where, and how much of it is kept.

    Attributes:
        every_samples: samples between checkpoints; one more is written when training ends or is
            stopped.
        keep: newest checkpoints that are kept.
        best: one more that is kept.
        background: write while training goes on; it then stops for a copy in memory alone.
        rewind_in_memory: keep that copy, to go back to after a run of bad steps; else the newest
            checkpoint is read again.
        on_failure: of a save in mid-run, such as a full disk: "warn" goes on and tries again at
            the next, "stop" ends the run. A save at the end of a run that fails always stops it.
        on_damage: of the newest checkpoint at resume: "previous" puts it aside and takes the one
            before, "stop" ends the run.
        copy_to: URL (s3://bucket/folder) that every committed checkpoint is copied to, by each rank
            its own part; a resume takes it from there where it is newer.
        copy_seconds: how long a request to ``copy_to`` is tried; a copy that fails is a warning.
    """

    every_samples: int = Field(10_000, ge=1)
    keep: int = Field(2, ge=1)
    best: BestConfig | None = None
    background: bool = True
    rewind_in_memory: bool = True
    on_failure: Literal["warn", "stop"] = "warn"
    on_damage: Literal["previous", "stop"] = "previous"
    copy_to: str | None = None
    copy_seconds: float = Field(300.0, gt=0)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk."""

    folder: Path
    samples: int
    run: dict[str, Any]

    def metric(self, name: str) -> float | None:
        """A metric of the evaluation made at this very state."""
        try:
            found = json.loads((self.folder / METRICS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return float(found[name]) if name in found else None


@dataclass
class _Save:
    """One save under way on this rank."""

    folder: Path
    written: threading.Event = field(default_factory=threading.Event)
    aborted: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    error: str | None = None


class Checkpointer:
    """Saves, finds and restores the checkpoints of one run.

    Args:
        folder: of all checkpoints of the run; on storage that every rank sees.
        config: how often, how many.
        say: tells a person.
    """

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        from pretrain.mirror import Mirror

        self.folder = Path(folder)
        self.config = config
        self.failures = 0
        self._say = say
        self._save: _Save | None = None
        self._good: tuple[Copy, dict[str, Any]] | None = None
        retry = storage.Retry(deadline_seconds=config.copy_seconds)
        self._mirror = Mirror(config.copy_to, config.keep, retry) if config.copy_to else None

    def save(
        self,
        engine: Engine,
        samples: int,
        run: Mapping[str, Any],
        last: bool = False,
        copies_seconds: float | None = None,
    ) -> Path:
        """Copy the state after ``samples`` samples, and write and commit it. Collective.

        Args:
            engine: every rank writes its own part of it.
            samples: progress; names the folder.
            run: JSON-serialisable facts that a resume checks and restores.
            last: wait until it is committed, and raise if it cannot be.
            copies_seconds: that ``last`` waits for copies to ``copy_to``; None for what they take.

        Raises:
            CheckpointError: it cannot be written, and ``last`` or the configuration says so.
        """
        self.finish()
        folder = self.folder / f"samples-{samples:012d}"
        facts = {**run, "samples": samples, "world_size": comm.world_size()}
        if comm.broadcast_object((folder / MARKER).exists()):
            if self._good is None and self.config.rewind_in_memory:
                self._good = (engine.copy(), facts)  # just resumed from it
        else:
            if comm.is_main():
                shutil.rmtree(folder, ignore_errors=True)  # a save that was killed
            comm.barrier()
            copy = engine.copy()
            if self.config.rewind_in_memory:
                self._good = (copy, facts)
            save = self._save = _Save(folder)
            rank, world = comm.rank(), comm.world_size()
            save.thread = threading.Thread(
                target=self._write, args=(save, engine, copy, facts, rank, world), daemon=True
            )
            save.thread.start()
        if last or not self.config.background:
            self.finish(last, copies_seconds)
        return folder

    def finish(self, last: bool = False, copies_seconds: float | None = None) -> None:
        """Wait for the save under way, if there is one. Collective.

        Args:
            last: also wait for copies to ``copy_to``; and a failure raises whatever the
                configuration says.
            copies_seconds: see `save`.

        Raises:
            CheckpointError: it failed, on any rank.
        """
        save, self._save = self._save, None
        if save is not None and save.thread is not None:
            save.written.wait()
            failed = comm.agree_any(save.error is not None)
            if failed:
                save.aborted.set()  # rank 0 may be waiting for the receipt of a rank that failed
            save.thread.join()
            errors = _any_of(save.error)
            if errors:
                self.failures += 1
                if comm.is_main():
                    shutil.rmtree(save.folder, ignore_errors=True)  # a full disk needs the room
                comm.barrier()
                text = f"checkpoint={str(save.folder)!r} could not be written: {errors[0]}"
                if last or self.config.on_failure == "stop":
                    raise CheckpointError(f"{text}; the checkpoint before it is untouched")
                if comm.is_main():
                    self._say(f"[ckpt]  WARNING: {text}; training goes on")
        if self._mirror is not None:
            mirror = self._mirror
            for warning in mirror.finish(copies_seconds) if last else mirror.warnings():
                self._say(f"[ckpt]  WARNING: {warning}")
        if last:
            comm.barrier()

    def annotate(self, samples: int, metrics: Mapping[str, float]) -> None:
        """Put metrics beside the checkpoint of ``samples`` samples, if it is committed already. Not
        collective."""
        folder = self.folder / f"samples-{samples:012d}"
        if comm.is_main() and (folder / MARKER).exists():
            storage.write_bytes(str(folder / METRICS), _json(metrics))

    def rewind(self, engine: Engine) -> dict[str, Any] | None:
        """Go back to the last state that was saved; its run facts, or None if there is none.
        Collective.

        Raises:
            CheckpointError: what is on disk is damaged.
        """
        self.finish()
        if self._good is not None and engine.partitions.restorable:
            engine.restore(self._good[0])
            return self._good[1]
        found = self.restore(engine)
        return found.run if found else None

    def committed(self) -> list[Checkpoint]:
        """Committed checkpoints, oldest first."""
        return list_committed(self.folder)

    def restore(
        self, engine: Engine, check: Callable[[Checkpoint], None] = lambda _: None
    ) -> Checkpoint | None:
        """Load the newest committed checkpoint that is whole, of any number of ranks; None if there
        was never one. Collective.

        Args:
            engine: takes the state.
            check: called before any state is loaded; raises if the run must not go on from it.

        Raises:
            CheckpointError: all are damaged, or the newest is and the configuration says "stop".
        """
        if self._mirror is not None:
            self._mirror.bring(self.folder)
        found: list[Checkpoint] = comm.broadcast_object(
            self.committed() if comm.is_main() else None
        )
        for checkpoint in reversed(found):
            problem = self._damage(checkpoint.folder)
            if problem is None:
                check(checkpoint)
                engine.load(Parts(checkpoint.folder))
                return checkpoint
            text = f"checkpoint={str(checkpoint.folder)!r} is damaged: {problem}"
            if self.config.on_damage == "stop":
                raise CheckpointError(
                    f"{text}; delete that folder to resume from the one before, or set "
                    "checkpoint.on_damage=previous"
                )
            if comm.is_main():
                self._say(f"[ckpt]  WARNING: {text}; put aside, the one before is taken")
                aside = checkpoint.folder.with_name(DAMAGED + checkpoint.folder.name)
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.folder.rename(aside)
            comm.barrier()
        if found:
            raise CheckpointError(
                f"every checkpoint in {str(self.folder)!r} is damaged; they are there as "
                f"{DAMAGED}*: bring one back from a copy, or start with a new output"
            )
        return None

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with its files, each rank having read its share of them. Collective."""
        # One rank reads the manifest: it is as long as there are ranks.
        manifest = comm.broadcast_object(read_manifest(folder) if comm.is_main() else None)
        mine = damage(folder, comm.rank(), comm.world_size(), manifest)
        return next(iter(_any_of(mine)), None)

    # --- in the thread of the save, where no collective may run ----------------------------------

    def _write(
        self,
        save: _Save,
        engine: Engine,
        copy: Copy,
        facts: Mapping[str, Any],
        rank: int,
        world: int,
    ) -> None:
        try:
            try:
                (save.folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
                files = write_part(save.folder, engine.partitions, copy, rank)
                receipt = save.folder / RECEIPTS / f"rank-{rank:05d}.json"
                storage.write_bytes(str(receipt), _json(files))
            except BaseException as error:
                save.error = f"rank {rank}: {error}"
                raise
            finally:
                save.written.set()
            if rank == 0:
                try:
                    state = state_facts(engine.partitions, copy, world)
                    if not self._commit(save, state, facts, world):
                        return
                except BaseException as error:
                    save.error = save.error or f"rank {rank}: {error}"
                    raise
        except BaseException:  # reported by `finish`
            return
        if self._mirror is not None:
            # Now, not at the next save: an interval may be long, and this disk may be lost.
            self._mirror.submit(save.folder, rank, world)

    def _commit(
        self, save: _Save, state: dict[str, Any], facts: Mapping[str, Any], world: int
    ) -> bool:
        """Whether it was committed: not where another rank failed."""
        folder = save.folder
        files: dict[str, Any] = {}
        for rank in range(world):
            path = folder / RECEIPTS / f"rank-{rank:05d}.json"
            while not path.exists():
                if save.aborted.wait(_POLL_SECONDS):
                    return False
            files |= json.loads(path.read_text(encoding="utf-8"))
        for name, content in ((STATE, state), ("run.json", facts)):
            storage.write_bytes(str(folder / name), _json(content))
            files[name] = digest(folder / name).facts()
        for name, expected in files.items():
            if (folder / name).stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{name} is not of the size it was written with")
        if facts.get("metrics"):
            storage.write_bytes(str(folder / METRICS), _json(facts["metrics"]))
        storage.write_bytes(str(folder / "manifest.json"), _json(files))
        storage.write_bytes(str(folder / MARKER), b"")
        _sync(folder)
        self._prune()
        return True

    def _prune(self) -> None:
        found = self.committed()
        kept = {c.folder for c in found[-self.config.keep :]}
        champion = best(found, self.config.best)
        for old in found:
            if old.folder in kept or old is champion:
                continue
            # The marker goes first: a half-deleted checkpoint must not look whole.
            (old.folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(old.folder, ignore_errors=True)


def best(found: list[Checkpoint], config: BestConfig | None) -> Checkpoint | None:
    """The best of ``found`` by a metric, the newest of equals; None without one that has it."""
    if config is None:
        return None
    scored = [(c.metric(config.metric), c) for c in found]
    sign = 1 if config.mode == "max" else -1
    known = [(sign * value, c.samples, c) for value, c in scored if value is not None]
    return max(known, key=lambda entry: entry[:2])[2] if known else None


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


def read_manifest(folder: Path) -> dict[str, Any] | str:
    """Size and hash of every file of a committed checkpoint, by name; or what is wrong with the
    manifest."""
    try:
        manifest: dict[str, Any] = json.loads(
            (folder / "manifest.json").read_text(encoding="utf-8")
        )
        for needed in (STATE, "run.json"):
            if needed not in manifest:
                return f"manifest.json does not list {needed}"
    except (OSError, ValueError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"
    return manifest


def damage(
    folder: Path, rank: int = 0, world: int = 1, manifest: dict[str, Any] | str | None = None
) -> str | None:
    """What is wrong with a committed checkpoint's files, or None if every size and hash agrees.

    Args:
        folder: of the checkpoint.
        rank, world: read every ``world``-th file only, from the ``rank``-th on.
        manifest: from `read_manifest`, if it was read already.
    """
    if manifest is None:
        manifest = read_manifest(folder)
    if isinstance(manifest, str):
        return manifest
    names = sorted(manifest)
    for name in names[rank::world]:
        facts, path = manifest[name], folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were written"
        if storage.sha256(str(path)) != facts["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _any_of(problem: str | None) -> list[str]:
    """The problems of all ranks, in rank order. Collective: one scalar where there are none, for
    texts of every rank to every rank grow with the square of the ranks."""
    if not comm.agree_any(problem is not None):
        return []
    return [text for text in comm.gather_objects(problem) if text]


def _sync(folder: Path) -> None:
    """Folder entries to disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, default=str).encode()
