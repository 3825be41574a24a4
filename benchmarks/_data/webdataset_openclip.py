"""webdataset as open_clip composes it: open_clip's own function makes the pipeline.

One thing is replaced: ``wds.decode("pilrgb")`` followed by the transform. The transform here is
`picture.tensor` on the bytes, so that the pixels are everybody's.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import webdataset
from open_clip_train import data

from benchmarks._data.measure import Task, main
from benchmarks._data.picture import tensor

_decode = webdataset.decode


def batches(task: Task) -> Iterator[tuple[Any, list[str]]]:
    """One rank's batches, without resampling, epoch after epoch."""
    arguments = Namespace(
        train_data="::".join(task.shards * task.times),
        train_num_samples=task.times * task.batches * task.batch,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=task.workers,
        batch_size=task.batch,
        world_size=1,
    )

    def image_of(key: str, value: bytes) -> torch.Tensor | None:
        return tensor(value, task.size) if key.endswith(".jpg") else None

    with mock.patch.object(
        webdataset, "decode", lambda *_, **options: _decode(image_of, **options)
    ):
        info = data.get_wds_dataset(
            arguments, lambda image: image, is_train=True, tokenizer=lambda text: [text]
        )
    while True:
        yield from info.dataloader


if __name__ == "__main__":
    main(batches)
