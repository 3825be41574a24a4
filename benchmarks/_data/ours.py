"""Our loader, as the trainer uses it; it tokenises as well, which nobody else does here."""

from collections.abc import Iterator
from typing import Any

from benchmarks._data.measure import Task, main
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.reader import ReadConfig
from pretrain.data.tokenizer import Tokenizer


def batches(task: Task) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """One rank's batches."""
    config = DataConfig(
        train=task.manifest,
        tokenizer=task.tokenizer,
        size=task.size,
        workers=task.workers,
        read=ReadConfig(cache=task.cache or None),
    )
    loader = Loader(config, Tokenizer(task.tokenizer), 0, task.batch, rank=0, world=1)
    for batch in loader:
        yield batch.images_BCHW, batch.captions


if __name__ == "__main__":
    main(batches)
