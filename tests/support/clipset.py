"""Small evaluation sets, written as clip_benchmark's own converter writes them."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def encoded(seed: int, kind: str = "webp", size: tuple[int, int] = (20, 16)) -> bytes:
    """A picture whose colours depend on ``seed``."""
    image = Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, 200))
    image.paste((255 - seed * 11 % 256, 10, 10), (0, 0, size[0] // 2, size[1] // 2))
    stream = io.BytesIO()
    image.save(stream, kind, **({"lossless": True} if kind == "webp" else {}))
    return stream.getvalue()


def write_folder(
    folder: Path,
    notes: Sequence[str],
    *,
    retrieval: bool = False,
    shards: int = 2,
    classes: Sequence[str] | None = ("cat", "dog", "owl"),
    templates: Sequence[str] | None = ("a photo of a {c}.", "a drawing of the {c}."),
    kind: str = "webp",
    split: str = "test",
) -> str:
    """A folder of pictures; ``notes`` is what each one's .cls or .txt holds."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    if retrieval:
        (folder / "dataset_type.txt").write_text("retrieval\n")
    else:
        if classes is not None:
            (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
        if templates is not None:
            path = folder / "zeroshot_classification_templates.txt"
            path.write_text("\n".join(templates) + "\n")
    each = -(-len(notes) // shards)
    for shard in range(shards):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
            for i in range(shard * each, min((shard + 1) * each, len(notes))):
                note = ("txt" if retrieval else "cls", notes[i].encode())
                for extension, data in (note, (kind, encoded(i, kind))):
                    info = tarfile.TarInfo(f"s{i:07d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder)


def served(folder: Path) -> dict[str, bytes]:
    """The files of a folder by path, for a web server."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}
