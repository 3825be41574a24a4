"""Raw samples out of tars: webdataset reads them, storage.py fetches them, and odd members are
refused."""

import io
import tarfile
from collections import OrderedDict
from dataclasses import dataclass

from webdataset.tariterators import group_by_keys, tar_file_iterator

from pretrain import storage
from pretrain.data.manifest import Manifest
from pretrain.errors import DataError
from pretrain.types import Reject


@dataclass(frozen=True)
class RawSample:
    """One sample's files, by extension, as bytes."""

    key: str
    shard: str
    files: dict[str, bytes]


def read_shard(url: str, data: bytes) -> tuple[list[RawSample], list[Reject]]:
    """All samples of a tar (plain or compressed) in file order, and the members that were refused.

    A sample whose every member was refused does not exist; numbering counts those that do.

    Raises:
        DataError: the bytes are not a tar, or it is cut short.
    """
    rejects = _odd_members(url, data)
    refused = {r.key for r in rejects}

    def wanted(name: str) -> bool:
        return name not in refused

    try:
        files = tar_file_iterator(io.BytesIO(data), select_files=wanted)
        grouped = group_by_keys(
            {"fname": f["fname"], "data": f["data"], "__url__": url} for f in files
        )
        samples = [
            RawSample(s["__key__"], url, {k: v for k, v in s.items() if not k.startswith("__")})
            for s in grouped
        ]
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(
            f"shard={url!r} is not a whole tar file ({error}); fetch or write it again"
        ) from error
    return samples, rejects


def _odd_members(url: str, data: bytes) -> list[Reject]:
    """Members whose name leaves the archive, and members that are not plain files."""
    rejects = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as tar:
            for member in tar:
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    rejects.append(Reject("unsafe member name", url, member.name))
                elif member.issym() or member.islnk():
                    rejects.append(Reject("link", url, member.name))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"shard={url!r} is not a whole tar file ({error}); fetch or write it again"
        ) from error
    return rejects


class ShardCache:
    """The shards of a manifest by number, the last few kept in memory.

    Args:
        manifest: what to read.
        size: shards kept; one shuffling window and one more is enough never to read a shard twice
            an epoch.
    """

    def __init__(self, manifest: Manifest, size: int) -> None:
        self.manifest = manifest
        self.size = size
        self._kept: OrderedDict[int, tuple[list[RawSample], list[Reject]]] = OrderedDict()

    def get(self, shard: int, index: int) -> tuple[RawSample, list[Reject]]:
        """Sample ``index`` of shard number ``shard``, and with sample 0 what was refused of its
        shard: so it is counted once an epoch, however many ranks and workers read the shard.

        Raises:
            DataError: the shard is not the one the manifest was made from.
        """
        if shard not in self._kept:
            self._kept[shard] = self._read(shard)
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shard)
        samples, rejects = self._kept[shard]
        return samples[index], [] if index else rejects

    def _read(self, number: int) -> tuple[list[RawSample], list[Reject]]:
        entry = self.manifest.shards[number]
        url = self.manifest.url(entry)
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError:
            raise DataError(
                f"shard={url!r} is in the manifest and does not exist; restore it or index again"
            ) from None
        found = storage.sha256_bytes(data)
        if found != entry.sha256:
            raise DataError(
                f"shard={url!r} has sha256 {found[:12]}…, the manifest says {entry.sha256[:12]}…; "
                "restore the shard, "
                "or index it again (sample numbers then mean other samples)"
            )
        samples, rejects = read_shard(url, data)
        if len(samples) != entry.samples:
            raise DataError(
                f"shard={url!r} holds {len(samples)} samples, the manifest says {entry.samples}; "
                "index again"
            )
        return samples, rejects
