"""Sets for evaluation: labels or captions of every image in memory, the images read when asked for.

A rank reads the images of its share alone. What small files of a set say (labels, captions, keys)
is gathered in one pass over its shards, once a node, and kept in the node's cache.
"""

import json
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain import storage
from pretrain.data import clipfolder
from pretrain.data.clipfolder import Beat
from pretrain.data.evalnotes import notes_of, raw_samples
from pretrain.data.evalnotes import read_all as read_all
from pretrain.data.loader import DataConfig
from pretrain.data.manifest import Manifest
from pretrain.data.reader import ReadConfig, ShardReader
from pretrain.data.samples import (
    IMAGE_EXTENSIONS,
    Bounds,
    Refused,
    open_picture,
    picture,
    upright,
)
from pretrain.data.setconfig import SetConfig, Task
from pretrain.data.shards import RawSample
from pretrain.errors import DataError

CACHED_BYTES = 64 << 20  # of decoded pictures that a set keeps: evaluators run again and again
OPEN_SETS = 16


class Sight(NamedTuple):
    """How images are seen: pixels on a side, what is opened at all, how shards are reached."""

    size: int
    bounds: Bounds
    read: ReadConfig


class EvalSet:
    """Images with their labels or captions, in the order of the shards.

    Attributes:
        name: for messages; the first one it was opened by.
        task: what it is for.
        classes: names; empty of a retrieval set.
        templates: the set's own prompts, or None.
        labels_N: int64 index into ``classes``; of a retrieval set the image's own number.
        captions: of each image; of a classification set its class name.
        keys: sample names.
        images_sha256: of the images and their order.
        fingerprint: sha256 of all that a score depends on.
        config: as asked for.
    """

    def __init__(
        self,
        name: str,
        config: SetConfig,
        task: Task,
        manifest: Manifest,
        sight: Sight,
        keys: tuple[str, ...],
        classes: tuple[str, ...],
        templates: tuple[str, ...] | None,
        labels: Sequence[int],
        captions: tuple[tuple[str, ...], ...],
    ) -> None:
        self.name, self.config, self.task, self.keys = name, config, task, keys
        self.classes, self.templates, self.captions = classes, templates, captions
        self.labels_N = torch.tensor(labels, dtype=torch.int64)
        self.images_sha256 = manifest.fingerprint
        parts = [manifest.fingerprint, task, classes, templates, labels, captions]
        self.fingerprint = storage.sha256_bytes(json.dumps(parts).encode())
        self._manifest, self._sight, size = manifest, sight, sight.size
        small = len(keys) * 3 * size * size <= CACHED_BYTES
        self._pixels = torch.empty(len(keys), 3, size, size, dtype=torch.uint8) if small else None
        self._here: npt.NDArray[np.bool_] = np.zeros(len(keys), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.keys)

    def images(self, indices: Sequence[int]) -> Tensor:
        """fp32 in [-1, 1], (n, 3, size, size), prepared as in training.

        Raises:
            DataError: one is damaged or cannot be read: an evaluation set is never silently
                smaller.
        """
        numbers = list(indices)
        if self._pixels is None:
            found = torch.empty(
                len(numbers), 3, self._sight.size, self._sight.size, dtype=torch.uint8
            )
            self._decode(numbers, found, range(len(numbers)))
            return found.float() / 127.5 - 1
        missing = [i for i in numbers if not self._here[i]]
        self._decode(missing, self._pixels, missing)
        self._here[missing] = True
        return self._pixels[numbers].float() / 127.5 - 1

    def pictures(self, indices: Sequence[int]) -> list[bytes]:
        """Encoded pictures, as stored."""
        return [self._encoded(raw) for raw in self._samples(list(indices))]

    def _decode(self, numbers: list[int], into: Tensor, rows: Sequence[int]) -> None:
        shape = (self._sight.size, self._sight.size)
        for row, raw in zip(rows, self._samples(numbers), strict=True):
            encoded = self._encoded(raw)
            try:
                if len(encoded) > self._sight.bounds.max_bytes:
                    raise Refused("too many bytes")
                image = upright(open_picture(encoded, self._sight.bounds, shape))
            except Refused as refused:
                raise DataError(
                    f"evaluation set {self.name!r}: sample {raw.key!r} is damaged: {refused}"
                ) from None
            picture(image, shape, out=into[row])

    def _encoded(self, raw: RawSample) -> bytes:
        found = next((raw.files[e] for e in IMAGE_EXTENSIONS if e in raw.files), None)
        if found is None:
            raise DataError(f"evaluation set {self.name!r}: sample {raw.key!r} has no image")
        return found

    def _samples(self, numbers: list[int]) -> Iterator[RawSample]:
        starts: list[int] = self._manifest.starts.tolist()
        places = []
        for number in numbers:
            shard = bisect_right(starts, number) - 1
            places.append((0, shard, number - starts[shard]))
        yield from raw_samples(self._reader, places, self.name)

    @cached_property
    def _reader(self) -> ShardReader:
        reader = ShardReader([self._manifest], self._sight.read)
        weakref.finalize(self, reader.close)
        return reader


class There(NamedTuple):
    """What lies where a set should be, found out without reading a shard.

    Attributes:
        folder: what its small files say; None of a manifest.
        versions: of each shard, by the store; of a manifest its sha256, for it holds theirs.
    """

    folder: clipfolder.ClipFolder | None
    versions: tuple[str, ...]

    def version(self) -> str:
        """sha256 of all of it but for where it lies: the same set elsewhere is the same."""
        held = self.folder and replace(self.folder, shards=())
        return storage.sha256_bytes(repr((held, self.versions)).encode())


