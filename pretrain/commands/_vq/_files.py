"""What the verbs of `vq` read and write: pictures in memory, and folders of weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pretrain.config import Config, build, merge, parse_override
from pretrain.data.evalset import read_all
from pretrain.data.reader import ReadConfig
from pretrain.data.samples import Bounds, Refused, decode, prepare
from pretrain.errors import DataError, ExportError

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Corpus:
    """Attributes:
    images_NCHW: fp32 in [-1, 1].
    captions: the first of each picture.
    """

    images_NCHW: Tensor
    captions: tuple[str, ...]


def read_corpus(manifest: str, size: int, most: int | None = None) -> Corpus:
    """Usable samples of a manifest, all or the first ``most``, in memory: for corpora of up to some
    ten thousand.

    Raises:
        DataError: none is usable.
    """
    images: list[Tensor] = []
    captions: list[str] = []
    bounds = Bounds(64 << 20, 1 << 26)
    for raw in read_all(manifest, ReadConfig()):
        if most is not None and len(images) >= most:
            break
        try:
            image, texts = decode(raw, bounds, (size, size))
            images.append(prepare(image, size))
            captions.append(texts[0])
        except Refused:
            continue
    if not images:
        raise DataError(f"data={manifest!r} holds no usable sample; give another manifest")
    return Corpus(torch.stack(images), tuple(captions))


def save(folder: str | Path, tree: dict[str, Any], weights: nn.Module) -> None:
    """``config.json`` and ``model.safetensors``."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in weights.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def read_config(folder: str | Path, verb: str) -> dict[str, Any]:
    """The tree that `save` wrote.

    Raises:
        ExportError: the folder is not one that ``vq VERB`` wrote.
    """
    try:
        tree = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if tree["made_by"] == verb:
            return dict(tree)
        problem = f"it was made by `vq {tree['made_by']}`"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error)
    raise ExportError(f"folder={str(folder)!r} was not written by `vq {verb}` ({problem})")


def load_weights(folder: str | Path, module: nn.Module) -> None:
    """Into a module that was built from the folder's own config."""
    from safetensors.torch import load_file

    module.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    module.eval()


def settings(cls: type[C], overrides: list[str], where: str) -> C:
    """A config node of ``field=value`` texts."""
    tree: dict[str, Any] = {}
    for text in overrides:
        tree = merge(tree, parse_override(text))
    return build(cls, tree, where)
