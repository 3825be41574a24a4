"""Weights as diffusers and transformers lay them into a folder, read by range: one safetensors
file, or several and an index.

The library checks a file and is let go of: it maps files into memory, and what was read of them
would count to the process. A range of a tensor is a range of its file, and read as that.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pretrain.errors import ConfigError

STEMS = ("diffusion_pytorch_model", "model")  # diffusers', transformers'


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: from byte ``at`` of ``file``."""

    file: str
    at: int
    dtype: torch.dtype


class WeightFiles:
    """Tensors by name, no more of them in memory than is asked for.

    Args:
        field: of the configuration that names the folder, for errors.
        folder: where they lie.
        variant: of the files' names, such as "fp16".

    Attributes:
        shapes: of every tensor of a floating-point type.

    Raises:
        ConfigError: files are missing or damaged.
    """

    def __init__(self, field: str, folder: Path, variant: str | None = None) -> None:
        self.field, self.folder = field, folder
        self._places: dict[str, _Place] = {}
        self._open: dict[str, BinaryIO] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files(variant):
            for name, entry in self._header(file).items():
                self._places[name] = _Place(file, entry["at"], _DTYPES[entry["dtype"]])
                self.shapes[name] = tuple(entry["shape"])

    def prefix(self, names: Iterable[str]) -> str:
        """What stands before ``names`` in the files: "" or a part's name, such as "text_model."."""
        some = next(iter(names))
        fitting = [n for n in self.shapes if n == some or n.endswith(f".{some}")]
        return min(fitting, key=len).removesuffix(some) if fitting else ""

    def check(self, wanted: Mapping[str, tuple[int, ...]], part: str) -> None:
        """That all of ``wanted`` is there, in its shape.

        Args:
            wanted: shapes by name in the files.
            part: of the configuration that gives those shapes.

        Raises:
            ConfigError: it names the first tensor that is not, both shapes, and what to change.
        """
        missing = [name for name in wanted if name not in self.shapes]
        if missing:
            raise ConfigError(
                f"{self.field}={str(self.folder)!r} lacks {len(missing)} of {len(wanted)} tensors "
                f"({', '.join(missing[:3])}); make {part} the shape that its config.json tells "
                "(`python -m pretrain describe` prints it), or give the folder it was made for"
            )
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise ConfigError(
                    f"{self.field}={str(self.folder)!r} has {name} of shape {self.shapes[name]}, "
                    f"the model has {shape}; make {part} the shape that its config.json tells "
                    "(`python -m pretrain describe` prints it)"
                )

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, fp32.

        Raises:
            ConfigError: the file has become shorter.
        """
        place = self._places[name]
        if place.file not in self._open:
            # The file is read at no other place than is asked for: a buffer would be thrown away.
            self._open[place.file] = (self.folder / place.file).open("rb", buffering=0)
        wanted = torch.empty(max(0, stop - start), dtype=place.dtype)
        if wanted.numel():
            size = place.dtype.itemsize
            bytes_ = memoryview(wanted.view(torch.uint8).numpy())  # type: ignore[arg-type]
            stream = self._open[place.file]
            stream.seek(place.at + start * size)
            done = 0
            while done < len(bytes_):
                read = stream.readinto(bytes_[done:])  # type: ignore[attr-defined]
                if not read:
                    raise ConfigError(
                        f"{self.field}={str(self.folder)!r}: {place.file} has become shorter while "
                        "it was read; fetch the folder again"
                    )
                done += read
        return wanted.float()

    def close(self) -> None:
        """Close the files; `read` opens them again."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def _header(self, file: str) -> dict[str, dict[str, Any]]:
        """Type, shape and first byte of each tensor of a file that the library finds whole."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / file, framework="pt"):
                pass
            with (self.folder / file).open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                tree: dict[str, Any] = json.loads(stream.read(length))
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{self.field}={str(self.folder)!r}: {file} cannot be read ({error}); fetch the "
                "folder again"
            ) from None
        tree.pop("__metadata__", None)
        return {
            name: {**entry, "at": 8 + length + entry["data_offsets"][0]}
            for name, entry in tree.items()
            if entry["dtype"] in _DTYPES
        }

    def _files(self, variant: str | None) -> list[str]:
        """The files of one set of weights, from an index where there is one."""
        middle = f".{variant}" if variant else ""
        for stem in STEMS:
            index = self.folder / f"{stem}.safetensors.index{middle}.json"
            if index.is_file():
                try:
                    listed = set(
                        json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                    )
                except (OSError, ValueError, LookupError, AttributeError) as error:
                    raise ConfigError(
                        f"{self.field}={str(self.folder)!r}: {index.name} cannot be read "
                        f"({error}); fetch the folder again"
                    ) from None
                absent = sorted(f for f in listed if not (self.folder / f).is_file())
                if absent:
                    raise ConfigError(
                        f"{self.field}={str(self.folder)!r} lacks {len(absent)} of the "
                        f"{len(listed)} files that {index.name} lists ({', '.join(absent[:3])}); "
                        "fetch the folder again"
                    )
                return sorted(listed)
            if (self.folder / f"{stem}{middle}.safetensors").is_file():
                return [f"{stem}{middle}.safetensors"]
        there = sorted(p.name for p in self.folder.iterdir() if p.is_file())
        pickled = any(name.endswith((".bin", ".ckpt", ".pt")) for name in there)
        remedy = (
            "its pickled weights are not read: load it with the library that made it and save it "
            "with safe_serialization=True"
            if pickled
            else "give another folder or subfolder, or set variant to what stands in the names"
        )
        raise ConfigError(
            f"{self.field}={str(self.folder)!r} has no {STEMS[0]}{middle}.safetensors nor "
            f"{STEMS[1]}{middle}.safetensors; there are: {', '.join(there[:6]) or 'no files'}; "
            f"{remedy}"
        )
