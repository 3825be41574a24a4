"""The files of a checkpoint's state: each rank writes its part, any number of ranks reads them.

weights/rank-00001.safetensors      this rank's elements of each parameter, flat, fp32
exp_avg/..., exp_avg_sq/...         AdamW's moments
ema-2000/...                        a moving average
state.json                          shapes, how many ranks wrote, AdamW's step count

A rank's elements of a parameter of n are [r·s, (r+1)·s) with s = ceil(n / ranks), unless the file's
metadata lists where they start (ZeRO stages 1 and 2).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.partitions import MOMENTS, WEIGHTS, Copy, Partitions, even_part
from pretrain.weights import Entry, Written, write

STATE = "state.json"
FORMAT = 2
_STARTS = "starts"


def file_name(kind: str, rank: int) -> str:
    """Path of a rank's part, relative to the checkpoint."""
    return f"{kind}/rank-{rank:05d}.safetensors"


def write_part(
    folder: Path, partitions: Partitions, copy: Copy, rank: int
) -> dict[str, dict[str, Any]]:
    """Write this rank's part of ``copy``; sizes and hashes of its files, by name.

    Raises:
        CheckpointError: a file does not read back as it was written.
        OSError: the disk is full or fails.
    """
    facts = {}
    for kind, flats in copy.tensors.items():
        entries, starts = [], {}
        for piece, start, stop in partitions.written():
            if piece.flat >= len(flats):
                continue  # frozen: it has weights alone
            inner = slice(start - piece.start, stop - piece.start)
            tensor = piece.of(flats)[inner]
            entries.append(Entry(piece.name, torch.float32, (stop - start,), tensor.float))
            starts[piece.name] = start
        even = partitions.even or partitions.replicated
        metadata = {} if even else {_STARTS: json.dumps(starts)}
        name = file_name(kind, rank)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        written = write(folder / name, entries, metadata)
        if digest(folder / name) != written:
            raise CheckpointError(f"{folder / name} does not read back as it was written")
        facts[name] = written.facts()
    return facts


def state_facts(partitions: Partitions, copy: Copy, world: int) -> dict[str, Any]:
    """What state.json says."""
    return {
        "format": FORMAT,
        "world_size": world,
        "steps": copy.steps,
        "kinds": sorted(copy.tensors),
        "shapes": {name: list(shape) for name, shape in partitions.shapes.items()},
    }


def digest(path: Path) -> Written:
    """Size and hash of a file, read now."""
    from pretrain import storage

    return Written(path.stat().st_size, storage.sha256(str(path)))


class Parts:
    """Reads any stretch of any parameter from the parts that some number of ranks wrote.

    Raises:
        CheckpointError: the folder is of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self._facts = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint={str(folder)!r}: {STATE} cannot be read ({error})"
            ) from None
        if self._facts["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint={str(folder)!r} is of format {self._facts['format']}, this version "
                f"reads {FORMAT}; use the version that wrote it"
            )
        self.world: int = self._facts["world_size"]
        self.steps: float = self._facts["steps"]
        self.kinds: list[str] = self._facts["kinds"]
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in self._facts["shapes"].items()
        }
        self._open: dict[tuple[str, int], Any] = {}
        self._listed: dict[tuple[str, int], Mapping[str, int] | None] = {}

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter, flat, fp32.

        A frozen parameter has no moments (zeros are given) and no average but its value.

        Raises:
            CheckpointError: it is not in the checkpoint.
        """
        found = self._read(kind, name, start, stop)
        if found is None and kind in MOMENTS:
            return torch.zeros(stop - start)
        if found is None and kind != WEIGHTS:
            found = self._read(WEIGHTS, name, start, stop)
        if found is None:
            raise CheckpointError(
                f"checkpoint={str(self.folder)!r} has no {kind} of {name!r} [{start}, {stop}); it "
                "was written with another model"
            )
        return found

    def has(self, kind: str, name: str) -> bool:
        """Whether the checkpoint keeps this kind of the parameter; False of moments and averages of
        a frozen one."""
        return any(name in self._names(kind, rank) for rank in range(self.world))

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter in its shape."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def _read(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        out, filled = torch.empty(stop - start), 0
        for rank in self._holders(kind, name, start, stop):
            file = self._file(kind, rank)
            if name not in self._names(kind, rank):
                continue
            part = file.get_slice(name)
            first = self._start(kind, rank, name)
            last = first + part.get_shape()[0]
            low, high = max(start, first), min(stop, last)
            if low < high:
                out[low - start : high - start] = part[low - first : high - first]
                filled += high - low
        return out if filled == stop - start else None

    def _holders(self, kind: str, name: str, start: int, stop: int) -> Iterator[int]:
        """Ranks that may have written some of these elements."""
        if self._starts(kind, 0) is None and name in self.shapes:
            part = even_part(torch.Size(self.shapes[name]).numel(), 0, self.world)[1]
            last = -(-stop // max(part, 1))
            yield from range(start // max(part, 1), min(last, self.world))
        else:
            yield from range(self.world)

    def _start(self, kind: str, rank: int, name: str) -> int:
        starts = self._starts(kind, rank)
        if starts is not None:
            return starts[name]
        return even_part(torch.Size(self.shapes[name]).numel(), rank, self.world)[0]

    def _starts(self, kind: str, rank: int) -> Mapping[str, int] | None:
        key = (kind, rank)
        if key not in self._listed:
            text = (self._file(kind, rank).metadata() or {}).get(_STARTS)
            self._listed[key] = None if text is None else json.loads(text)
        return self._listed[key]

    def _names(self, kind: str, rank: int) -> set[str]:
        self._file(kind, rank)
        return self._open[kind, rank][1]

    def _file(self, kind: str, rank: int) -> Any:
        from safetensors import SafetensorError, safe_open

        key = (kind, rank)
        if key not in self._open:
            path = self.folder / file_name(kind, rank)
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read ({error})") from None
            self._open[key] = (file, set(file.keys()))
        return self._open[key][0]
