"""litdata: chunks made by its ``optimize``, its StreamingDataLoader."""

import json
import sys
import tempfile
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
    """One rank's batches, epoch after epoch."""
    with tempfile.TemporaryDirectory() as folder:
        listed = task.converted if task.times == 1 else repeat(Path(task.converted), task, folder)
        dataset = _Pictures(task.size, listed, shuffle=True, drop_last=True)
        loader = StreamingDataLoader(
            dataset, batch_size=task.batch, num_workers=task.workers, drop_last=True
        )
        while True:
            yield from loader


def repeat(converted: Path, task: Task, folder: str) -> str:
    """``folder`` filled with an index that lists the chunks again and again, under names of their
    own that all lead to the same few files."""
    index = json.loads((converted / "index.json").read_text())
    listed = []
    for number in range(task.times):
        for chunk in index["chunks"]:
            name = chunk["filename"].replace("chunk-0-", f"chunk-0-{number:03d}")
            (Path(folder) / name).symlink_to(converted / chunk["filename"])
            listed.append(chunk | {"filename": name})
    (Path(folder) / "index.json").write_text(json.dumps(index | {"chunks": listed}))
    return folder


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(sorted(str(p) for p in Path(sys.argv[2]).glob("*.tar")), sys.argv[3])
    else:
        main(batches)
