"""Shards out of a folder of pictures or a table of them; their bytes depend on nothing but the
source and the options.

Rows are prepared in parallel and written in the order of the source. After each shard a small state
file beside it says which row comes next, so that a packing that was killed goes on from there.
"""

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context, set_forkserver_preload
from typing import IO, Any

from fsspec.core import url_to_fs

from pretrain import storage
from pretrain.data.prepare import PackOptions, Prepared, prepare_rows
from pretrain.data.rows import Row, Source
from pretrain.errors import DataError

STATE = "pack.json"
MANIFEST = "manifest.json"
ROWS_A_TASK = 16
EXAMPLES = 5  # rows named for each reason
Report = Callable[[int, int, int], None]  # rows read, samples and shards written


@dataclass
class State:
    """How far a packing is: rewritten after each shard, of one size however many there are.

    Attributes:
        source: identity of the source.
        options: of the packing.
        next_row: the first row of the source that is in no shard yet.
        shards, samples, bytes: written so far.
        rejects: rows that were refused, by reason.
        examples: some of those rows, by reason.
        finished: every row was read.
    """

    source: str
    options: dict[str, Any]
    next_row: int = 0
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    finished: bool = False


def pack(
    source: Source,
    out: str,
    options: PackOptions,
    *,
    parallel: int = 1,
    retry: storage.Retry | None = None,
    report: Report = lambda rows, samples, shards: None,
) -> State:
    """Write the shards of ``source`` into the folder ``out``, and their manifest.

    Args:
        source: see `rows.open_source`.
        out: folder, local or remote; shards are 00000.tar, 00001.tar, ...
        options: what becomes of the rows.
        parallel: processes that read, decode and encode; 1 works in this process.
        retry: of remote reads.
        report: called as rows are done.

    Raises:
        DataError: nothing of the source can be used, or ``out`` holds another packing.
    """
    from pretrain.data import index

    packing = _Packing(out, _begin(source, out, options), options)
    state = packing.state
    if not state.finished:
        work = partial(prepare_rows, options=options, retry=retry)
        try:
            for prepared in _in_order(work, source.rows(state.next_row), parallel):
                packing.add(prepared)
                report(prepared.row + 1, state.samples + len(packing.shard.keys), state.shards)
            packing.finish()
        finally:
            packing.shard.drop()
    if not state.samples:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in state.rejects.items())
        raise DataError(
            f"source={source.name!r} gives no usable sample ({reasons or 'it has no row'}); "
            f"mend that, remove {storage.join(out, STATE)} and pack again"
        )
    urls = [storage.join(out, shard_name(number)) for number in range(state.shards)]
    index.build(urls, storage.join(out, MANIFEST), parallel=parallel, versions=False, retry=retry)
    return state


def shard_name(number: int) -> str:
    """File name of shard ``number``."""
    return f"{number:05d}.tar"


class _Packing:
    """The shard that is open, and the state that is kept at each that is closed."""

    def __init__(self, out: str, state: State, options: PackOptions) -> None:
        self.out, self.state, self.options = out, state, options
        self.shard = _Shard(out, state.shards)
        self._next_row = state.next_row
        # They belong to the open shard: counted when it is kept, or a killed run would count them
        # twice.
        self._refused: list[Prepared] = []

    def add(self, prepared: Prepared) -> None:
        """Write a sample, in a new shard where the open one is full."""
        shard, options = self.shard, self.options
        larger = shard.bytes + prepared.tar_bytes > options.shard_bytes
        if prepared.refused:
            self._refused.append(prepared)
        elif shard.keys and (larger or len(shard.keys) >= options.shard_samples):
            self._close()
            self.shard.add(prepared)
        elif prepared.key in shard.keys:
            self._refused.append(
                Prepared(prepared.row, prepared.key, prepared.name, {}, "duplicate key")
            )
        else:
            shard.add(prepared)
        self._next_row = prepared.row + 1

    def finish(self) -> None:
        """Close the last shard."""
        self.state.finished = True
        self._close()

    def _close(self) -> None:
        """Write the open shard whole, then the state: killed in between, the next run writes the
        same bytes again."""
        state = self.state
        if self.shard.keys:
            state.bytes += self.shard.close()
            state.samples += len(self.shard.keys)
            state.shards += 1
        for one in self._refused:
            state.rejects[one.refused] = state.rejects.get(one.refused, 0) + 1
            named = state.examples.setdefault(one.refused, [])
            if len(named) < EXAMPLES:
                named.append(one.name)
        state.next_row = self._next_row
        text = json.dumps(asdict(state), indent=1, ensure_ascii=False) + "\n"
        storage.write_bytes(storage.join(self.out, STATE), text.encode())
        self.shard, self._refused = _Shard(self.out, state.shards), []


