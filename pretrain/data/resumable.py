"""Shards written one after another, each whole or not at all with a marker beside it, so that a
build that was killed goes on behind the last whole one. Samples are made in processes; the shards
are the same bytes for any number of them."""

import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from pretrain.errors import DataError

BATCH = 32  # sources a process gets at a time
S = TypeVar("S")
_END = tarfile.RECORDSIZE  # what closing a tar adds at most


@dataclass(frozen=True)
class Made:
    """One source's sample, or the reason why there is none.

    Attributes:
        key: of the sample.
        kind: what it is counted as.
        files: bytes by extension.
        reason: empty where there is a sample.
    """

    key: str
    kind: str
    files: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Shard:
    """What a marker says of a whole shard: where the next goes on, and what is in it."""

    end: int = 0
    bytes: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, list[str]] = field(default_factory=dict)


def write(
    out: Path,
    split: str,
    sources: Sequence[S],
    make: Callable[[Sequence[S]], list[Made]],
    bound: int,
    parallel: int = 1,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Shard]:
    """Write the shards of a split that are not there yet.

    Args:
        out: folder of the shards, ``SPLIT-00000.tar`` and so on; markers are in ``.done/`` below.
        sources: of the split, in order; a later call must give the same.
        make: samples of some sources, in order; pure, and picklable if there are processes.
        bound: bytes of a shard; only a larger sample is beyond it, alone in its shard.
        parallel: processes.
        tick: called with the number of sources done.

    Returns:
        All shards of the split, those that were there included.

    Raises:
        DataError: a process was killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = read_markers(out, split)
    start = done[-1].end if done else 0
    if start == len(sources):
        return done
    tick(start)
    writer = _Writer(out, split, len(done))
    made = _make(sources[start:], make, parallel)
    for position, one in enumerate(made, start):
        if writer.full(one, bound):
            done.append(writer.close(position))
            writer = _Writer(out, split, len(done))
        writer.add(one)
        tick(position + 1)
    done.append(writer.close(len(sources)))
    return done


def read_markers(out: Path, split: str) -> list[Shard]:
    """Markers of the leading shards that are whole."""
    found: list[Shard] = []
    while True:
        path, marker = paths(out, split, len(found))
        try:
            fields = json.loads(marker.read_text())
            if path.stat().st_size != fields["bytes"]:
                return found
        except (OSError, ValueError, KeyError):
            return found
        found.append(Shard(**{**fields, "samples": Counter(fields["samples"])}))


class _Writer:
    """Writes one shard under a temporary name, and gives it its own when it is whole."""

    def __init__(self, out: Path, split: str, number: int) -> None:
        import webdataset

        self.path, self.marker = paths(out, split, number)
        self.marker.unlink(missing_ok=True)
        self.part = self.path.with_suffix(".part")
        self.stream: IO[bytes] = self.part.open("wb")
        self.tar = webdataset.TarWriter(self.stream, user="", group="", mtime=0, encoder=False)
        self.size = 0
        self.shard = Shard()

    def full(self, one: Made, bound: int) -> bool:
        """Whether the sample would take the shard beyond ``bound`` bytes."""
        return bool(self.size) and self.size + _tar_bytes(one) + _END > bound

    def add(self, one: Made) -> None:
        """Write a sample, or note why there is none."""
        if one.reason:
            self.shard.skipped.setdefault(one.reason, []).append(one.key)
            return
        self.tar.write({"__key__": one.key, **one.files})
        self.size += _tar_bytes(one)
        self.shard.samples[one.kind] += 1

    def close(self, end: int) -> Shard:
        """Finish: the next shard begins with source number ``end``."""
        self.tar.close()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        self.shard.end, self.shard.bytes = end, self.part.stat().st_size
        os.replace(self.part, self.path)
        write_json(self.marker, vars(self.shard))
        return self.shard


def _make(
    sources: Sequence[S], make: Callable[[Sequence[S]], list[Made]], parallel: int
) -> Iterator[Made]:
    """Samples of all sources in order, made in ``parallel`` processes a few batches ahead."""
    batches = [sources[i : i + BATCH] for i in range(0, len(sources), BATCH)]
    if parallel == 1:
        for batch in batches:
            yield from make(batch)
        return
    waiting: deque[Future[list[Made]]] = deque()
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(parallel, context, initializer=_follow_parent) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(make, batch))
                if len(waiting) > 2 * parallel:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"a rendering process was killed (parallel={parallel}); with little memory use "
                "fewer, and run the same command again to go on"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _follow_parent() -> None:
    """Leave interrupts to the parent, and end when it does, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def paths(out: Path, split: str, number: int) -> tuple[Path, Path]:
    """A shard, and its marker."""
    name = f"{split}-{number:05d}"
    return out / f"{name}.tar", out / ".done" / f"{name}.json"


def _tar_bytes(one: Made) -> int:
    """Bytes of a sample in a tar: a header and whole blocks for each file."""
    return sum(512 + -(-len(v) // 512) * 512 for v in one.files.values())


def write_json(path: Path, tree: Any) -> None:
    """Write ``tree``, whole or not at all."""
    write_text(path, json.dumps(tree, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
