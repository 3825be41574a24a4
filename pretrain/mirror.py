"""Copies of committed checkpoints in an object store, made beside the training and taken back from
it.

URL/samples-000012800/...   the same files; COMMITTED last
URL/index.json              which are committed, oldest first; one PUT, so never half written

Each rank copies its own part, in a thread that runs no collective. A store that is down costs
warnings, never the run.
"""

import json
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain import comm, storage
from pretrain.errors import CheckpointError, PretrainError

INDEX = "index.json"
_MARKER = "COMMITTED"
_RECEIPTS = "receipts"
_RECEIPTS_DEADLINE_SECONDS = 1800.0
_POLL_SECONDS = 1.0
_GAVE_UP = ".not-copied"  # beside a rank's local receipt: the commit need not wait for it


class Mirror:
    """Copies to one URL.

    Args:
        url: of all checkpoints of the run.
        keep: newest that are kept there.
        retry: how long a request is tried again.
    """

    def __init__(self, url: str, keep: int, retry: storage.Retry | None = None) -> None:
        self.url = url.rstrip("/")
        self.keep = keep
        self._retry = retry
        self._queue: queue.Queue[tuple[Path, int, int]] = queue.Queue()
        self._warnings: list[str] = []
        self._thread: threading.Thread | None = None

    def submit(self, folder: Path, rank: int, world: int) -> None:
        """Copy this rank's part of a committed checkpoint, some time from now."""
        self._queue.put((folder, rank, world))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def warnings(self) -> list[str]:
        """What went wrong since the last call."""
        found, self._warnings = self._warnings, []
        return found

    def finish(self, seconds: float | None = None) -> list[str]:
        """Wait for what was submitted, at most ``seconds``; then as `warnings`."""
        with self._queue.all_tasks_done:
            done = self._queue.all_tasks_done.wait_for(
                lambda: not self._queue.unfinished_tasks, seconds
            )
        late = [] if done else [f"the newest is not copied to {self.url} after {seconds:g} s"]
        return self.warnings() + late

    def committed(self) -> list[str]:
        """Names of the checkpoints at the URL, oldest first.

        Raises:
            DataError: it stays unreachable.
        """
        try:
            found = json.loads(storage.read_bytes(storage.join(self.url, INDEX), self._retry))
        except FileNotFoundError:
            return []
        return list(found["committed"])

    def bring(self, folder: Path) -> None:
        """Download the newest checkpoint where it is newer than all in ``folder``. Collective.

        Raises:
            CheckpointError: a rank could not, or what came is not what was written.
        """
        name = comm.broadcast_object(self._newer(folder) if comm.is_main() else None)
        if isinstance(name, PretrainError):
            raise CheckpointError(
                f"checkpoint.copy_to={self.url!r}: {name}; mend it, or set checkpoint.copy_to=null "
                "to resume from this machine alone"
            )
        if name is None:
            return
        if comm.is_main():
            print(f"[ckpt]  fetching {self.url}/{name}", flush=True)
        error: str | None = None
        try:
            self._download(name, folder / name, comm.rank(), comm.world_size())
        except (PretrainError, OSError) as failed:
            error = str(failed)
        problems = [e for e in comm.gather_objects(error) if e]
        if problems:
            raise CheckpointError(f"{self.url}/{name} could not be fetched: {problems[0]}")
        if comm.is_main():
            storage.write_bytes(str(folder / name / _MARKER), b"")
        comm.barrier()

    def _newer(self, folder: Path) -> str | PretrainError | None:
        try:
            remote = self.committed()
        except PretrainError as error:
            return error
        local = [p.parent.name for p in folder.glob(f"samples-*/{_MARKER}")]
        return max(remote) if remote and max(remote) > max(local, default="") else None

    def _download(self, name: str, target: Path, rank: int, world: int) -> None:
        base = storage.join(self.url, name)
        raw = storage.read_bytes(storage.join(base, "manifest.json"), self._retry)
        manifest = json.loads(raw)
        for file in sorted(manifest)[rank::world]:
            path = target / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                for part in storage.read_parts(storage.join(base, file), retry=self._retry):
                    stream.write(part)
            if storage.sha256(str(path)) != manifest[file]["sha256"]:
                raise CheckpointError(f"{file} is not what the manifest says")
        if rank == 0:
            storage.write_bytes(str(target / "manifest.json"), raw)

    # --- in the thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            folder, rank, world = self._queue.get()
            try:
                if not self._queue.empty():
                    raise CheckpointError("the copies are slower than the checkpoints")
                self._copy(folder, rank, world)
            except Exception as error:
                self._warnings.append(f"{folder.name} was not copied to {self.url}: {error}")
                with suppress(OSError):
                    (folder / _RECEIPTS / f"rank-{rank:05d}{_GAVE_UP}").touch()
            finally:
                self._queue.task_done()

    def _copy(self, folder: Path, rank: int, world: int) -> None:
        base = storage.join(self.url, folder.name)
        receipt = f"{_RECEIPTS}/rank-{rank:05d}.json"
        for name in json.loads((folder / receipt).read_text(encoding="utf-8")):
            storage.put_file(str(folder / name), storage.join(base, name), self._retry)
        storage.put_file(str(folder / receipt), storage.join(base, receipt), self._retry)
        if rank == 0:
            self._commit(folder, base, world)

    def _commit(self, folder: Path, base: str, world: int) -> None:
        deadline = time.monotonic() + _RECEIPTS_DEADLINE_SECONDS
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for rank in range(1, world):
            while not self._arrived(base, rank, manifest):
                gave_up = folder / _RECEIPTS / f"rank-{rank:05d}{_GAVE_UP}"
                if gave_up.exists() or not folder.exists():
                    raise CheckpointError(f"rank {rank} did not copy its part")
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"rank {rank} did not copy its part in {_RECEIPTS_DEADLINE_SECONDS:.0f} s"
                    )
                time.sleep(_POLL_SECONDS)
        for name in ("state.json", "run.json", "manifest.json", _MARKER):
            storage.put_file(str(folder / name), storage.join(base, name), self._retry)
        known = [n for n in self.committed() if n != folder.name]
        names = sorted([*known, folder.name])
        kept, old = names[-self.keep :], names[: -self.keep]
        # The index goes first: what it no longer names may be half deleted.
        storage.write_bytes(
            storage.join(self.url, INDEX), json.dumps({"committed": kept}).encode(), self._retry
        )
        for name in old:
            self._remove(storage.join(self.url, name), world)

    def _arrived(self, base: str, rank: int, manifest: dict[str, Any]) -> bool:
        """Whether that rank has copied its part of this very checkpoint."""
        url = storage.join(base, f"{_RECEIPTS}/rank-{rank:05d}.json")
        try:
            files = json.loads(storage.read_bytes(url, self._retry))
        except FileNotFoundError:
            return False
        # An earlier run that ended here may have left a receipt of the same name.
        return all(manifest.get(name) == facts for name, facts in files.items())

    def _remove(self, base: str, world: int) -> None:
        manifest: dict[str, Any] = json.loads(
            storage.read_bytes(storage.join(base, "manifest.json"), self._retry)
        )
        receipts = {f"{_RECEIPTS}/rank-{rank:05d}.json" for rank in range(world)}
        for name in (_MARKER, *manifest, *receipts, "manifest.json"):
            storage.remove(storage.join(base, name), self._retry)
