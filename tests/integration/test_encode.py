"""Encoding and training on it: the commands, two ZeRO-3 ranks, an export, and no need of the
folders it was made from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.__main__ import main
from tests.support import ranks, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STEPS, BATCH = 3, 16
# No augmentation and no evaluation: what is compared is the losses of the steps.
PLAIN = (
    tiny.ONE_LEVEL_SETTING,
    *("data.jitter=0", "data.flip=0", f"training.samples={STEPS * BATCH}"),
    *(f"evaluators.{name}=null" for name in ("validation", "zero_shot", "retrieval", "samples")),
)


def run(*command: object) -> None:
    assert main([str(part) for part in command]) == 0


def train_here(overrides: list[str]) -> str:
    """Runs on each rank; what an error would say to the user."""
    from pretrain import config
    from pretrain.errors import PretrainError
    from pretrain.run_config import RunConfig
    from pretrain.train import train

    try:
        assert train(config.load(RunConfig, "configs/debug.yaml", overrides)) == 0
    except PretrainError as error:
        return str(error)
    return ""


def train(output: Path, *overrides: str) -> str:
    settings = [*PLAIN, f"output={output}", *overrides]
    return ranks.run(f"{__name__}:train_here", 2, settings)[0]


def progress(output: Path) -> dict[str, float]:
    """Metrics of the last step that was logged."""
    (path,) = output.glob(f"checkpoints/samples-{STEPS * BATCH:012d}/run.json")
    return json.loads(path.read_text())["progress"]["last"]


@pytest.mark.soak  # tests/unit/test_encode.py has the arithmetic
def test_training_on_latents_and_frozen_text(tmp_path, capsys):
    from pretrain.inference import Predictor

    pictures, latents, frozen = tmp_path / "pictures", tmp_path / "latents", tmp_path / "frozen"
    assert train(pictures) == ""
    run("export", "--output", pictures, "--to", tmp_path / "first")

    # fp32 latents and the text encoder in training: the same losses as on pictures, to the bit.
    shards = tmp_path / "shards"
    options = ("--model", tmp_path / "first", "--text", "--dtype", "fp32", "--out", shards)
    run("data", "encode", "--config", "configs/debug.yaml", *options)
    said = capsys.readouterr().out
    assert "data.encoded=true data.encoded_text=true data.jitter=0 data.flip=0" in said
    use = (f"data.train={shards}/manifest.json", "data.encoded=true")
    assert train(latents, *use) == ""
    ours, theirs = progress(latents), progress(pictures)
    for name in ("loss", "generate/loss", "align/loss", "gradient_norm"):
        assert ours[name] == theirs[name], name

    # Another autoencoder: refused before a step is made, with the field named.
    said = train(tmp_path / "wrong", *use, "model.autoencoder.shift=0.1")
    assert "model.autoencoder=" in said
    assert not list((tmp_path / "wrong").glob("checkpoints/*"))

    # Encoded text, with the frozen encoder outside the engine and inside the export.
    encoder = f"model.text_encoder.frozen_from={tmp_path / 'first'}"
    assert train(frozen, *use, "data.encoded_text=true", encoder) == ""
    assert progress(frozen)["loss"] > 0
    run("export", "--output", frozen, "--to", tmp_path / "second")
    first = Predictor.load(tmp_path / "first")
    texts = ["red apple", "a blue car"]
    expected = first.embed_text(texts)
    shutil.rmtree(tmp_path / "first")
    second = Predictor.load(tmp_path / "second")
    assert np.array_equal(second.embed_text(texts), expected)
    assert len(second.generate(["red apple"], steps=1)) == 1
