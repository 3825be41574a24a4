"""Pickles are found by name and by content, and ordinary files are not taken for them."""

import gzip
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pretrain import registry
from pretrain.errors import RegistryError
from pretrain.registry import find_pickles


def _zip(path: Path, entry: str, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "harmless")
        archive.writestr(entry, data)


OBJECT = {"call": os.system, "weights": [1.0] * 50}
PLANTED: dict[str, Callable[[Path], object]] = {
    "model.pkl": lambda path: path.write_bytes(b"anything"),
    "python_model.pkl.gz": lambda path: path.write_bytes(gzip.compress(b"anything")),
    "pytorch_model.bin": lambda path: path.write_bytes(b"anything"),
    "weights.safetensors": lambda path: torch.save({"w": torch.zeros(3)}, path),
    "legacy": lambda path: torch.save(
        {"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False
    ),
    "archive.zip": lambda path: _zip(path, "deep/data.pkl", b"x"),
    "disguised.zip": lambda path: _zip(path, "notes.txt", pickle.dumps(OBJECT)),
    "array.txt": lambda path: path.write_bytes(pickle.dumps(np.zeros(1000))),
    **{
        f"protocol_{p}.txt": lambda path, p=p: path.write_bytes(pickle.dumps(OBJECT, protocol=p))
        for p in range(6)
    },
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_pickle_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "good.txt").write_text("good")
    PLANTED[name](tmp_path / "deep" / name)
    (found,) = find_pickles(tmp_path)
    assert found.startswith(f"deep/{name}: ")


def test_ordinary_files_are_not_taken_for_pickles(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\nnumpy==2.4.6\n")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "none").write_bytes(b"N.")  # a pickle of protocol 0, but of a constant
    (tmp_path / "card.json").write_text(json.dumps({"cos": 1.0}))
    _zip(tmp_path / "good.zip", "a.txt", b"text")
    # Headers of 0x0280, 0x0380, ... bytes: the file begins with what marks a pickle.
    for protocol in range(2, 6):
        path = tmp_path / f"{protocol}.safetensors"
        length = (protocol << 8) + 0x80
        save_file({"w": np.zeros(4, np.float32)}, path, metadata={"pad": ""})
        shorter = int.from_bytes(path.read_bytes()[:8], "little")
        pad = {"pad": "x" * (length - shorter)}
        save_file({"w": np.zeros(4, np.float32)}, path, metadata=pad)
        assert path.read_bytes()[:2] == bytes([0x80, protocol])
    for path in Path(registry.__file__).parents[1].rglob("*.py"):
        (tmp_path / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    assert find_pickles(tmp_path) == []


def test_a_folder_that_is_no_exported_model_is_refused_before_mlflow_is_asked(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RegistryError, match=r"lacks model\.safetensors, tokenizer\.model"):
        registry.register(tmp_path, name="m", uri="http://127.0.0.1:9")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "tokenizer.model").write_bytes(pickle.dumps(OBJECT))
    with pytest.raises(RegistryError, match=r"tokenizer\.model: begins as a pickle"):
        registry.register(tmp_path, name="m", uri="http://127.0.0.1:9")


def test_pull_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(RegistryError, match="is not empty"):
        registry.pull("models:/m@champion", "http://127.0.0.1:9", tmp_path)
