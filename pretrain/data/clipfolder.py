"""Evaluation sets as clip-benchmark publishes them: a folder, local or remote, of

    classnames.txt                            one class a line; its number is the line's
    zeroshot_classification_templates.txt     prompts; {c} stands for the class
    dataset_type.txt                          "retrieval"; without the file it is classification
    SPLIT/nshards.txt, SPLIT/0.tar, ...       samples KEY.{jpg,png,webp} with KEY.cls or KEY.txt

(clip_benchmark 1.6.2, datasets/builder.py, `build_wds_dataset`.) Such a folder has no manifest; one
is made at the first use, in the node's cache.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pretrain import storage
from pretrain.data import index
from pretrain.data.reader import ReadConfig
from pretrain.data.setconfig import Task
from pretrain.errors import DataError

HUB = "https://huggingface.co/datasets/"
Beat = Callable[[], object]  # called every second or so while something takes long


@dataclass(frozen=True)
class ClipFolder:
    """Attributes:
    task: by dataset_type.txt.
    classes, templates: the lines of their files; None where there is no file.
    shards: URLs of the split's tars, in order.
    """

    task: Task
    classes: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    shards: tuple[str, ...]


def read_folder(url: str, split: str, retry: storage.Retry) -> ClipFolder:
    """What the small files of a folder say.

    Raises:
        DataError: no such folder or split, or a file that cannot be understood.
    """
    texts, tars = bases(url)
    name = storage.join(texts, split, "nshards.txt")
    written = _text(name, retry)
    if written is None:
        raise DataError(
            f"{storage.shown(name)} does not exist: url={storage.shown(url)!r} must be a folder in "
            f"clip-benchmark's form, and have the split {split!r}; check both"
        )
    if not written.strip().isdigit() or int(written) < 1:
        raise DataError(f"{storage.shown(name)} holds {written[:40]!r}, not a number of shards")
    name = storage.join(texts, "dataset_type.txt")
    task = (_text(name, retry) or "classification").strip().lower()
    if task not in ("classification", "retrieval"):
        raise DataError(
            f"{storage.shown(name)} says {task[:40]!r}; classification and retrieval can be scored"
        )
    return ClipFolder(
        cast(Task, task),
        _lines(storage.join(texts, "classnames.txt"), retry),
        _lines(storage.join(texts, "zeroshot_classification_templates.txt"), retry),
        tuple(storage.join(tars, split, f"{i}.tar") for i in range(int(written))),
    )


def bases(url: str) -> tuple[str, str]:
    """Where a folder's small files and its tars are read from. They differ on the Hugging Face hub
    alone, whose pages are .../USER/REPO/tree/BRANCH: small files are under `raw`, large ones under
    `resolve`."""
    url = url.rstrip("/")
    if not url.startswith(HUB):
        return url, url
    user, repo, *rest = url.removeprefix(HUB).split("/")
    branch = "/".join(rest[1:]) or "main"  # rest: tree, BRANCH, folders
    head = f"{HUB}{user}/{repo}"
    return f"{head}/raw/{branch}", f"{head}/resolve/{branch}"


def versions(folder: ClipFolder) -> tuple[str, ...]:
    """What the store says of each shard; another one means another set."""
    return tuple(index.version_of(url) for url in folder.shards)


def indexed(folder: ClipFolder, found: tuple[str, ...], read: ReadConfig, beat: Beat) -> str:
    """URL of the manifest of a folder's shards, in the node's cache; made at the first asking, by
    one process of the node while the others wait.

    Args:
        found: of `versions`.
    """
    text = "\n".join(f"{u} {v}" for u, v in zip(folder.shards, found, strict=True))
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    out = cache_of(read) / f"{name}.json"

    def report(*_: object) -> None:
        beat()

    with locked(out, beat):
        if not out.exists():
            urls = [u if "://" in u else os.path.abspath(u) for u in folder.shards]
            index.build(urls, str(out), versions=False, retry=read.retry, report=report)
    return str(out)


def cache_of(read: ReadConfig) -> Path:
    """The node's folder of what was found out about evaluation sets."""
    return read.folder / "evalsets"


@contextmanager
def locked(path: Path, beat: Beat) -> Iterator[None]:
    """One process of the node at a time, while the block lasts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                beat()
                time.sleep(0.2)
        yield


def _text(url: str, retry: storage.Retry) -> str | None:
    try:
        return storage.read_bytes(url, retry).decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise DataError(f"{storage.shown(url)} is not text in UTF-8") from None


def _lines(url: str, retry: storage.Retry) -> tuple[str, ...] | None:
    """Lines without the blanks around them; those at the end that are empty do not count."""
    text = _text(url, retry)
    if text is None:
        return None
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines or not all(lines):
        empty = lines.index("") + 1 if lines else 1
        raise DataError(f"{storage.shown(url)}: line {empty} is empty; lines are numbered classes")
    return tuple(lines)
