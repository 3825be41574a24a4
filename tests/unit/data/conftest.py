"""Small shards, written as a user's would be, and damaged on purpose."""

import io
import json
import multiprocessing
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from pretrain.data import index as indexer
from pretrain.data import tokenizer

ROOT = Path(__file__).resolve().parents[3]
# Imported once, not by each worker anew: a dozen loaders with workers then start in no time.
multiprocessing.set_forkserver_preload(["pretrain.data.loader"])
Member = tuple[str, bytes]


def png(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (16, 16)) -> bytes:
    """A picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def good(key: str, colour: tuple[int, int, int] = (200, 30, 30)) -> list[Member]:
    """The files of a whole sample."""
    text = json.dumps({"name": key, "captions": [key, f"a drawing of {key}"]}).encode()
    return [(f"{key}.json", text), (f"{key}.png", png(colour)), (f"{key}.txt", key.encode())]


def write_tar(path: Path, members: Sequence[Member | tarfile.TarInfo]) -> str:
    """A tar of files, and of links given as TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return str(path)


def index(folder: Path, urls: Sequence[str]) -> str:
    """A manifest of ``urls`` in ``folder``."""
    url = str(folder / "manifest.json")
    indexer.build(urls, url)
    return url


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., str]:
    """``corpus([3, 5])``: the manifest of shards of 3 and 5 samples, with keys s0-0, s0-1, ..."""

    def make(sizes: Sequence[int]) -> str:
        urls = []
        for shard, size in enumerate(sizes):
            members = [m for i in range(size) for m in good(f"s{shard}-{i}", (i * 9 % 256, 90, 9))]
            urls.append(write_tar(tmp_path / f"{shard}.tar", members))
        return index(tmp_path, urls)

    return make


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tokenizer of a few dozen pieces."""
    path = str(tmp_path_factory.mktemp("tokenizer") / "small.model")
    words = [f"a drawing of s{i}-{j} red apple green pear" for i in range(9) for j in range(9)]
    tokenizer.train(words, path, 36)
    return path
