"""From a sample's number to its picture and caption: order, reader and decoder, put together.

Pure in (seed, number): the loader, `data explain` and every rank get the same answer.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain import storage
from pretrain.config import Config
from pretrain.data import encoded
from pretrain.data.manifest import ASPECTS, Manifest, give_back_memory
from pretrain.data.order import Buckets, EpochOrder, Mixture
from pretrain.data.reader import Read, ReadConfig, ShardReader
from pretrain.data.samples import (
    Bounds,
    Opened,
    Refused,
    augment,
    choose_caption,
    fitted,
    load,
    open_sample,
    without_warnings,
)
from pretrain.data.shards import RawSample
from pretrain.errors import DataError, UnreadableShard
from pretrain.rng import derive_seed
from pretrain.types import Reject

NEIGHBOURS = 64  # of a refused sample in its shard that are tried in its place
FURTHER = 1024  # sample numbers after it that are tried next


class SourceConfig(Config):
    """One of several data sets; all have a ``weight`` or all have ``epochs``.

    Attributes:
        manifest: URL.
        weight: share of the samples, relative to the others' weights; each data set then has its
            own epochs.
        epochs: visits of each sample in one epoch of the mixture; may be fractional.
    """

    manifest: str
    weight: float | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of(self) -> "SourceConfig":
        if (self.weight is None) == (self.epochs is None):
            raise ValueError(
                f"manifest={self.manifest!r} needs either weight or epochs; give one of them"
            )
        return self


class OrderConfig(Config):
    """How samples are shuffled; a run goes on only with the order that it began with.

    Attributes:
        lanes: streams that are read side by side; ranks that divide it read different shards.
            None: the largest power of two that leaves each 8 shards, at most 1,024.
        window: samples of a lane that are permuted together; None: a whole lane, which needs
            access to all its shards at once.
        resample: draw with replacement.
    """

    lanes: int | None = Field(None, ge=1)
    window: int | None = Field(16_384, ge=1)
    resample: bool = False


class DataConfig(Config):
    """Where samples come from and what is made of them.

    Attributes:
        train: URL of the training manifest, or a list of data sets to mix.
        tokenizer: URL of the sentencepiece model.
        size: pixels on a side of what the model sees; of aspect buckets, the root of the area.
        tokens: length that captions are padded or cut to.
        order: how samples are shuffled.
        read: how shards are reached.
        workers: processes of each rank that decode; 0 decodes in the training process.
        crop: where a picture that is not of the wanted shape is cut.
        flip: share of pictures that are mirrored.
        jitter: largest shift, as a share of the side.
        max_bytes, max_pixels: larger pictures are refused.
        max_reject_rate: share of refused samples above which the run stops.
        bucket_group: aspect buckets: this many samples in a row have one shape, the nearest of
            `ASPECTS` to their own; a multiple of training.global_batch. None: all are square.
        bucket_multiple: the sides of the buckets' shapes are multiples of it.
        encoded: ``train`` holds latents, written by `data encode`, in place of pictures.
        encoded_text: its text features too are taken in place of encoding captions; the model's
            text encoder is frozen then.
    """

    train: str | list[SourceConfig]
    tokenizer: str
    size: int = Field(32, ge=8)
    tokens: int = Field(24, ge=3)
    order: OrderConfig = OrderConfig()
    read: ReadConfig = ReadConfig()
    workers: int = Field(1, ge=0)
    crop: Literal["center", "random"] = "center"
    flip: float = Field(0.0, ge=0, le=1)
    jitter: float = Field(0.0, ge=0, lt=0.5)
    max_bytes: int = Field(32 << 20, ge=1)
    max_pixels: int = Field(64_000_000, ge=1)
    max_reject_rate: float = Field(0.05, ge=0, le=1)
    bucket_group: int | None = Field(None, ge=1)
    bucket_multiple: int = Field(8, ge=1)
    encoded: bool = False
    encoded_text: bool = False

    @model_validator(mode="after")
    def _fits_latents(self) -> "DataConfig":
        if self.encoded_text and not self.encoded:
            raise ValueError(
                "encoded_text=true needs encoded=true: text features lie beside latents; set both"
            )
        if self.encoded and self.jitter:
            raise ValueError(
                f"jitter={self.jitter:g} shifts pixels, which latents (encoded=true) have none of; "
                "set jitter: 0"
            )
        if self.encoded and self.crop != "center":
            raise ValueError(
                f"crop={self.crop!r} cuts pixels, which latents (encoded=true) have none of; set "
                "crop: center, as they were made"
            )
        if self.encoded and self.bucket_group:
            raise ValueError(
                f"bucket_group={self.bucket_group} needs the pictures' shapes, and latents "
                "(encoded=true) have one shape; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_kind(self) -> "DataConfig":
        if self.bucket_group and self.order.resample:
            raise ValueError(
                f"bucket_group={self.bucket_group} draws without replacement; leave "
                "order.resample out"
            )
        if isinstance(self.train, str):
            return self
        if not self.train:
            raise ValueError("train=[] names no data set; give at least one")
        if len({source.weight is None for source in self.train}) > 1:
            raise ValueError("train mixes weight and epochs; give every data set the same one")
        if self.bucket_group and any(s.epochs != 1 for s in self.train):
            raise ValueError(
                f"bucket_group={self.bucket_group} joins the data sets of train: give each "
                "epochs: 1, or leave bucket_group out"
            )
        return self

    @property
    def bounds(self) -> Bounds:
        """Of a picture that is decoded at all."""
        return Bounds(self.max_bytes, self.max_pixels)


@dataclass(frozen=True)
class Place:
    """Where a sample is, and what shape (H, W) the model sees it in."""

    dataset: int
    shard: int
    index: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """What number ``number`` stands for.

    Attributes:
        number: global sample number.
        place: where the order puts it.
        used: where the picture was taken from: ``place``, unless that sample was refused.
        key, caption: of the picture.
        picture_CHW: uint8; of encoded data without a pixel, (3, 0, 0).
        rejects: of ``place``, empty as a rule.
        features: of encoded data.
    """

    number: int
    place: Place
    used: Place
    key: str
    caption: str
    picture_CHW: Tensor
    rejects: list[Reject] = field(default_factory=list)
    features: encoded.Features | None = None


class _Row(NamedTuple):
    """Where a picture is to be written: the same memory twice, for one takes long to make of the
    other between two pictures."""

    tensor: Tensor
    array: npt.NDArray[np.uint8]


class _Opened(NamedTuple):
    """What was read of a place: no ``raw`` where it is refused, nothing ``opened`` where it is
    encoded; ``rejects`` so far."""

    raw: RawSample | None
    opened: Opened | None
    rejects: list[Reject]


def shape_of(aspect: int, size: int, multiple: int) -> tuple[int, int]:
    """(height, width) of an aspect bucket: at most size² pixels, sides multiples of
    ``multiple``."""
    ratio = math.sqrt(ASPECTS[aspect])
    width, height = (int(side / multiple) * multiple for side in (size * ratio, size / ratio))
    return max(multiple, height), max(multiple, width)


class Source:
    """Samples by number.

    Args:
        config: what to read.
        seed: of the order, the captions and the augmentation.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        listed = config.train
        sources = [SourceConfig(manifest=listed, epochs=1)] if isinstance(listed, str) else listed
        self.manifests = [
            Manifest.load(s.manifest, config.read.retry, versions=False) for s in sources
        ]
        give_back_memory()
        self.mixture: Mixture | None = None
        self.buckets: Buckets | None = None
        if config.bucket_group:
            self.buckets = self._bucketed(config.bucket_group)
        else:
            orders = [self._ordered(m, derive_seed(seed, i)) for i, m in enumerate(self.manifests)]
            weights, epochs = zip(*((s.weight, s.epochs) for s in sources), strict=True)
            mixed = {"weights": weights} if epochs[0] is None else {"epochs": epochs}
            self.mixture = Mixture(orders, **mixed)
        self._reader: ShardReader | None = None
        self.encodings: list[encoded.Encoding] = []
        if config.encoded:
            self.encodings = [encoded.read_encoding(m, config.read) for m in self.manifests]
            encoded.check(self.encodings, config)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, over all data sets."""
        return sum(m.num_samples for m in self.manifests)

    @property
    def lanes(self) -> int:
        """Streams that are read side by side."""
        order = self.mixture or self.buckets
        assert order is not None
        return order.lanes

    @property
    def remote(self) -> bool:
        """Whether whole shards come over a network."""
        far = any(storage.is_remote(m.url(0)) for m in self.manifests)
        return far and self.config.read.access != "ranged"

    @property
    def fingerprint(self) -> str:
        """Of all that sample numbers depend on."""
        order = self.mixture or self.buckets
        assert order is not None
        parts = [m.fingerprint for m in self.manifests] + [order.fingerprint]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def places(self, numbers: Sequence[int]) -> list[Place]:
        """Where the order puts each number."""
        size, found = self.config.size, []
        rows = zip(*(a.tolist() for a in self._located(numbers)), strict=True)
        for dataset, shard, index, aspect in rows:
            shape = (size, size)
            if aspect >= 0:
                index = self._open().aspect_member(dataset, shard, aspect, index)
                shape = shape_of(aspect, size, self.config.bucket_multiple)
            found.append(Place(dataset, shard, index, shape))
        return found

    def _located(self, numbers: Sequence[int]) -> tuple[npt.NDArray[np.int64], ...]:
        """(data sets, shards, indices, aspects): with aspect buckets the index counts within the
        bucket; without, the aspect is -1."""
        asked = np.asarray(numbers, dtype=np.int64)
        if self.mixture is not None:
            return *self.mixture.locate(asked), np.full_like(asked, -1)
        assert self.buckets is not None
        aspects, joined, indices = self.buckets.locate(asked)
        firsts = np.cumsum([0, *(len(m.shards) for m in self.manifests)])
        datasets = np.searchsorted(firsts, joined, side="right") - 1
        return datasets, joined - firsts[datasets], indices, aspects

    def samples(
        self,
        numbers: Sequence[int],
        places: Sequence[Place] | None = None,
        out: Tensor | None = None,
    ) -> list[Sample]:
        """The samples of ``numbers``; one that is refused is replaced by a good one near it.

        Args:
            places: of the numbers, where they are known already.
            out: (len(numbers), 3, H, W) uint8 to decode into; None: memory of its own for each.

        Raises:
            UnreadableShard: and the configuration says to stop at one.
            DataError: nothing near a refused sample can be used.
        """
        places = places or self.places(numbers)
        rows = (
            [_Row(*pair) for pair in zip(out, out.numpy(), strict=True)] if out is not None else []
        )
        samples: list[Sample] = []
        with without_warnings():
            for reads in self._open().read_groups([(p.dataset, p.shard, p.index) for p in places]):
                here = places[len(samples) : len(samples) + len(reads)]
                opened = deque(self._opened(p, r) for p, r in zip(here, reads, strict=True))
                while opened:  # what is done with is let go, with its decoded picture
                    at = len(samples)
                    row = rows[at] if rows else None
                    samples.append(self._sample(numbers[at], places[at], opened.popleft(), row))
        return samples

    def ahead(self, numbers: Sequence[int], part: tuple[int, int]) -> None:
        """Fetch the shards of numbers that come later; ``part`` (i, n): only the i-th n-th of
        them, for the others have another reader."""
        reader = self._open()
        if not reader.uses_cache:
            return
        datasets, shards = self._located(numbers)[:2]
        places = dict.fromkeys(zip(datasets.tolist(), shards.tolist(), strict=True))
        reader.ahead([p for p in places if sum(p) % part[1] == part[0]])

    def close(self) -> None:
        """Close files."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _ordered(self, manifest: Manifest, seed: int) -> EpochOrder:
        o = self.config.order
        return EpochOrder(manifest.sizes, seed, lanes=o.lanes, window=o.window, resample=o.resample)

    def _bucketed(self, group: int) -> Buckets:
        o = self.config.order
        sizes = np.concatenate([m.shards.columns["aspects"] for m in self.manifests]).T.astype(
            np.int64
        )
        return Buckets(sizes, self.seed, group, lanes=o.lanes, window=o.window)

    def _open(self) -> ShardReader:
        # Made in the worker: a file system opened before a fork hangs.
        if self._reader is None:
            self._reader = ShardReader(self.manifests, self.config.read)
        return self._reader

    def _sample(self, number: int, place: Place, opened: "_Opened", row: "_Row | None") -> Sample:
        found = self._decoded(number, place, place, opened, row)
        if found is not None:
            return found
        for other in self._substitutes(number, place):
            (read,) = self._open().read_many([(other.dataset, other.shard, other.index)])
            found = self._decoded(number, place, other, self._opened(other, read), row)
            if found is not None:
                return replace(found, rejects=opened.rejects)
        last = opened.rejects[-1]
        raise DataError(
            f"sample {number} was refused ({last.reason}: {last.shard}:{last.key}), and so was "
            f"every one of {NEIGHBOURS + FURTHER} near it; see `python -m pretrain data verify`"
        )

    def _opened(self, used: Place, read: Read | UnreadableShard) -> "_Opened":
        """What was read, opened as far as no pixel is decoded, or the reasons against it."""
        c = self.config
        if isinstance(read, UnreadableShard):
            if c.read.on_unreadable == "stop":
                raise read
            return _Opened(None, None, [Reject("unreadable shard", read.url, f"#{used.index}")])
        raw, rejects = read
        opened = None
        if raw is not None and not c.encoded:
            try:
                opened = open_sample(raw, c.bounds, used.shape)
            except Refused as refused:
                rejects.append(Reject(refused.reason, raw.shard, raw.key))
                raw = None
        return _Opened(raw, opened, rejects)

    def _decoded(
        self, number: int, place: Place, used: Place, found: "_Opened", row: "_Row | None"
    ) -> Sample | None:
        """The sample at ``used``, or None and the reason appended to its rejects."""
        c = self.config
        raw, opened, rejects = found
        if raw is None:
            return None
        try:
            if opened is None:
                encoding = self.encodings[used.dataset]
                features = encoded.unpack(raw, encoding, c, self.seed, number)
                caption, nothing = features.caption, torch.empty((3, 0, 0), dtype=torch.uint8)
                return Sample(number, place, used, raw.key, caption, nothing, rejects, features)
            image = load(opened, c.bounds, place.shape)
        except Refused as refused:
            rejects.append(Reject(refused.reason, raw.shard, raw.key))
            return None
        cut_CHW = fitted(image, place.shape, c.crop, self.seed, number)
        if row is None:
            pixels = torch.from_numpy(np.ascontiguousarray(cut_CHW))
        else:
            np.copyto(row.array, cut_CHW)
            pixels = row.tensor
        changed = augment(pixels, c.flip, c.jitter, self.seed, number)
        if row is not None and changed is not pixels:
            changed = pixels.copy_(changed)
        caption = choose_caption(opened.captions, self.seed, number)
        return Sample(number, place, used, raw.key, caption, changed, rejects)

    def _substitutes(self, number: int, place: Place) -> Iterator[Place]:
        size = int(self.manifests[place.dataset].sizes[place.shard])
        for step in range(1, min(size, NEIGHBOURS + 1)):
            index = (place.index + step) % size
            yield Place(place.dataset, place.shard, index, place.shape)
        for other in self.places(range(number + 1, number + 1 + FURTHER)):
            yield Place(other.dataset, other.shard, other.index, place.shape)