class _Shard:
    """A tar being written, without times and owners.

    Args:
        out: folder that it is for; a local one holds the unfinished file too.
        number: of the shard.
    """

    def __init__(self, out: str, number: int) -> None:
        self.url = storage.join(out, shard_name(number))
        self.keys: set[str] = set()
        self.bytes = 2 * 512  # the end of a tar
        self._remote = storage.is_remote(out)
        self._path = ""
        self._stream: IO[bytes] | None = None
        self._writer: Any = None

    def add(self, prepared: Prepared) -> None:
        """Append a sample."""
        if self._writer is None:
            self._open()
        self._writer.write({"__key__": prepared.key, **prepared.files})
        self.keys.add(prepared.key)
        self.bytes += prepared.tar_bytes

    def _open(self) -> None:
        import webdataset

        if self._remote:
            handle, self._path = tempfile.mkstemp(prefix="pretrain-pack-")
            self._stream = os.fdopen(handle, "wb")
        else:
            folder, _, name = self.url.removeprefix("file://").rpartition("/")
            os.makedirs(folder, exist_ok=True)
            self._path = os.path.join(folder, f".{name}.part")
            self._stream = open(self._path, "wb")  # noqa: SIM115 (until `close`)
        self._writer = webdataset.TarWriter(self._stream, user="", group="", mtime=0, encoder=False)

    def close(self) -> int:
        """Put the whole tar in its place; its bytes."""
        assert self._stream is not None
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        size = self._stream.tell()
        self._stream.close()
        if self._remote:
            storage.put_file(self._path, self.url)
            os.unlink(self._path)
        else:
            os.replace(self._path, self.url.removeprefix("file://"))
        return size

    def drop(self) -> None:
        """Leave nothing of an unfinished tar."""
        if self._stream is not None and not self._stream.closed:
            self._writer.close()  # or it would write to a closed file when it is collected
            self._stream.close()
            with suppress(OSError):
                os.unlink(self._path)


def _begin(source: Source, out: str, options: PackOptions) -> State:
    """The state that an earlier packing left in ``out``, or a new one."""
    fresh = State(source.identity, asdict(options))
    url = storage.join(out, STATE)
    if not storage.exists(url):
        return fresh
    remedy = f"give another --out, or remove {url} to begin anew"
    try:
        old = State(**json.loads(storage.read_bytes(url)))
    except (ValueError, TypeError) as error:
        raise DataError(f"{url} is not the state of a packing ({error}); {remedy}") from None
    if old.source != fresh.source:
        raise DataError(
            f"out={out!r} holds a packing of another source, or {source.name!r} has changed "
            f"since; {remedy}"
        )
    for name, value in fresh.options.items():
        if old.options.get(name) != value:
            raise DataError(
                f"out={out!r} holds a packing with {name}={old.options.get(name)!r}, now it is "
                f"{value!r}; {remedy}"
            )
    fs, path = url_to_fs(out)
    there = {name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)}
    for number in range(old.shards):
        if shard_name(number) not in there:
            raise DataError(
                f"{storage.join(out, shard_name(number))} was written and is gone; restore it; "
                f"or {remedy}"
            )
    return old


def _in_order(
    work: Callable[[list[Row]], list[Prepared]], rows: Iterable[Row], parallel: int
) -> Iterator[Prepared]:
    """What ``work`` makes of the rows, in their order; a few tasks a process are under way at a
    time, so that memory is bounded."""
    tasks = _tasks(rows)
    if parallel <= 1:
        for task in tasks:
            yield from work(task)
        return
    running: deque[Future[list[Prepared]]] = deque()
    # Imported once by the server that workers are forked from, not by each worker.
    set_forkserver_preload(["pretrain.data.loader"])
    # forkserver: a file system made before a fork hangs after it.
    with ProcessPoolExecutor(parallel, mp_context=get_context("forkserver")) as pool:
        try:
            for task in tasks:
                running.append(pool.submit(work, task))
                if len(running) > 3 * parallel:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a packing process was killed, for want of memory most likely; run the same "
                f"command again with less than --parallel {parallel}: it goes on from here"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _tasks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows by the handful; fewer where they carry their bytes."""
    waiting = iter(rows)
    while first := next(waiting, None):
        task = [first]
        carried = len(first.image) if isinstance(first.image, bytes) else 0
        while len(task) < ROWS_A_TASK and carried < 8 << 20:
            more = list(islice(waiting, 1))
            if not more:
                break
            task += more
            carried += len(more[0].image) if isinstance(more[0].image, bytes) else 0
        yield task
