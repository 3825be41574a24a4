"""Encoding and training on it as a user does: the command, two ZeRO-3 ranks, an export, and no need
of the folders it was made from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH = 3, 16


def run(*command: object, expected: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == expected, f"{command}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout + done.stderr


def sets(*overrides: str) -> list[str]:
    return [part for one in overrides for part in ("--set", one)]


# No augmentation and no evaluation: what is compared is the losses of the steps.
PLAIN = sets(
    *("data.jitter=0", "data.flip=0", f"training.samples={STEPS * BATCH}"),
    *(f"evaluators.{name}=null" for name in ("validation", "zero_shot", "retrieval", "samples")),
)


def train(output: Path, *overrides: str, expected: int = 0) -> str:
    return run(
        *("launcher", "local", "--config", "configs/debug.yaml", "--ranks", 2),
        *(*PLAIN, *sets(f"output={output}", *overrides)),
        expected=expected,
    )


def progress(output: Path) -> dict[str, float]:
    """Metrics of the last step that was logged."""
    (path,) = output.glob(f"checkpoints/samples-{STEPS * BATCH:012d}/run.json")
    return json.loads(path.read_text())["progress"]["last"]


def test_training_on_latents_and_frozen_text(tmp_path):
    from pretrain.inference import Predictor

    pictures, latents, frozen = tmp_path / "pictures", tmp_path / "latents", tmp_path / "frozen"
    train(pictures)
    run("pretrain", "export", "--output", pictures, "--to", tmp_path / "first")

    # fp32 latents and the text encoder in training: the same losses as on pictures, to the bit.
    shards = tmp_path / "shards"
    options = ("--model", tmp_path / "first", "--text", "--dtype", "fp32", "--out", shards)
    said = run("pretrain", "data", "encode", "--config", "configs/debug.yaml", *options)
    assert "data.encoded=true data.encoded_text=true data.jitter=0 data.flip=0" in said
    use = (f"data.train={shards}/manifest.json", "data.encoded=true")
    train(latents, *use)
    ours, theirs = progress(latents), progress(pictures)
    for name in ("loss", "generate/loss", "align/loss", "gradient_norm"):
        assert ours[name] == theirs[name], name

    # Another autoencoder: refused before a step is made, with the field named.
    said = train(tmp_path / "wrong", *use, "model.autoencoder.shift=0.1", expected=2)
    assert "model.autoencoder=" in said and "Traceback" not in said
    assert not list((tmp_path / "wrong").glob("checkpoints/*"))

    # Encoded text, with the frozen encoder outside the engine and inside the export.
    encoder = f"model.text_encoder.frozen_from={tmp_path / 'first'}"
    train(frozen, *use, "data.encoded_text=true", encoder)
    assert progress(frozen)["loss"] > 0
    run("pretrain", "export", "--output", frozen, "--to", tmp_path / "second")
    first = Predictor.load(tmp_path / "first")
    texts = ["red apple", "a blue car"]
    expected = first.embed_text(texts)
    shutil.rmtree(tmp_path / "first")
    second = Predictor.load(tmp_path / "second")
    assert np.array_equal(second.embed_text(texts), expected)
    assert len(second.generate(["red apple"], steps=1)) == 1
