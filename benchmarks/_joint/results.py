"""The study's results: one JSON line a finished cell, appended whole or not at all."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by key, the last of each; a line that was cut off is left out."""
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            found[line["key"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found


def append(path: Path, line: dict[str, Any]) -> None:
    """Write one line, on disk when this returns; several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        text = json.dumps(line, separators=(",", ":")) + "\n"
        if stream.tell() and not _ends_whole(stream):
            text = "\n" + text  # the line before was cut off
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _ends_whole(stream: Any) -> bool:
    stream.seek(-1, os.SEEK_END)
    return bool(stream.read(1) == b"\n")


def by_variant(lines: Iterable[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """{variant: {seed: line}}; of several lengths the longest, of equal ones the last."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        seeds = found.setdefault(line["variant"], {})
        kept = seeds.get(line["seed"])
        if kept is None or line["samples"] >= kept["samples"]:
            seeds[line["seed"]] = line
    return found
