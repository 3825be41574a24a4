"""litdata: chunks made by its ``optimize``, its StreamingDataLoader."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

from benchmarks._data.limit import samples_of
from benchmarks._data.measure import Task, main
from benchmarks._data.picture import tensor


def read(shard: str) -> Iterator[dict[str, Any]]:
    """Samples of one shard."""
    for encoded, caption in samples_of([shard]):
        yield {"jpg": encoded, "txt": caption}


def convert(shards: list[str], folder: str) -> None:
    """Write the samples of ``shards`` as litdata chunks of 64 MB, the size of its examples."""
    optimize(read, shards, folder, chunk_bytes="64MB", num_workers=1)


class _Pictures(StreamingDataset):
    def __init__(self, size: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pixels = size

    def __getitem__(self, at: Any) -> tuple[torch.Tensor, str]:
        sample = super().__getitem__(at)
        return tensor(sample["jpg"], self.pixels), sample["txt"]


def batches(task: Task) -> Iterator[tuple[Any, list[str]]]:
    """One rank's batches of one epoch."""
    dataset = _Pictures(task.size, task.converted, shuffle=True, drop_last=True)
    yield from StreamingDataLoader(
        dataset, batch_size=task.batch, num_workers=task.workers, drop_last=True
    )


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(sorted(str(p) for p in Path(sys.argv[2]).glob("*.tar")), sys.argv[3])
    else:
        main(batches)
