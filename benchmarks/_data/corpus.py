"""The shards that every contestant reads, and what the peers make of them. All of it is made once
and kept in the cache folder."""

import io
import itertools
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks._data.environment import cache_folder

ROOT = Path(__file__).resolve().parents[2]
SAMPLES_PER_SHARD = 256


def study() -> Path:
    """Folder of the study corpus as JPEGs of 256-512 px, from the project's own command:
    about 7,400 drawings. One that was stopped is gone on with."""
    folder = cache_folder() / "study-256-512"
    if not (folder / "train.json").exists():
        print(f"making {folder}: some minutes, once", flush=True)
        options = ["--sizes", "256:512", "--format", "jpg", "--limit", "800", "--no-openclipart"]
        command = [sys.executable, "-m", "pretrain", "data", "study", *options]
        run([*command, "--parallel", "2", "--out", str(folder)])
    return folder


def shards(
    source: Path, samples: int, out: Path, samples_per_shard: int = SAMPLES_PER_SHARD
) -> list[str]:
    """The first ``samples`` of the tars below ``source`` in tars of one size, a .jpg and a .txt
    each."""

    def build(folder: Path) -> None:
        found = itertools.islice(_pictures(source), samples)
        written = 0
        while part := list(itertools.islice(found, samples_per_shard)):
            with tarfile.open(folder / f"{written // samples_per_shard:05d}.tar", "w") as tar:
                for name, data in itertools.chain.from_iterable(part):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            written += len(part)
        if written < samples:
            raise SystemExit(f"error: {source} has {written} JPEGs with captions, not {samples}")

    return sorted(str(path) for path in _once(out, build).glob("*.tar"))


def manifest(tars: list[str], out: Path) -> Path:
    """Our manifest of ``tars``, from the project's own command; anew each time, for it is quick."""
    shutil.rmtree(out, ignore_errors=True)
    path = out / "train.json"
    run([sys.executable, "-m", "pretrain", "data", "index", *tars, "--out", str(path)])
    return path


def convert(python: Path, module: str, tars: str, out: Path) -> Path:
    """A peer's own copy of the samples, made by its module in its environment."""
    return _once(out, lambda folder: run([str(python), "-m", module, "convert", tars, str(folder)]))


def run(command: list[str]) -> None:
    """A command in the checkout.

    Raises:
        SystemExit: it failed; its last lines are printed.
    """
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: `{' '.join(command)[:300]}` failed:\n{done.stdout[-3000:]}")


def _once(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``build`` unless it is there already: whole or not at all."""
    if not folder.exists():
        print(f"making {folder}", flush=True)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        build(unfinished)
        unfinished.rename(folder)
    return folder


def _pictures(source: Path) -> Iterator[tuple[tuple[str, bytes], tuple[str, bytes]]]:
    """((name, JPEG), (name, caption)) of every sample that has both, in file order."""
    for path in sorted(source.rglob("*.tar")):
        captions: dict[str, bytes] = {}
        pictures: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, extension = member.name.rpartition(".")
                into = {"jpg": pictures, "txt": captions}.get(extension)
                stream = tar.extractfile(member) if into is not None else None
                if into is not None and stream is not None:
                    into[stem] = stream.read()
        for stem, data in pictures.items():
            if stem in captions:
                yield (f"{stem}.jpg", data), (f"{stem}.txt", captions[stem])
