"""Our loader, as the trainer uses it; it tokenises as well, which nobody else does here."""

from collections.abc import Iterator
from typing import Any

from benchmarks._data.measure import Task, main
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.reader import ReadConfig
from pretrain.data.source import OrderConfig
from pretrain.data.tokenizer import Tokenizer


def batches(task: Task) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """One rank's batches, for ever."""
    config = DataConfig(
        train=task.manifest,
        tokenizer=task.tokenizer,
        size=task.size,
        workers=task.workers,
        # As at scale, where a lane has thousands of shards: they come as their turn comes.
        order=OrderConfig(lanes=4, window=512) if task.streams else OrderConfig(),
        read=ReadConfig(cache=task.cache or None),
    )
    loader = Loader(config, Tokenizer(task.tokenizer), 0, task.batch, rank=0, world=1)
    for batch in loader:
        yield batch.images_BCHW, batch.captions


if __name__ == "__main__":
    main(batches)
