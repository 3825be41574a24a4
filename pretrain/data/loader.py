"""Batches for one rank: a DataLoader over steps whose every answer is a pure function of the step.

A worker makes a whole batch, so the number of workers cannot change the order. The loader's whole
state is the number of the next sample.
"""

import atexit
import gc
import math
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pretrain.data import encoded
from pretrain.data.manifest import give_back_memory
from pretrain.data.order import rank_numbers
from pretrain.data.slots import Slots
from pretrain.data.source import DataConfig, Source
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError, PretrainError
from pretrain.types import Batch, Reject, TextFeatures

__all__ = ["DataConfig", "Loader"]

PREFETCH = 2  # batches asked of each worker at once
HELD = 3  # batches of the rank's own: the one in use, the next, one being copied to the device


class _Asked(NamedTuple):
    """Sample numbers of a rank's batch, and the slot for its pixels, or None."""

    numbers: range
    slot: int | None


class _Made(NamedTuple):
    """A batch on its way from a worker: what is small as arrays, which go through the queue as
    bytes. A tensor would go as a file of its own in shared memory, and its descriptor through a
    socket that is opened for it: four of them cost as much as decoding a picture.

    Attributes:
        numbers, slot: as they were asked for.
        shape_HW: of the pictures.
        pixels: of the batch, unless they are in the slot.
        encoded: latents and text features, of encoded data.
    """

    numbers: range
    slot: int | None
    shape_HW: tuple[int, int]
    pixels: Tensor | None
    tokens: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    rejects: tuple[Reject, ...]
    encoded: tuple[Tensor | None, TextFeatures | None]

    def batch(self, slots: Slots | None) -> Batch:
        """For the rank."""
        pixels = self.pixels
        if pixels is None:
            assert slots is not None and self.slot is not None
            pixels = slots.hand_out(self.slot, (len(self.numbers), 3, *self.shape_HW))
        return Batch(
            pixels,
            torch.from_numpy(self.tokens),
            torch.from_numpy(self.mask),
            torch.arange(self.numbers.start, self.numbers.stop, self.numbers.step),
            self.keys,
            self.captions,
            self.rejects,
            *self.encoded,
        )


class _Steps(Dataset[_Made | PretrainError]):
    """Item: what is asked -> that batch, or the error that prevents it."""

    def __init__(self, config: DataConfig, source: Source, tokenizer: Tokenizer) -> None:
        self.config, self.source, self.tokenizer = config, source, tokenizer
        self.slots: Slots | None = None
        self._looked = 0

    def __getitem__(self, asked: _Asked) -> _Made | PretrainError:
        try:
            self._look_ahead(asked.numbers)
            return self._made(*asked)
        except PretrainError as error:
            return error  # the rank raises it: torch would put a worker's traceback into its text

    def _made(self, numbers: range, slot: int | None = None) -> _Made:
        places = self.source.places(numbers)
        in_slot = None
        if slot is not None and self.slots is not None:
            in_slot = self.slots.view(slot, (len(numbers), 3, *places[0].shape))
        samples = self.source.samples(numbers, places, in_slot)
        captions = tuple(s.caption for s in samples)
        tokens, mask = self.tokenizer.encode(captions, self.config.tokens)
        rejects: list[Reject] = [r for s in samples for r in s.rejects]
        return _Made(
            numbers,
            slot,
            places[0].shape,
            torch.stack([s.picture_CHW for s in samples]) if in_slot is None else None,
            tokens.numpy(),
            mask.numpy(),
            tuple(s.key for s in samples),
            captions,
            tuple(rejects),
            encoded.stack([s.features for s in samples if s.features is not None]),
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
        loader = DataLoader(
            self._steps,
            sampler=schedule,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            # Forked from a training process, a child can inherit a lock that no thread will ever
            # release.
            multiprocessing_context="forkserver" if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )
        batches = iter(loader)
        give_back_memory()  # the source as it was sent to the workers
        for made in batches:
            if isinstance(made, PretrainError):
                raise made
            batch = made.batch(slots)
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


def _as_it_is(made: Any) -> Any:
    return made  # torch's own would make tensors of the arrays


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    give_back_memory()
    gc.freeze()  # what was imported stays: the collector need not walk it again and again
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
