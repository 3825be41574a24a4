"""A small labelled set in memory, for evaluation: pictures in shard order, classes by the json
field `name`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pretrain import storage
from pretrain.data.loader import DataConfig
from pretrain.data.manifest import Manifest
from pretrain.data.reader import ReadConfig, ShardReader
from pretrain.data.samples import IMAGE_EXTENSIONS, Bounds, Refused, decode, prepare
from pretrain.data.shards import RawSample
from pretrain.errors import DataError


@dataclass(frozen=True)
class LabelledSet:
    """Attributes:
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


@dataclass(frozen=True)
class Picture:
    """One picture as stored (``png``: its encoded bytes, of whatever format) and its class name."""

    key: str
    name: str
    png: bytes


def load_labelled(manifest_url: str, config: DataConfig) -> LabelledSet:
    """Decode every sample of a labelled manifest.

    Raises:
        DataError: a sample is damaged or has no ``name``: an evaluation set is never silently
            smaller.
    """
    sha256 = storage.sha256(manifest_url)
    return _load(manifest_url, sha256, config.size, config.bounds, config.read)


@lru_cache(maxsize=8)
def _load(
    manifest_url: str, sha256: str, size: int, bounds: Bounds, read: ReadConfig
) -> LabelledSet:
    images, captions, keys = [], [], []
    for raw in read_all(manifest_url, read):
        try:
            image, _ = decode(raw, bounds, (size, size))
        except Refused as refused:
            raise DataError(
                f"evaluation set {manifest_url!r}: sample {raw.key!r} is damaged: {refused}"
            ) from None
        images.append(prepare(image, size))
        captions.append(_name(manifest_url, raw))
        keys.append(raw.key)
    classes = tuple(sorted(set(captions)))
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[c] for c in captions])
    return LabelledSet(torch.stack(images), tuple(captions), classes, labels, tuple(keys))


def read_pictures(manifest_url: str) -> list[Picture]:
    """Encoded pictures and names, for those who send them elsewhere to be classified."""
    found = []
    for raw in read_all(manifest_url, ReadConfig()):
        encoded = next((raw.files[e] for e in IMAGE_EXTENSIONS if e in raw.files), None)
        if encoded is None:
            raise DataError(f"evaluation set {manifest_url!r}: sample {raw.key!r} has no image")
        found.append(Picture(raw.key, _name(manifest_url, raw), encoded))
    return found


def read_all(manifest_url: str, config: ReadConfig) -> Iterator[RawSample]:
    """Every raw sample of a manifest, in its order; what was refused within a sample is left out.

    Raises:
        DataError: a shard cannot be read, or a sample has no usable file.
    """
    manifest = Manifest.load(manifest_url, config.retry)
    reader = ShardReader([manifest], config)
    try:
        for shard, samples in enumerate(manifest.sizes.tolist()):
            for index in range(samples):
                raw, rejects = reader.read(0, shard, index)
                if raw is None:
                    raise DataError(f"{manifest_url!r}: sample {index} of shard {shard}: {rejects}")
                yield raw
    finally:
        reader.close()


def _name(manifest_url: str, raw: RawSample) -> str:
    name = json.loads(raw.files.get("json", b"{}")).get("name")
    if not name:
        raise DataError(
            f"evaluation set {manifest_url!r}: sample {raw.key!r} has no class `name` in its .json"
        )
    return str(name)
