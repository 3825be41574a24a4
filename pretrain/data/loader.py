"""Batches for one rank: a DataLoader over steps whose every answer is a pure function of the step.

A worker makes a whole batch, so the number of workers cannot change the order. The loader's whole
state is the number of the next sample.
"""

import atexit
import math
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pretrain.data import encoded
from pretrain.data.order import rank_numbers
from pretrain.data.slots import Slots
from pretrain.data.source import DataConfig, Source
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError, PretrainError
from pretrain.types import Batch, Reject

__all__ = ["DataConfig", "Loader"]

PREFETCH = 2  # batches asked of each worker at once
HELD = 3  # batches of the rank's own: the one in use, the next, one being copied to the device


class _Asked(NamedTuple):
    """Sample numbers of a rank's batch, and the slot for its pixels, or None."""

    numbers: range
    slot: int | None


class _Made(NamedTuple):
    """A batch; its pixels are in the slot, if there is one."""

    batch: Batch
    slot: int | None


class _Steps(Dataset[_Made | PretrainError]):
    """Item: what is asked -> that batch, or the error that prevents it."""

    def __init__(self, config: DataConfig, source: Source, tokenizer: Tokenizer) -> None:
        self.config, self.source, self.tokenizer = config, source, tokenizer
        self.slots: Slots | None = None
        self._looked = 0

    def __getitem__(self, asked: _Asked) -> _Made | PretrainError:
        try:
            self._look_ahead(asked.numbers)
            return _Made(self._batch(*asked), asked.slot)
        except PretrainError as error:
            return error  # the rank raises it: torch would put a worker's traceback into its text

    def _batch(self, numbers: range, slot: int | None = None) -> Batch:
        places = self.source.places(numbers)
        shape = (3, *places[0].shape)
        pixels = None
        if slot is not None and self.slots is not None:
            pixels = self.slots.view(slot, (len(numbers), *shape))
        samples = self.source.samples(numbers, places, pixels)
        captions = tuple(s.caption for s in samples)
        tokens, mask = self.tokenizer.encode(captions, self.config.tokens)
        rejects: list[Reject] = [r for s in samples for r in s.rejects]
        return Batch(
            # (What is in a slot is there already; the rank makes a tensor of it.)
            torch.stack([s.picture_CHW for s in samples])
            if pixels is None
            else torch.empty(0, *shape, dtype=torch.uint8),
            tokens,
            mask,
            torch.tensor(numbers),
            tuple(s.key for s in samples),
            captions,
            tuple(rejects),
            *encoded.stack([s.features for s in samples if s.features is not None]),
        )

    def _look_ahead(self, numbers: range) -> None:
        """Twice in each stretch of ``ahead_samples``, fetch the shards of the next."""
        reach = self.config.read.ahead_samples * numbers.step
        if not reach or numbers.start < self._looked:
            return
        self._looked = numbers.start + reach // 2
        info = get_worker_info()
        part = (info.id, info.num_workers) if info else (0, 1)
        self.source.ahead(range(numbers.start, numbers.start + reach, numbers.step), part)


class _Schedule(Sampler[_Asked]):
    """The rank's sample numbers of each step, from ``start``, for ever."""

    def __init__(
        self, start: int, global_batch: int, rank: int, world: int, slots: Slots | None
    ) -> None:
        self.start, self.global_batch, self.rank, self.world = start, global_batch, rank, world
        self.slots = slots

    def __iter__(self) -> Iterator[_Asked]:
        start = self.start
        while True:
            numbers = rank_numbers(start, self.global_batch, self.rank, self.world)
            yield _Asked(numbers, self.slots.take() if self.slots else None)
            start += self.global_batch


class Loader:
    """Iterates for ever over this rank's batches.

    Args:
        config: what to read.
        tokenizer: of the captions.
        seed: of the order, the captions and the augmentation.
        global_batch: samples of a step over all ranks.
        rank, world: this rank takes every ``world``-th sample, from the ``rank``-th on: with the
            order's lanes, ranks then read different shards.
        start: global number of the first sample.

    Raises:
        ConfigError: the batch does not divide by the ranks, or a bucket's group by the batch.
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
        # Says what is wrong before anything is read.
        rank_numbers(start, global_batch, rank, world)
        if config.bucket_group and config.bucket_group % global_batch:
            raise ConfigError(
                f"data.bucket_group={config.bucket_group} is not a multiple of "
                f"training.global_batch={global_batch}; a batch has one shape: try {global_batch}"
            )
        self.config, self.global_batch, self.rank, self.world = config, global_batch, rank, world
        self.next_sample = start
        self.source = Source(config, seed)
        self._steps = _Steps(config, self.source, tokenizer)

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.source.num_samples

    @property
    def advice(self) -> str | None:
        """What would spare this many ranks reading the same remote shards; None where all is
        well."""
        lanes = self.source.lanes
        if self.world == 1 or lanes % self.world == 0 or not self.source.remote:
            return None
        times = self.world // math.gcd(lanes, self.world)
        return (
            f"data.order.lanes={lanes} is not a multiple of {self.world} ranks: a shard is read "
            f"by up to {times} of them; set it to {-(-lanes // self.world) * self.world} in a new "
            "run, or data.read.access=ranged (see `python -m pretrain data plan`)"
        )

    @property
    def fingerprint(self) -> str:
        """Of all that sample numbers depend on: shards and order."""
        return self.source.fingerprint

    @property
    def encodings(self) -> list[encoded.Encoding]:
        """What made each data set, where they are encoded; ``text`` where it is used."""
        found = self.source.encodings
        return found if self.config.encoded_text else [replace(e, text=None) for e in found]

    def __iter__(self) -> Iterator[Batch]:
        c, workers, slots = self.config, self.config.workers, None
        if workers and not c.encoded:
            pixel_bytes = self.global_batch // self.world * 3 * c.size**2
            slots = Slots(workers * PREFETCH + HELD, pixel_bytes)
        self._steps.slots = slots
        schedule = _Schedule(self.next_sample, self.global_batch, self.rank, self.world, slots)
        if workers:
            # Imported once by the server that workers are forked from, not by each worker.
            multiprocessing.set_forkserver_preload(["pretrain.data.loader"])
        batches = DataLoader(
            self._steps,
            sampler=schedule,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            # Forked from a training process, a child can inherit a lock that no thread will ever
            # release.
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )
        for made in batches:
            if isinstance(made, PretrainError):
                raise made
            batch, slot = made
            if slots is not None and slot is not None:
                shape = (len(batch), *batch.images_BCHW.shape[1:])
                batch = replace(batch, images_BCHW=slots.hand_out(slot, shape))
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
