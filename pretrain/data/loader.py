"""Batches for one rank: a DataLoader over steps whose every answer is a pure function of the step.

A worker makes a whole batch, so the number of workers cannot change the order. The loader's whole
state is the number of the next sample.
"""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.config import Config
from pretrain.data.manifest import Manifest
from pretrain.data.sampler import EpochOrder, rank_slice
from pretrain.data.samples import Bounds, Refused, augment, choose_caption, decode, prepare
from pretrain.data.shards import ShardCache
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError, PretrainError
from pretrain.types import Batch, Reject


class DataConfig(Config):
    """Where samples come from and what is made of them.

    Attributes:
        train: URL of the training manifest.
        tokenizer: URL of the sentencepiece model.
        size: pixels on a side of what the model sees.
        tokens: length that captions are padded or cut to.
        shuffle_shards: shards whose samples are shuffled together; that many are kept in memory by
            a worker.
        workers: processes of each rank that decode; 0 decodes in the training process.
        flip: share of pictures that are mirrored.
        jitter: largest shift, as a share of the side.
        max_bytes, max_pixels: larger pictures are refused.
    """

    train: str
    tokenizer: str
    size: int = Field(32, ge=8)
    tokens: int = Field(24, ge=3)
    shuffle_shards: int = Field(16, ge=1)
    workers: int = Field(1, ge=0)
    flip: float = Field(0.0, ge=0, le=1)
    jitter: float = Field(0.0, ge=0, lt=0.5)
    max_bytes: int = Field(32 << 20, ge=1)
    max_pixels: int = Field(64_000_000, ge=1)


class _Steps(Dataset[Batch | PretrainError]):
    """Item: sample numbers of a rank's batch -> that batch, or the error that prevents it."""

    def __init__(
        self, config: DataConfig, manifest: Manifest, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.config, self.manifest, self.tokenizer, self.seed = config, manifest, tokenizer, seed
        self.order = EpochOrder([s.samples for s in manifest.shards], seed, config.shuffle_shards)
        self.bounds = Bounds(config.max_bytes, config.max_pixels)
        # Made in the worker: a file system opened before a fork hangs.
        self._cache: ShardCache | None = None

    def __getitem__(self, numbers: range) -> Batch | PretrainError:
        try:
            return self._batch(numbers)
        except PretrainError as error:
            return error  # the rank raises it: torch would put a worker's traceback into its text

    def _batch(self, numbers: range) -> Batch:
        c = self.config
        images, captions, keys = [], [], []
        rejects: list[Reject] = []
        for number in numbers:
            raw_image, texts, key = self._usable(number, rejects)
            images.append(augment(prepare(raw_image, c.size), c.flip, c.jitter, self.seed, number))
            captions.append(choose_caption(texts, self.seed, number))
            keys.append(key)
        tokens, mask = self.tokenizer.encode(captions, c.tokens)
        return Batch(
            torch.stack(images),
            tokens,
            mask,
            torch.tensor(list(numbers)),
            tuple(keys),
            tuple(captions),
            tuple(rejects),
        )

    def _usable(self, number: int, rejects: list[Reject]) -> tuple[Any, list[str], str]:
        """Sample ``number``, or, where it is refused, the next good one of its shuffling window."""
        if self._cache is None:
            self._cache = ShardCache(self.manifest, self.config.shuffle_shards + 1)
        start, end = self.order.window_of(number)
        for offset in range(end - start):
            raw, odd = self._cache.get(
                *self.order.locate(start + (number - start + offset) % (end - start))
            )
            if offset == 0:  # what is wrong with a substitute is counted at its own place
                rejects += odd
            try:
                image, texts = decode(raw, self.bounds)
            except Refused as refused:
                if offset == 0:
                    rejects.append(Reject(refused.reason, raw.shard, raw.key))
                continue
            return image, texts, raw.key
        raise DataError(
            f"no sample of the {end - start} shuffled with number {number} can be used (the last: "
            f"{rejects[-1]}); "
            "see `python -m pretrain data verify`"
        )


class _Schedule(Sampler[range]):
    """The rank's sample numbers of each step, from ``start``, for ever."""

    def __init__(self, start: int, global_batch: int, rank: int, world: int) -> None:
        self.start, self.global_batch, self.rank, self.world = start, global_batch, rank, world

    def __iter__(self) -> Iterator[range]:
        start = self.start
        while True:
            yield rank_slice(start, self.global_batch, self.rank, self.world)
            start += self.global_batch


class Loader:
    """Iterates for ever over this rank's batches.

    Args:
        config: what to read.
        tokenizer: of the captions.
        seed: of the order, the captions and the augmentation.
        global_batch: samples of a step over all ranks.
        rank, world: this rank takes the ``rank``-th of ``world`` equal slices of each global batch.
        start: global number of the first sample.

    Raises:
        ConfigError: the batch does not divide by the ranks.
        DataError: the manifest is missing or empty.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        start: int = 0,
    ) -> None:
        rank_slice(start, global_batch, rank, world)  # says what is wrong before anything is read
        self.config, self.global_batch, self.rank, self.world = config, global_batch, rank, world
        self.manifest = Manifest.load(config.train)
        self.next_sample = start
        self._steps = _Steps(config, self.manifest, tokenizer, seed)

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.manifest.num_samples

    @property
    def fingerprint(self) -> str:
        """Of the manifest: what sample numbers refer to."""
        return self.manifest.fingerprint

    def __iter__(self) -> Iterator[Batch]:
        schedule = _Schedule(self.next_sample, self.global_batch, self.rank, self.world)
        workers = self.config.workers
        if workers:
            # Imported once by the server that workers are forked from, not by each worker.
            multiprocessing.set_forkserver_preload(["pretrain.data.loader"])
        batches = DataLoader(
            self._steps,
            sampler=schedule,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            # Forked from a training process, a child can inherit a lock that no thread will ever
            # release.
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in batches:
            if isinstance(batch, PretrainError):
                raise batch
            # Counted when it is handed out: what workers have read ahead is read again after a
            # resume.
            self.next_sample += self.global_batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of the next sample: all there is to know."""
        return {"next_sample": self.next_sample}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there; takes effect at the next ``iter``."""
        self.next_sample = int(state["next_sample"])


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # A scheduler signals the whole process group; the rank decides when its workers end.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# Runs before multiprocessing's own exit, which sends SIGTERM and would wait for ever: workers that
# outlive their iterator, as after an error, ignore it.
atexit.register(_kill_workers)
