"""What the small files of an evaluation set's samples say, read in one pass and kept."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from pretrain import storage
from pretrain.data.clipfolder import Beat, cache_of, locked
from pretrain.data.manifest import Manifest
from pretrain.data.reader import ReadConfig, ShardReader
from pretrain.data.samples import Refused, captions_of
from pretrain.data.shards import RawSample
from pretrain.errors import DataError, UnreadableShard

BEAT_SAMPLES = 256


def notes_of(
    name: str, manifest: Manifest, kind: str, read: ReadConfig, beat: Beat
) -> tuple[tuple[str, ...], list[Any]]:
    """Key and label (or captions) of every sample, from the node's cache if they are there.

    Args:
        name: of the set, for messages.
        kind: of `NOTES`.
        beat: called now and then.

    Raises:
        DataError: a sample is without, or cannot be read.
    """
    path = cache_of(read) / f"{manifest.fingerprint[:32]}-{kind}.json"
    try:
        with locked(path, beat):
            with suppress(OSError, ValueError, KeyError, TypeError):
                held = json.loads(path.read_bytes())
                if len(held["keys"]) == len(held["notes"]) == manifest.num_samples:
                    return tuple(held["keys"]), held["notes"]
            keys, notes = _gather(name, manifest, kind, read, beat)
            storage.write_bytes(str(path), json.dumps({"keys": keys, "notes": notes}).encode())
    except OSError:  # a cache that cannot be written is slow, and no error
        keys, notes = _gather(name, manifest, kind, read, beat)
    return tuple(keys), notes


def _gather(
    name: str, manifest: Manifest, kind: str, read: ReadConfig, beat: Beat
) -> tuple[list[str], list[Any]]:
    keys: list[str] = []
    notes: list[Any] = []
    for raw in _walk(manifest, read, name):
        if len(keys) % BEAT_SAMPLES == 0:
            beat()
        keys.append(raw.key)
        notes.append(NOTES[kind](name, raw))
    return keys, notes


def _name(name: str, raw: RawSample) -> str:
    try:
        found = json.loads(raw.files.get("json", b"{}")).get("name")
    except (ValueError, AttributeError):
        found = None
    if not found:
        raise DataError(
            f"evaluation set {name!r}: sample {raw.key!r} has no class `name` in its .json"
        )
    return str(found)


def _cls(name: str, raw: RawSample) -> int:
    text = raw.files.get("cls", b"").strip()
    if not text.isdigit():
        raise DataError(
            f"evaluation set {name!r}: sample {raw.key!r} has no class number in a .cls "
            f"({text[:20]!r}); a set of captions has `retrieval` in dataset_type.txt"
        )
    return int(text)


def _txt(name: str, raw: RawSample) -> list[str]:
    try:
        lines = [x.strip() for x in raw.files.get("txt", b"").decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        lines = []
    if not any(lines):
        raise DataError(
            f"evaluation set {name!r}: sample {raw.key!r} has no captions in a .txt, one a line"
        )
    return [line for line in lines if line]


def _captions(name: str, raw: RawSample) -> list[str]:
    try:
        return captions_of(raw)
    except Refused as refused:
        raise DataError(f"evaluation set {name!r}: sample {raw.key!r}: {refused}") from None


NOTES: dict[str, Callable[[str, RawSample], Any]] = {
    "name": _name,
    "cls": _cls,
    "txt": _txt,
    "captions": _captions,
}


def raw_samples(
    reader: ShardReader, places: Sequence[tuple[int, int, int]], name: str
) -> Iterator[RawSample]:
    """Samples by (0, shard, index); what was refused within one is left out.

    Raises:
        DataError: one cannot be read, or has no usable file.
    """
    for place, found in zip(places, reader.read_many(places), strict=True):
        if isinstance(found, UnreadableShard):
            raise found
        raw, rejects = found
        if raw is None:
            raise DataError(f"{name!r}: sample {place[2]} of shard {place[1]}: {rejects}")
        yield raw


def _walk(manifest: Manifest, config: ReadConfig, name: str) -> Iterator[RawSample]:
    reader = ShardReader([manifest], config)
    try:
        for shard, samples in enumerate(manifest.sizes.tolist()):
            yield from raw_samples(reader, [(0, shard, i) for i in range(samples)], name)
    finally:
        reader.close()


def read_all(manifest_url: str, config: ReadConfig) -> Iterator[RawSample]:
    """Every raw sample of a manifest, in its order; what was refused within a sample is left out.

    Raises:
        DataError: a shard cannot be read, or a sample has no usable file.
    """
    yield from _walk(Manifest.load(manifest_url, config.retry), config, manifest_url)