def look(name: str, config: SetConfig, retry: storage.Retry) -> There:
    """What is there of a set.

    Args:
        name: for messages.

    Raises:
        DataError: it is missing, or cannot be understood.
    """
    if config.url is not None:
        folder = clipfolder.read_folder(config.url, config.split, retry)
        return There(folder, clipfolder.versions(folder))
    assert config.manifest is not None
    try:
        return There(None, (storage.sha256(config.manifest),))
    except OSError as error:
        raise DataError(
            f"evaluation set {name!r}: manifest={config.manifest!r} cannot be read "
            f"({error.strerror or error}); correct the path, or make it with "
            "`python -m pretrain data index`"
        ) from None


_sets: OrderedDict[Any, EvalSet] = OrderedDict()


def open_set(
    name: str, config: SetConfig, data: DataConfig | Sight, beat: Beat = lambda: None
) -> EvalSet:
    """The set, the same object for the same contents.

    Args:
        name: for messages.
        data: what the model's images are like, and how shards are reached.
        beat: called every second or so while the set is read for the first time.

    Raises:
        DataError: it is missing, damaged, or not what ``config`` says.
    """
    sight = data if isinstance(data, Sight) else Sight(data.size, data.bounds, data.read)
    there = look(name, config, sight.read.retry)
    key = (config, there, sight)
    if key not in _sets:
        url = config.manifest or ""
        if there.folder is not None:
            url = clipfolder.indexed(there.folder, there.versions, sight.read, beat)
        _sets[key] = _opened(name, config, url, there.folder, sight, beat)
        while len(_sets) > OPEN_SETS:
            _sets.popitem(last=False)
    _sets.move_to_end(key)
    return _sets[key]


def _opened(
    name: str,
    config: SetConfig,
    url: str,
    folder: clipfolder.ClipFolder | None,
    sight: Sight,
    beat: Beat,
) -> EvalSet:
    manifest = Manifest.load(url, sight.read.retry)
    task = config.task or (folder.task if folder else "classification")
    kind = ("cls" if folder else "name") if task == "classification" else "captions"
    kind = "txt" if kind == "captions" and folder else kind
    keys, notes = notes_of(name, manifest, kind, sight.read, beat)
    classes: tuple[str, ...] = ()
    labels: list[int] = list(range(len(keys)))
    captions: tuple[tuple[str, ...], ...] = ()
    if task == "retrieval":
        captions = tuple(tuple(lines) for lines in notes)
    if task == "classification":
        classes = _classes(name, config, folder) if folder else tuple(sorted(set(notes)))
        number = {c: i for i, c in enumerate(classes)}
        labels = notes if folder else [number[c] for c in notes]
        for key, label in zip(keys, labels, strict=True):
            if label >= len(classes):
                raise DataError(
                    f"evaluation set {name!r}: sample {key!r} is of class {label}, and "
                    f"{config.url}/classnames.txt names {len(classes)}"
                )
        captions = tuple((classes[label],) for label in labels)
    _check(name, config, "num_images", len(keys), config.num_images)
    if task == "classification":
        _check(name, config, "num_classes", len(classes), config.num_classes)
    templates = (folder.templates if folder else None) or config.templates
    return EvalSet(name, config, task, manifest, sight, keys, classes, templates, labels, captions)


def _classes(name: str, config: SetConfig, folder: clipfolder.ClipFolder | None) -> tuple[str, ...]:
    classes = (folder.classes if folder else None) or config.class_names
    if classes is None:
        raise DataError(
            f"evaluation set {name!r}: {config.url}/classnames.txt does not exist; write it, one "
            "class a line, or give class_names"
        )
    return classes


def _check(name: str, config: SetConfig, field: str, found: int | None, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise DataError(
            f"evaluation set {name!r} at {config.place} has {field}={found}, it should have "
            f"{wanted}; fetch it whole, or say {field}: {found} if this is meant"
        )


@dataclass(frozen=True)
class LabelledSet:
    """A small classification set in memory.

    Attributes:
        images_NCHW: fp32 in [-1, 1].
        captions: class name of each picture.
        classes: distinct names, sorted.
        labels_N: int64 index into ``classes``.
        keys: sample names.
    """

    images_NCHW: Tensor
    captions: tuple[str, ...]
    classes: tuple[str, ...]
    labels_N: Tensor
    keys: tuple[str, ...]


def load_labelled(manifest_url: str, config: DataConfig) -> LabelledSet:
    """Every sample of a labelled manifest, decoded.

    Raises:
        DataError: a sample is damaged or has no ``name``.
    """
    data = open_set(manifest_url, SetConfig(manifest=manifest_url), config)
    images = data.images(range(len(data)))
    captions = tuple(c for (c,) in data.captions)
    return LabelledSet(images, captions, data.classes, data.labels_N, data.keys)


@dataclass(frozen=True)
class Picture:
    """One picture as stored (``png``: its encoded bytes, of whatever format) and its class name."""

    key: str
    name: str
    png: bytes


def read_pictures(manifest_url: str) -> list[Picture]:
    """Encoded pictures and names, for those who send them elsewhere to be classified."""
    sight = Sight(32, Bounds(1 << 62, 1 << 62), ReadConfig())  # nothing is decoded
    data = open_set(manifest_url, SetConfig(manifest=manifest_url), sight)
    found = data.pictures(range(len(data)))
    return [
        Picture(key, name, png)
        for key, (name,), png in zip(data.keys, data.captions, found, strict=True)
    ]
