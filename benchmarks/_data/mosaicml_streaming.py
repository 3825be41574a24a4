"""mosaicml-streaming: MDS shards on the local disk, its StreamingDataLoader, its default shuffle.

The JPEG is kept as bytes: MDS's own ``jpeg`` column would decode with Pillow in the same place.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset

from benchmarks._data.limit import samples_of
from benchmarks._data.measure import Task, main
from benchmarks._data.picture import tensor


def convert(shards: list[str], folder: str) -> None:
    """Write the samples of ``shards`` as MDS."""
    with MDSWriter(out=folder, columns={"jpg": "bytes", "txt": "str"}) as out:
        for encoded, caption in samples_of(shards):
            out.write({"jpg": encoded, "txt": caption})


class _Pictures(StreamingDataset):
    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(**options)
        self.pixels = size

    def __getitem__(self, at: int) -> tuple[torch.Tensor, str]:
        sample = super().__getitem__(at)
        return tensor(sample["jpg"], self.pixels), sample["txt"]


def batches(task: Task) -> Iterator[tuple[Any, list[str]]]:
    """One rank's batches, epoch after epoch."""
    streams = [Stream(local=task.converted, repeat=task.times)]
    dataset = _Pictures(task.size, streams=streams, shuffle=True, batch_size=task.batch)
    loader = StreamingDataLoader(
        dataset, batch_size=task.batch, num_workers=task.workers, drop_last=True
    )
    while True:
        yield from loader


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(sorted(str(p) for p in Path(sys.argv[2]).glob("*.tar")), sys.argv[3])
    else:
        main(batches)
