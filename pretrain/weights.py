"""Safetensors files written as a stream, one tensor in memory at a time, hashed on the way.

The `safetensors` library reads them; its writer wants every tensor at once and holds Python's lock
while it writes, which would stop the training beside it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_ALIGNMENT = 8  # of the header, as the format's own writer does


@dataclass(frozen=True)
class Entry:
    """A tensor to write, made when its turn comes.

    Attributes:
        name, dtype, shape: as they will stand in the file.
        tensor: gives it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        """A tensor that is there already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), tensor.detach)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """A file as it was written: its size and hash."""

    bytes: int
    sha256: str

    def facts(self) -> dict[str, Any]:
        """As a manifest lists it."""
        return {"bytes": self.bytes, "sha256": self.sha256}


def write(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> Written:
    """Write ``entries`` in order, to disk when this returns.

    Raises:
        OSError: the disk is full or fails; what was written is removed.
        ValueError: a tensor is not of the shape and type its entry says.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    try:
        with path.open("wb") as stream:

            def put(data: Any) -> None:
                digest.update(data)
                stream.write(data)

            put(len(text).to_bytes(8, "little") + text)
            for entry in entries:
                tensor = entry.tensor().detach().cpu().contiguous()
                if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                    raise ValueError(
                        f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} "
                        f"{entry.shape}"
                    )
                if tensor.numel():
                    put(tensor.view(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Written(8 + len(text) + at, digest.hexdigest())
