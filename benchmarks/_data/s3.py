"""From a real S3 server, in slices: bytes into our disk cache and pictures from our loader, against
loops of GETs with as many requests under way that do less. The bytes once more over a link whose
rate, not this machine's processors, is the bound."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks._data import corpus, memory, slices
from benchmarks._data.link import Link
from benchmarks._data.measure import Arrivals, Task
from benchmarks._data.picture import decode

T, U = TypeVar("T"), TypeVar("U")

GOAL = 0.9
COPIES = 10  # of each shard, under names of their own
SAMPLES_PER_SHARD = 1280
THREADS = 2  # shards under way in a process: as many as our read-ahead has
# Of the cache, in shards: six may be under way; each has left it when its turn comes again.
KEPT_SHARDS = 8
MOST_ROUNDS = 12
SLICE = 2.0  # times the slice of the other contestants: a shard is 23 MB, or 1,280 pictures

LINK_MEGABITS = 1000.0  # a second

RAW, KEPT, OURS = "GETs", "GETs, hashed, written", "ours to the cache"
RAW_IMAGES, OUR_IMAGES = "GETs, decoded", "ours, images"
# (what, ours, the other, whether it is the goal). Where the server shares two cores with its
# readers, and nothing is decoded, a ratio of bytes says what SHA-256 and a write cost beside a
# server: no link is the bound. It is shown; the goal for bytes is that over a link.
ON_LOOPBACK = (
    ("MB/s", OURS, RAW, False),
    ("MB/s", OURS, KEPT, False),
    ("images/s", OUR_IMAGES, RAW_IMAGES, True),
)
OVER_LINK = (("MB/s", OURS, RAW, True),)
PLACES = {"loopback": ON_LOOPBACK, "link": OVER_LINK}


def run(
    source: Path, samples: int, folder: Path, rounds: int, seconds: float, task: Task
) -> dict[str, Any]:
    """By place (`PLACES`), the rates of all, and the ratio of each pair by the clock and by
    processor time; of a link that this machine cannot have, why not.

    Args:
        task: of our contestant, from the local disk.
    """
    tars = corpus.shards(source, samples, folder / "s3", SAMPLES_PER_SHARD)
    few = corpus.manifest(tars, folder / "s3-index")
    rounds = min(rounds, MOST_ROUNDS)
    found: dict[str, Any] = {}
    with _served(tars, few, folder, task) as bench:
        names = (RAW, KEPT, OURS, RAW_IMAGES, OUR_IMAGES)
        found["loopback"] = _race(bench, names, ON_LOOPBACK, rounds, seconds)
    if reason := Link.missing():
        found["link"] = {"skipped": reason}
        return found
    with Link(LINK_MEGABITS) as link, _served(tars, few, folder, task, link) as bench:
        found["link"] = _race(bench, (RAW, OURS), OVER_LINK, rounds, seconds)
    return found


@contextmanager
def _served(
    tars: list[str], few: Path, folder: Path, task: Task, link: Link | None = None
) -> Iterator[dict[str, slices.Entry]]:
    """Every contestant, by name, while a server of its own has the shards."""
    from tests.support.s3 import S3Server, add_scripts_to_path, environment

    add_scripts_to_path()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        where = {} if link is None else {"address": link.address, "within": link.within}
        server = stack.enter_context(S3Server(scratch, **where))
        urls = [
            server.put(f"many/{n:08d}.tar", Path(tars[n % len(tars)]).read_bytes())
            for n in range(COPIES * len(tars))
        ]
        listed = memory.repeat(few, len(urls), scratch / "many", f"s3://{server.BUCKET}/many")
        fields = {"workers": task.workers, "manifest": str(listed), "urls": urls, "size": task.size}
        fields["cache_gib"] = KEPT_SHARDS * max(Path(t).stat().st_size for t in tars) / (1 << 30)
        variables = environment(server.url)

        def entry(name: str, work: str) -> slices.Entry:
            own = fields | {"work": work, "folder": str(scratch / work)}
            return slices.Entry(name, sys.executable, __name__, own, task.workers, variables)

        images = replace(task, manifest=str(listed), cache=str(scratch / "images"), streams=True)
        ours = "benchmarks._data.ours"
        yield {
            RAW: entry(RAW, "raw"),
            KEPT: entry(KEPT, "kept"),
            OURS: entry(OURS, "ours"),
            RAW_IMAGES: entry(RAW_IMAGES, "raw_images"),
            OUR_IMAGES: slices.Entry(
                OUR_IMAGES, sys.executable, ours, images, task.workers, variables
            ),
        }


def _race(
    bench: dict[str, slices.Entry],
    names: Sequence[str],
    compared: Sequence[tuple[str, str, str, bool]],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    entries = [bench[name] for name in names]
    race = slices.race(entries, rounds, SLICE * seconds, "bytes or images/s")
    return {
        "rounds": [{name: vars(one) for name, one in r.items()} for r in race.rounds],
        "rates": {
            e.name: slices.spread([r[e.name].rate for r in race.rounds if e.name in r])
            for e in entries
            if any(e.name in r for r in race.rounds)
        },
        "failed": race.failed,
        "ratios": {
            f"{ours} / {other}": {
                "clock": slices.spread(race.ratios(ours, other)),
                "cpu": slices.spread(race.ratios(ours, other, cpu=True)),
            }
            for _, ours, other, _ in compared
            if race.ratios(ours, other)
        },
    }


def _ours(task: dict[str, Any], worker: int, arrivals: Arrivals) -> None:
    """Every ``workers``-th shard as a rank's reader brings it: to the disk, its hash checked. The
    cache is smaller than the shards."""
    from pretrain.data.manifest import Manifest
    from pretrain.data.reader import ReadConfig, ShardReader

    manifest = Manifest.load(task["manifest"])
    reader = ShardReader([manifest], ReadConfig(cache=task["folder"], cache_gib=task["cache_gib"]))
    places = [(0, number) for number in range(worker, len(manifest.shards), task["workers"])]
    for descriptor in _ahead(reader.open, itertools.cycle(places)):
        arrivals.add(worker, os.fstat(descriptor).st_size)
        os.close(descriptor)


def _raw(task: dict[str, Any], worker: int, arrivals: Arrivals) -> None:
    """Every ``workers``-th object, a few at a time."""
    for data in _objects(task, worker):
        arrivals.add(worker, len(data))


def _kept(task: dict[str, Any], worker: int, arrivals: Arrivals) -> None:
    """The same, each hashed and written to a file, which is then deleted: what a cache that checks
    cannot do without."""
    folder = Path(task["folder"])
    folder.mkdir(exist_ok=True)

    def keep(key: tuple[int, bytes]) -> int:
        number, data = key
        hashlib.sha256(data).hexdigest()
        path = folder / f"{worker}-{number}"
        path.write_bytes(data)
        path.unlink()
        return len(data)

    numbered = enumerate(_objects(task, worker))
    for length in map(keep, numbered):
        arrivals.add(worker, length)


def _raw_images(task: dict[str, Any], worker: int, arrivals: Arrivals) -> None:
    """Every picture decoded into one place; noted by 64, as batches are."""
    place, done = np.empty((3, task["size"], task["size"]), np.uint8), 0
    for data in _objects(task, worker):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if stream is not None and member.name.endswith(".jpg"):
                    place[:] = decode(stream.read(), task["size"])
                    done += 1
                    if done % 64 == 0:
                        arrivals.add(worker, 64)


def _objects(task: dict[str, Any], worker: int) -> Iterator[bytes]:
    """Every ``workers``-th object, for ever."""
    import botocore.session

    client = botocore.session.get_session().create_client("s3")

    def get(url: str) -> bytes:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())

    return _ahead(get, itertools.cycle(task["urls"][worker :: task["workers"]]))


def _ahead(call: Callable[[T], U], of: Iterable[T]) -> Iterator[U]:
    """Results in order, `THREADS` under way at once."""
    given, ahead = iter(of), deque[Future[U]]()
    with ThreadPoolExecutor(THREADS) as pool:
        while True:
            while len(ahead) <= THREADS:
                ahead.append(pool.submit(call, next(given)))
            yield ahead.popleft().result()


WORK = {"ours": _ours, "raw": _raw, "kept": _kept, "raw_images": _raw_images}


def _work(task: dict[str, Any], worker: int) -> None:
    WORK[task["work"]](task, worker, Arrivals(task["arrivals"]))


def main() -> None:
    """Workers that never end."""
    task = json.loads(Path(sys.argv[1]).read_text())
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(task, i), daemon=True) for i in range(task["workers"])
    ]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    raise SystemExit(f"workers ended with {[one.exitcode for one in processes]}")


if __name__ == "__main__":
    main()
