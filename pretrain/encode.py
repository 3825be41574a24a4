"""`data encode`: every picture, and caption if wanted, through frozen encoders once, into shards
that the trainer takes in place of pictures.

Shards keep their number, order and names, and each is whole or not there: a run that was killed
goes on behind the finished ones, and machines share the shards out by ``part``.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pretrain import storage
from pretrain.data import index
from pretrain.data.encoded import pack
from pretrain.data.manifest import Manifest
from pretrain.data.packed import is_packed
from pretrain.data.pictures import Decoded, Read, Steps, read_all
from pretrain.data.rejects import Ledger
from pretrain.data.source import DataConfig
from pretrain.encoders import Encoders, Options
from pretrain.errors import ConfigError, DataError
from pretrain.run_config import RunConfig

STATE = "encode.json"
MANIFEST = "manifest.json"
DONE = ".done"
Report = Callable[[int, int, str], None]  # samples done, samples of this part, the shard


@dataclass(frozen=True)
class Encoded:
    """What a run has made.

    Attributes:
        manifests: URLs, one for each data set of the configuration; none after a part.
        samples: in the shards.
        kept: shards that an earlier run had finished.
        rejects: how many samples, and members of samples, were refused, by reason.
    """

    manifests: list[str]
    samples: int
    kept: int
    rejects: Counter[str]


def encode(
    config: RunConfig,
    out: str,
    options: Options,
    report: Report = lambda done, total, shard: None,
    say: Callable[[str], None] | None = None,
) -> Encoded:
    """Encode the training data of ``config`` into the folder ``out`` (of several data sets:
    ``out/0``, ``out/1``, ...).

    A shard that stays unreadable stops the run, whatever ``data.read.on_unreadable`` says: it would
    be missing from the encoded data for good.

    Raises:
        ConfigError: the configuration asks for what latents cannot give.
        DataError: a shard is unreadable, too many samples are refused, or ``out`` holds what other
            encoders, or other data, gave.
    """
    encoders = Encoders(config, options)
    listed = config.data.train
    urls = [listed] if isinstance(listed, str) else [source.manifest for source in listed]
    folders = (
        [out] if isinstance(listed, str) else [storage.join(out, str(i)) for i in range(len(urls))]
    )
    manifests = [Manifest.load(url, config.data.read.retry) for url in urls]
    works = [
        _Work(manifest, folder, config.data, encoders, options)
        for manifest, folder in zip(manifests, folders, strict=True)
    ]
    shards = [(w, n) for w, work in enumerate(works) for n in range(len(work.names))]
    mine = shards[options.part[0] :: options.part[1]]
    total = sum(int(manifests[w].sizes[n]) for w, n in mine)
    todo = [(w, n) for w, n in mine if works[w].finished(n) is None]
    done = total - sum(int(manifests[w].sizes[n]) for w, n in todo)
    ledger = Ledger(None, config.data.max_reject_rate, say=say)
    steps = Steps(todo, manifests, options.batch)
    reads = read_all(steps, config.data)
    for w, n in todo:
        for samples in works[w].encode(n, islice(reads, steps.count((w, n))), ledger):
            done += samples
            report(done, total, works[w].names[n])
    markers = [m for w, n in mine if (m := works[w].finished(n)) is not None]
    whole = Ledger(None, config.data.max_reject_rate, min_samples=1, say=say)
    whole.merge([marker["rejects"] for marker in markers])
    made = sum(marker["samples"] for marker in markers)
    kept = len(mine) - len(todo)
    if options.part[1] > 1:
        return Encoded([], made, kept, whole.by_reason())
    whole.check(total)
    return Encoded([work.index() for work in works], made, kept, whole.by_reason())


class _Work:
    """The encoding of one data set into one folder."""

    def __init__(
        self,
        manifest: Manifest,
        folder: str,
        config: DataConfig,
        encoders: Encoders,
        options: Options,
    ) -> None:
        self.manifest, self.folder, self.config = manifest, folder, config
        self.encoders, self.options = encoders, options
        self.names = shard_names(manifest)
        self.urls = [storage.join(folder, name) for name in self.names]
        sources = {manifest.url(n) for n in range(len(self.names))}
        if sources & set(self.urls):
            raise ConfigError(
                f"--out {folder!r} is the folder of the pictures, whose shards would be "
                "overwritten; give another"
            )
        self._begin()

    def _begin(self) -> None:
        """Leave word of what is encoded, or find that another run left the same."""
        url = storage.join(self.folder, STATE)
        state = {"source": self.manifest.fingerprint, "encoding": self.encoders.encoding.tree()}
        if not storage.exists(url):
            storage.write_bytes(url, json.dumps(state, indent=1).encode())
            return
        try:
            old = json.loads(storage.read_bytes(url))
        except ValueError:
            old = None
        if old != state:
            what = (
                "the encoding of other data"
                if isinstance(old, dict) and old.get("encoding") == state["encoding"]
                else "what other encoders or options gave"
            )
            raise DataError(
                f"--out {self.folder!r} holds {what} (see its {STATE}); give another folder, or "
                "remove it to begin anew"
            )

    def finished(self, number: int) -> dict[str, Any] | None:
        """The marker of a shard that is whole: its ``samples``, and ``rejects`` as the ledger
        counts them; None of one that is not."""
        marker = self._marker(number)
        if not storage.exists(marker) or not storage.exists(self.urls[number]):
            return None
        found: dict[str, Any] = json.loads(storage.read_bytes(marker))
        return found

    def encode(self, number: int, reads: Iterable[Read], ledger: Ledger) -> Iterator[int]:
        """Write a shard, whole, and then its marker; gives how many samples each step was."""
        import webdataset

        refused = Ledger(None, 1.0, say=lambda line: None)  # of this shard alone, for its marker
        samples = 0
        with tempfile.TemporaryDirectory(prefix="diffdis-encode-") as scratch:
            path = Path(scratch) / "shard.tar"
            # Without times and owners: equal runs write equal bytes.
            plain = {"user": "", "group": "", "mtime": 0, "encoder": False}
            with path.open("wb") as stream, webdataset.TarWriter(stream, **plain) as tar:
                for read in reads:
                    ledger.add(read.rejects)
                    refused.add(read.rejects)
                    for key, files in self._files(read.samples):
                        tar.write({"__key__": key, **files})
                    samples += len(read.samples)
                    yield len(read.samples) + len(read.rejects)
            storage.put_file(str(path), self.urls[number], self.config.read.retry)
        text = json.dumps({"samples": samples, "rejects": refused.take()})
        storage.write_bytes(self._marker(number), text.encode(), self.config.read.retry)

    def index(self) -> str:
        """Write the manifest; its URL.

        Raises:
            DataError: every sample was refused.
        """
        url = storage.join(self.folder, MANIFEST)
        made = index.build(self.urls, url, versions=False, retry=self.config.read.retry).manifest
        if made is None or not made.num_samples:
            raise DataError(
                f"every sample of {self.manifest.folder!r} was refused; see `python -m pretrain "
                "data verify`"
            )
        return url

    def _files(self, samples: Sequence[Decoded]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Each sample's key and files."""
        if not samples:
            return
        latents = self.encoders.latents(torch.stack([s.picture_CHW for s in samples]))
        features = self.encoders.features([c for s in samples for c in s.captions])
        first = 0
        for i, sample in enumerate(samples):
            end = first + len(sample.captions)
            yield (
                sample.key,
                pack(
                    sample.fields,
                    sample.captions,
                    self.encoders.encoding,
                    {name: rows[i] for name, rows in latents.items()},
                    {name: rows[first:end] for name, rows in features.items()},
                ),
            )
            first = end

    def _marker(self, number: int) -> str:
        return storage.join(self.folder, DONE, f"{self.names[number]}.json")


def shard_names(manifest: Manifest) -> list[str]:
    """Names of the encoded shards: those of the pictures' below the manifest's folder, else the
    last part of the URL, with a number in front where two have the same; never compressed."""
    urls = [shard.url for shard in manifest.shards]
    names = [u.rpartition("/")[2] if "://" in u or u.startswith("/") else u for u in urls]
    plain = []
    for name in names:
        if is_packed(name):
            name = name.rpartition(".")[0]
        plain.append(name if name.endswith(".tar") else f"{name}.tar")
    if len(set(plain)) == len(plain):
        return plain
    return [f"{number:05d}-{name.rpartition('/')[2]}" for number, name in enumerate(plain)]
