"""All bytes of shards in S3, through our loader without its decoder, or by a loop of GETs.

Ours does all but the picture: order, read-ahead, disk cache (cold), hash of the shard, checksum of
each sample, tar headers, captions, tokens, batches. The loop throws away what it gets.
"""

import json
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest import mock

THREADS = 2  # GETs under way in a process: as many as our read-ahead has


def ours(task: dict[str, Any], worker: int, together: Barrier) -> None:
    """One of the ``workers`` ranks; each decodes in its own process."""
    import torch
    from PIL import Image

    from pretrain.data import source
    from pretrain.data.loader import DataConfig, Loader
    from pretrain.data.reader import ReadConfig
    from pretrain.data.samples import captions_of
    from pretrain.data.tokenizer import Tokenizer

    torch.set_num_threads(1)
    dot, white = Image.new("RGB", (1, 1)), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    config = DataConfig(
        train=task["manifest"],
        tokenizer=task["tokenizer"],
        size=8,
        workers=0,
        read=ReadConfig(cache=task["cache"]),
    )
    ranks, batch = task["workers"], task["batch"]
    loader = Loader(config, Tokenizer(config.tokenizer), 0, batch * ranks, worker, ranks)
    batches = iter(loader)
    together.wait()
    with (
        mock.patch.object(source, "decode", lambda raw, *_: (dot, captions_of(raw))),
        mock.patch.object(source, "picture", lambda *_: white),
    ):
        for _ in range(loader.num_samples // (batch * ranks)):
            next(batches)
    together.wait()


def raw(task: dict[str, Any], worker: int, together: Barrier) -> None:
    """Every ``workers``-th object, a few at a time."""
    import botocore.session

    client = botocore.session.get_session().create_client("s3")

    def get(url: str) -> int:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return len(client.get_object(Bucket=bucket, Key=key)["Body"].read())

    urls = task["urls"][worker :: task["workers"]]
    together.wait()
    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(get, urls))
    together.wait()


def main() -> None:
    """Seconds from when every process is ready to when the last is done."""
    task = json.loads(Path(sys.argv[1]).read_text())
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(task["workers"] + 1)
    work = {"ours": ours, "raw": raw}[task["mode"]]
    processes = [
        context.Process(target=work, args=(task, i, together)) for i in range(task["workers"])
    ]
    for process in processes:
        process.start()
    # (A process that fails breaks no barrier: the wait has a bound.)
    together.wait(120)
    start = time.perf_counter()
    together.wait(600)
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
