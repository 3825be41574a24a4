"""The heads in other people's hands: a pipeline folder of diffusers, and a plain torch module."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pretrain.__main__ import main
from pretrain.classifier import Classifier
from pretrain.diffusers_folder import write
from pretrain.errors import ExportError
from pretrain.inference import Predictor, from_pil
from pretrain.registry import clean, find_pickles
from pretrain.rng import generator
from tests.support.exported import make_exported

EDM = {"image_path": {"predict": "edm", "sigma_data": 0.55, "schedule": {"kind": "edm"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_exported(
        tmp_path_factory.mktemp("exports") / "model",
        **EDM,
        autoencoder={"kind": "space_to_depth", "factor": 2, "shift": 0.6, "gains": [1, 1.3, 2.3]},
    )
    tree = json.loads((folder / "config.json").read_text())
    tree["inference"]["last_noise"] = 0.05
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


# What a stranger would run: no `pretrain` on the path.
STRANGER = """
import sys
sys.path.append(sys.argv[1])
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
pipe = DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
noise = load_file(sys.argv[3])["noise"]
prompts = ["red apple", "Blue CAR, with a tail that is cut off at its length", ""]
many = pipe(prompts, num_inference_steps=8, latents=noise, output_type="pt").images
few = pipe(prompts, num_inference_steps=8, latents=noise, output_type="pt", guidance_scale=1.0)
one = [pipe("red apple", generator=torch.Generator().manual_seed(s)).images[0] for s in (1, 1, 2)]
assert one[0].tobytes() == one[1].tobytes() != one[2].tobytes() and one[0].size == (16, 16)
c, e = pipe.text_encoder(prompts)
save_file({"many": many, "few": few.images, "e": e}, sys.argv[4])
assert "pretrain" not in sys.modules
"""


def test_diffusers_loads_the_folder_and_draws_the_same(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    assert main(["export", "--model", str(model), "--as", "diffusers", "--to", str(folder)]) == 0
    assert find_pickles(folder) == []
    ours = Predictor.load(model)
    prompts = ["red apple", "Blue CAR, with a tail that is cut off at its length", ""]
    noise = [
        torch.randn(ours.model.latent_shape, generator=generator(s, "generate")) for s in range(3)
    ]
    save_file({"noise": torch.stack(noise)}, tmp_path / "noise")
    names = ("torch", "diffusers", "sentencepiece", "safetensors", "numpy", "pillow")
    with clean.site_of(names) as (site, _):
        files = [str(site), str(folder), str(tmp_path / "noise"), str(tmp_path / "made")]
        command = [sys.executable, "-I", "-S", "-c", STRANGER, *files]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    made = load_file(tmp_path / "made")
    tokens, mask = ours.tokenizer.encode(prompts, ours.length)
    for name, guidance in (("many", None), ("few", 0.0)):
        expected = ours.heads.generate_tokens(tokens, mask, range(3), 8, guidance, "ddim")
        assert expected.std() > 0.05
        assert (made[name] * 2 - 1 - expected).abs().max() < 2e-4, name
    assert (made["many"] - made["few"]).abs().max() > 1e-3  # guidance does something
    torch.testing.assert_close(made["e"], torch.from_numpy(ours.embed_text(prompts)))


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_a_variance_preserving_path_becomes_a_ddim_scheduler(predict: str, tmp_path: Path) -> None:
    """`write` proves the pictures itself; were its proof not to look, the next test would fail."""
    folder = make_exported(tmp_path / "model", image_path={"predict": predict})
    index = json.loads((write(folder, tmp_path / "pipeline") / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_a_pipeline_that_draws_otherwise_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain import diffusers_folder

    true = diffusers_folder._settings
    monkeypatch.setattr(diffusers_folder, "_settings", lambda p: {**true(p), "shift": 0.61})
    with pytest.raises(ExportError, match="pictures differ from the model's by"):
        write(model, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_a_path_that_diffusers_has_no_scheduler_for_is_refused(tmp_path: Path) -> None:
    folder = make_exported(tmp_path / "model", image_path={"gamma": 0.5})
    with pytest.raises(ExportError, match=r"gamma=0\.5, for which diffusers has no scheduler"):
        write(folder, tmp_path / "pipeline")


def test_the_classifier_alone_says_what_the_whole_model_says(model: Path, tmp_path: Path) -> None:
    to = tmp_path / "classifier"
    assert main(["export", "--model", str(model), "--as", "classifier", "--to", str(to)]) == 0
    whole, part = (folder / "model.safetensors" for folder in (model, to))
    assert part.stat().st_size < 0.8 * whole.stat().st_size
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    images, labels = [Image.fromarray(one) for one in noise], ["red apple", "dog", "blue car"]
    templates = ("{}", "a {}")
    expected = Predictor.load(model).classify(images, labels, templates=templates)
    for folder in (model, to):
        classifier = Classifier.load(folder)
        pixels = torch.stack([from_pil(image, classifier.image_size) for image in images])
        logits = classifier(pixels, classifier.embed_labels(labels, templates))
        np.testing.assert_allclose(logits.softmax(-1).numpy(), expected, atol=1e-6)
    names = [name for name, _ in classifier.named_parameters()]
    assert not any("up_blocks" in name or "conv_out" in name for name in names)


def test_a_folder_without_its_weights_is_refused(model: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = load_file(model / "model.safetensors")
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with pytest.raises(ExportError, match="is not an exported model"):
        Classifier.load(tmp_path)
    state.pop("trunk.head.norm.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"lacks 1 tensors \(trunk\.head\.norm\.weight\)"):
        Classifier.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --output, a run's folder, or --model"),
        (["--output", "a", "--model", "b"], "one of them"),
        (["--model", "b"], "is a model folder already"),
    ],
)
def test_what_to_export_must_be_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--to", "x", *arguments]) == 2
    assert said in capsys.readouterr().err
