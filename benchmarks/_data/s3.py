"""From a real S3 server, ours against a raw loop of GETs with as many requests under way: bytes
into the disk cache against bytes thrown away; pictures a second against GET, decode, nothing else.
"""

import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._data import corpus, memory, process
from benchmarks._data.measure import Task, spread
from benchmarks._data.picture import decode

GOAL = 0.9
COPIES = 8  # of each shard, under names of their own
SAMPLES_PER_SHARD = 1280
THREADS = 2  # GETs under way in a process: as many as our read-ahead has


def run(source: Path, samples: int, folder: Path, repeats: int, task: Task) -> dict[str, Any]:
    """MB a second and images a second of both, and the ratios, round by round.

    Args:
        task: of our contestant, from the local disk.
    """
    from tests.support.s3 import S3Server, add_scripts_to_path, environment

    add_scripts_to_path()
    tars = corpus.shards(source, samples, folder / "s3", SAMPLES_PER_SHARD)
    few = corpus.manifest(tars, folder / "s3-index")
    found: dict[str, list[float]] = {"ours": [], "raw": [], "ours_images": [], "raw_images": []}
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        S3Server(Path(scratch)) as server,
    ):
        bucket = f"s3://{server.BUCKET}"
        urls = []
        for number in range(COPIES * len(tars)):
            data = Path(tars[number % len(tars)]).read_bytes()
            urls.append(server.put(f"many/{number:08d}.tar", data))
        total = COPIES * sum(Path(tar).stat().st_size for tar in tars)
        many = memory.repeat(few, len(urls), Path(scratch) / "many", f"{bucket}/many")
        urls_once = [
            server.put(f"once/{number:08d}.tar", Path(tar).read_bytes())
            for number, tar in enumerate(task.shards)
        ]
        once = memory.repeat(
            Path(task.manifest), len(task.shards), Path(scratch) / "once", f"{bucket}/once"
        )
        fields = {"workers": task.workers, "manifest": str(many), "urls": urls, "size": task.size}

        def measure(kind: str) -> float:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                variables = environment(server.url)
                if kind == "ours_images":
                    read = replace(task, cache=cache, manifest=str(once))
                    result = process.run(sys.executable, "benchmarks._data.ours", read, variables)
                    return float(result["images_per_second"])
                run = fields | {"mode": kind, "cache": cache}
                if kind == "raw_images":
                    run["urls"] = urls_once
                result = process.run(sys.executable, __name__, run, variables)
                done = samples if kind == "raw_images" else total / 1e6
                return float(done / result["seconds"])

        for number in range(repeats):
            for kind in list(found)[:: -1 if number % 2 else 1]:
                found[kind].append(measure(kind))

    def ratio(one: str, other: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(found[one], found[other], strict=True)])

    return {
        "bytes": total,
        "found": found,
        "of_raw": ratio("ours", "raw"),
        "of_raw_images": ratio("ours_images", "raw_images"),
    }


def _ours(task: dict[str, Any], worker: int, together: Barrier) -> None:
    """Every ``workers``-th shard as a rank's reader brings it: to the disk, its hash checked."""
    from pretrain.data.manifest import Manifest
    from pretrain.data.reader import ReadConfig, ShardReader

    manifest = Manifest.load(task["manifest"])
    reader = ShardReader([manifest], ReadConfig(cache=task["cache"]))
    places = [(0, number) for number in range(worker, len(manifest.shards), task["workers"])]
    together.wait()
    with ThreadPoolExecutor(THREADS) as pool:
        for descriptor in pool.map(reader.open, places):
            os.close(descriptor)
    together.wait()


def _raw(task: dict[str, Any], worker: int, together: Barrier) -> None:
    """Every ``workers``-th object, a few at a time."""
    together.wait()
    assert all(map(len, _objects(task["urls"][worker :: task["workers"]])))
    together.wait()


def _raw_images(task: dict[str, Any], worker: int, together: Barrier) -> None:
    """The same, and every picture decoded into one place."""
    place = np.empty((3, task["size"], task["size"]), np.uint8)
    together.wait()
    for data in _objects(task["urls"][worker :: task["workers"]]):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if stream is not None and member.name.endswith(".jpg"):
                    place[:] = decode(stream.read(), task["size"])
    together.wait()


def _objects(urls: list[str]) -> Iterator[bytes]:
    import botocore.session

    client = botocore.session.get_session().create_client("s3")

    def get(url: str) -> bytes:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())

    ahead: deque[Future[bytes]] = deque()
    left = deque(urls)
    with ThreadPoolExecutor(THREADS) as pool:
        while left or ahead:
            while left and len(ahead) <= THREADS:
                ahead.append(pool.submit(get, left.popleft()))
            yield ahead.popleft().result()


def main() -> None:
    """Seconds from when every process is ready to when the last is done."""
    task = json.loads(Path(sys.argv[1]).read_text())
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(task["workers"] + 1)
    work = {"ours": _ours, "raw": _raw, "raw_images": _raw_images}[task["mode"]]
    processes = [
        context.Process(target=work, args=(task, i, together), daemon=True)
        for i in range(task["workers"])
    ]
    for one in processes:
        one.start()
    together.wait(120)  # bounded: a process that failed never comes
    start = time.perf_counter()
    together.wait(600)
    seconds = time.perf_counter() - start
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
