"""Every picture of some shards once, in storage order, for whoever makes something else of them.

A process decodes a whole step, so the number of processes changes neither order nor steps.
"""

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.data.manifest import Manifest
from pretrain.data.reader import ShardReader
from pretrain.data.samples import Refused, decode, picture
from pretrain.data.source import DataConfig
from pretrain.errors import PretrainError
from pretrain.types import Reject


@dataclass(frozen=True)
class Decoded:
    """A picture to be encoded, and what goes with it."""

    key: str
    fields: dict[str, Any]
    captions: list[str]
    picture_CHW: Tensor


@dataclass(frozen=True)
class Step:
    """Samples ``start`` to ``end`` of a shard; ``following`` is the shard that this process reads
    next."""

    dataset: int
    shard: int
    start: int
    end: int
    following: tuple[int, int] | None


@dataclass(frozen=True)
class Read:
    """What a step's samples are: good ones, refused ones."""

    samples: list[Decoded]
    rejects: list[Reject]


class Pictures(Dataset[Read | PretrainError]):
    """Item: step -> its samples decoded, or the error that prevents it."""

    def __init__(self, manifests: Sequence[Manifest], config: DataConfig) -> None:
        self.manifests, self.config = manifests, config
        self._reader: ShardReader | None = None

    def __getitem__(self, step: Step) -> Read | PretrainError:
        # Made in the worker: a file system opened before a fork hangs.
        self._reader = self._reader or ShardReader(self.manifests, self.config.read)
        if step.start == 0 and step.following:
            self._reader.ahead([step.following])
        try:
            return self._read(self._reader, step)
        except PretrainError as error:
            return error  # torch would put a worker's traceback into its text

    def _read(self, reader: ShardReader, step: Step) -> Read:
        found = Read([], [])
        shape = (self.config.size, self.config.size)
        for at in range(step.start, step.end):
            raw, odd = reader.read(step.dataset, step.shard, at)
            found.rejects.extend(odd)
            if raw is None:
                continue
            try:
                image, captions = decode(raw, self.config.bounds, shape)
            except Refused as refused:
                found.rejects.append(Reject(refused.reason, raw.shard, raw.key))
                continue
            fields = json.loads(raw.files.get("json", b"{}"))
            found.samples.append(Decoded(raw.key, fields, captions, picture(image, shape)))
        return found


class Steps(Sampler[Step]):
    """The steps of shards, in their order; none holds samples of two, so that a shard's bytes do
    not depend on which others are encoded with it."""

    def __init__(
        self, shards: Sequence[tuple[int, int]], manifests: Sequence[Manifest], batch: int
    ) -> None:
        self.shards, self.manifests, self.batch = shards, manifests, batch

    def count(self, place: tuple[int, int]) -> int:
        """Steps of a shard."""
        return -(-int(self.manifests[place[0]].sizes[place[1]]) // self.batch)

    def __iter__(self) -> Iterator[Step]:
        for (dataset, shard), following in zip_longest(self.shards, self.shards[1:]):
            size = int(self.manifests[dataset].sizes[shard])
            for start in range(0, size, self.batch):
                yield Step(dataset, shard, start, min(start + self.batch, size), following)


def read_all(steps: Steps, config: DataConfig) -> Iterator[Read]:
    """What each step's samples are, decoded in ``data.workers`` processes ahead of the encoders."""
    workers = config.workers if steps.shards else 0
    if workers:
        # Imported once by the server that workers are forked from, not by each worker.
        multiprocessing.set_forkserver_preload(["pretrain.data.pictures"])
    reads = DataLoader(
        Pictures(steps.manifests, config),
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )
    for read in reads:
        if isinstance(read, PretrainError):
            raise read
        yield read
