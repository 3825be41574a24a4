"""Python pickles among files: found by name and by content, and refused."""

import io
import os
import pickletools
import zipfile
from pathlib import Path
from typing import IO

from pretrain.errors import RegistryError

_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".cloudpickle"}
_WINDOW_BYTES = 1 << 20
_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD"}


def files_below(folder: Path) -> list[str]:
    """Paths of all files below ``folder``, relative, with forward slashes, sorted."""
    return sorted(
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
    )


def find_pickles(folder: str | Path) -> list[str]:
    """Files below ``folder`` that are Python pickles by name or by content, as `path: why`."""
    found = []
    for file in files_below(Path(folder)):
        path = Path(folder) / file
        why = _by_name(file)
        if why is None:
            with path.open("rb") as stream:
                why = _by_content(stream)
        if why is None and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    with archive.open(entry) as stream:
                        why = why or _by_name(entry) or _by_content(stream)
        if why:
            found.append(f"{file}: {why}")
    return found


def refuse_pickles(folder: Path) -> None:
    """Raises:
    RegistryError: there is one below ``folder``.
    """
    if pickles := find_pickles(folder):
        raise RegistryError(
            f"pickles run code when they are read, and are refused: {'; '.join(pickles)}; "
            "export weights as safetensors"
        )


def _by_name(file: str) -> str | None:
    suffixes = [s.lower() for s in Path(file).suffixes]
    hit = next((s for s in suffixes if s in _SUFFIXES), None)
    return f"has the suffix {hit}" if hit else None


def _by_content(stream: IO[bytes]) -> str | None:
    """Why the bytes are a pickle, or None.

    Protocol 2 and later begins with a marker: it counts if a valid opcode follows (the length at
    the head of a safetensors file can look like the marker). Protocols 0 and 1 have none, and
    letters are opcodes there: the whole file must be one program that keeps its stack in order and
    calls something.
    """
    head = stream.read(_WINDOW_BYTES)
    operations, end = [], 0
    try:
        for operation, _, position in pickletools.genops(head):
            operations.append(operation.name)
            end = (position or 0) + 1
        pickletools.dis(head, out=io.StringIO())  # raises where the stack is out of order
    except (ValueError, OverflowError):  # other files break off within a few bytes
        end = 0
    if operations[:1] == ["PROTO"] and len(operations) >= 2:
        return "begins as a pickle"
    if end == len(head) and _CALLS.intersection(operations):
        return "is a pickle of protocol 0 or 1"
    return None
