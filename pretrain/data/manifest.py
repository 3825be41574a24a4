"""What shards there are: names, sample counts, sizes and hashes. The order of samples is defined
over it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePosixPath

from pretrain import storage
from pretrain.errors import DataError

SCHEMA = 1


@dataclass(frozen=True)
class Shard:
    """One tar file. ``url`` is relative to the manifest's folder, or absolute."""

    url: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """An ordered list of shards, and the folder (path or URL) that their relative URLs start
    from."""

    shards: tuple[Shard, ...]
    folder: str

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return sum(s.samples for s in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' hashes in order: two manifests of equal fingerprint number
        samples alike."""
        text = "\n".join(f"{s.sha256} {s.samples}" for s in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()

    def url(self, shard: Shard) -> str:
        """Where ``shard`` is."""
        absolute = "://" in shard.url or shard.url.startswith("/")
        return shard.url if absolute else storage.join(self.folder, shard.url)

    @classmethod
    def load(cls, url: str) -> "Manifest":
        """Read a manifest, local or remote.

        Raises:
            DataError: it is missing, not a manifest, or lists no sample.
        """
        remedy = "make one with `python -m pretrain data index SHARDS... --out MANIFEST`"
        try:
            tree = json.loads(storage.read_bytes(url))
            shards = tuple(Shard(**fields) for fields in tree["shards"])
        except FileNotFoundError:
            raise DataError(f"manifest={url!r} does not exist; {remedy}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"manifest={url!r} is not a manifest ({error}); {remedy}") from None
        if tree.get("schema") != SCHEMA:
            raise DataError(
                f"manifest={url!r} has schema {tree.get('schema')!r}, this version reads "
                f"{SCHEMA}; {remedy}"
            )
        if not sum(s.samples for s in shards):
            raise DataError(f"manifest={url!r} lists no sample; {remedy}")
        return cls(
            shards, str(PurePosixPath(url).parent) if "://" not in url else url.rpartition("/")[0]
        )

    def save(self, url: str) -> None:
        """Write as JSON, whole or not at all."""
        tree = {"schema": SCHEMA, "shards": [asdict(s) for s in self.shards]}
        storage.write_bytes(url, (json.dumps(tree, indent=1) + "\n").encode())


def build(urls: Sequence[str], folder: str) -> Manifest:
    """Index shards by reading each once; URLs below ``folder`` are written relative to it.

    Raises:
        DataError: a shard is missing or not a tar.
    """
    from pretrain.data.shards import read_shard

    shards = []
    for url in urls:
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError:
            raise DataError(f"shard={url!r} does not exist; check the path") from None
        samples, _ = read_shard(url, data)
        name = _relative(url, folder)
        shards.append(Shard(name, len(samples), len(data), storage.sha256_bytes(data)))
    return Manifest(tuple(shards), folder)


def _relative(url: str, folder: str) -> str:
    """``url`` as seen from ``folder``: relative if it lies below it, else absolute."""
    if "://" in url or "://" in folder:
        local = "://" not in url
        return os.path.abspath(url) if local else url.removeprefix(folder.rstrip("/") + "/")
    path = os.path.relpath(url, folder)
    return os.path.abspath(url) if path.startswith("..") else path
