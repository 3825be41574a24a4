"""An exported model goes into the registry, and comes out in a process that knows no training."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pretrain import mlflow_env, registry, tracking
from pretrain.__main__ import main
from pretrain.config import build
from pretrain.data.tokenizer import Tokenizer, train
from pretrain.errors import RegistryError
from pretrain.inference import InferenceConfig, Predictor, new_model
from pretrain.model.diffdis import ModelConfig
from pretrain.registry import Registered
from pretrain.tracking import TrackingConfig

COLOURS = ("red", "green", "blue")
ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "image_size": 16,
    "unet": {"channels": [8, 16], "attention": [False, True], "head_dim": 8, "norm_groups": 4},
    "text_encoder": {"width": 16, "query_dim": 16, "layers": 1, "heads": 1, "length": 12},
    "text_stream": {"head_layers": 1, "head_width": 16, "head_dim": 16},
}
INFERENCE = {"steps": 2, "align_steps": 2, "align_noises": 2}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `pretrain export` writes it, of random weights."""
    folder = tmp_path_factory.mktemp("exported")
    texts = [f"{colour} {thing}" for colour in COLOURS for thing in ("apple", "car", "dog")]
    train(texts, folder / "tokenizer.model", vocab_size=19)
    tokenizer = Tokenizer(str(folder / "tokenizer.model"))
    torch.manual_seed(0)
    model = new_model(build(ModelConfig, MODEL), tokenizer)
    save_file({n: p.detach() for n, p in model.named_parameters()}, folder / "model.safetensors")
    definition = {
        "model": model.config.model_dump(mode="json"),
        "inference": build(InferenceConfig, INFERENCE).model_dump(mode="json"),
        "tokenizer_sha256": tokenizer.sha256,
        "logit_scale": 10.0,
    }
    (folder / "config.json").write_text(json.dumps(definition))
    card = {"name": "emoji", "metrics": {"zero_shot/top@1": 0.25, "note": "text"}}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a tracked run."""
    output = tmp_path_factory.mktemp("run")
    config = TrackingConfig(kind="none")
    tracker = tracking.build(config, str(output), rank=0)
    tracker.start(config.run_info(str(output)))
    tracker.finish("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert tracking.sync(str(output)) == 0
    return output


@pytest.fixture(scope="module")
def uri(run: Path) -> str:
    return tracking.recorded_run(str(run)).uri


@pytest.fixture(scope="module")
def registered(exported: Path, run: Path, uri: str) -> Registered:
    run_id = tracking.recorded_run(str(run)).run_id
    before = os.environ.get("MLFLOW_TRACKING_URI")
    made = registry.register(
        exported, name="diffdis-emoji", uri=uri, run_id=run_id, tags={"preset": "debug"}
    )
    assert os.environ.get("MLFLOW_TRACKING_URI") == before  # MLflow's global settings are put back
    return made


@pytest.fixture
def tampered(uri: str, registered: Registered) -> Iterator[Path]:
    """The version's folder in the artifact store; what a test changes in it is put back."""
    store = stored(uri, registered)
    saved = store.with_name("saved")
    shutil.copytree(store, saved)
    yield store
    shutil.rmtree(store)
    saved.rename(store)


def stored(uri: str, version: Registered) -> Path:
    """Where the artifact store, a local folder here, keeps a version."""
    client = mlflow_env.load().MlflowClient(uri)
    source = client.get_model_version(version.name, version.version).source
    logged = client.get_logged_model(source.removeprefix("models:/"))
    return Path(logged.artifact_location.removeprefix("file://"))


# Runs in the checkout, as a user would, with a deepspeed that cannot be imported.
FRESH = """
import ast, json, sys
from pathlib import Path
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/diffdis-emoji@champion")
rows = pandas.DataFrame(json.load(sys.stdin))
answers = model.predict(rows, params={"steps": 2, "seed": 3, "noises": 2})
import pretrain
ours = [m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] == "pretrain"]
imported = set()
for file in [*ours, Path(pretrain.__file__).parents[2] / "pyfunc_model.py"]:
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
print(json.dumps({
    "answers": answers.to_dict("records"),
    "code": pretrain.__file__,
    "training": [name for name in ("deepspeed", "pretrain.engine") if name in sys.modules],
    "imported": sorted(imported - sys.stdlib_module_names - {"pretrain"}),
}))
"""


def test_a_fresh_process_without_deepspeed_runs_every_task(
    registered: Registered, exported: Path, uri: str, tmp_path: Path
) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text(
        "raise ImportError('deepspeed is not here')"
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded, labels = base64.b64encode(buffer.getvalue()).decode(), ["red apple", "dog", "blue car"]
    rows: list[dict[str, Any]] = [
        {"task": "generate", "text": "red apple"},
        {"task": "classify", "image": encoded, "labels": labels},
        {"task": "embed_text", "text": "a dog"},
        {"task": "embed_image", "image": encoded},
        {"task": "generate", "text": "blue car"},
    ]
    # A list that is missing must be None: pandas' NaN is refused by MLflow's own schema check.
    rows = [{"labels": None, **row} for row in rows]
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps(rows),
        env={**os.environ, "PYTHONPATH": str(tmp_path), "MLFLOW_TRACKING_URI": uri},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["training"] == []
    # The logged copy, not the checkout.
    assert result["code"] == f"{stored(uri, registered)}/code/pretrain/__init__.py"
    distributions = packages_distributions()
    assert {"torch", "diffusers", "pandas"} <= set(result["imported"])
    for module in result["imported"]:
        providers = {name.lower() for name in distributions[module]}
        assert providers & set(registry.REQUIREMENTS), f"{module} is not in the requirements"

    ours: Any = Predictor.load(exported)
    answers = result["answers"]
    chain = {"steps": 2, "noises": 2, "seed": 3}
    pictures = ours.generate(["red apple", "blue car"], steps=2, seed=3)
    for answer, expected in zip((answers[0], answers[4]), pictures, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(answer["image"])))
        # Rounding to 8 bits may differ by one step between processes.
        difference = np.asarray(picture, np.int16) - np.asarray(expected, np.int16)
        assert np.abs(difference).max() <= 1
    probabilities = ours.classify([image], labels, **chain)[0]
    np.testing.assert_allclose(answers[1]["probabilities"], probabilities, atol=1e-5)
    assert answers[1]["label"] == labels[int(probabilities.argmax())]
    np.testing.assert_allclose(answers[2]["embedding"], ours.embed_text(["a dog"])[0], atol=1e-5)
    expected = ours.embed_image([image], **chain)[0]
    np.testing.assert_allclose(answers[3]["embedding"], expected, atol=1e-5)


def test_a_version_says_what_it_is(
    registered: Registered, exported: Path, run: Path, uri: str, tmp_path: Path
) -> None:
    mlflow = mlflow_env.load()
    client = mlflow.MlflowClient(uri)
    version = client.get_model_version_by_alias("diffdis-emoji", "champion")
    run_id = tracking.recorded_run(str(run)).run_id
    assert str(version.version) == registered.version and version.run_id == run_id
    assert version.tags["preset"] == "debug" and version.tags["metric.zero_shot/top_at_1"] == "0.25"
    assert "metric.note" not in version.tags
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [f"models:/{output.model_id}" for output in outputs] == [version.source]
    assert (
        client.get_run(run_id).info.status == "FINISHED"
    )  # registering changes nothing in the run

    folder = stored(uri, registered)
    assert registry.find_pickles(folder) == []
    assert not list(folder.rglob("__pycache__"))
    requirements = (folder / "requirements.txt").read_text()
    assert "torch==2.13.0\n" in requirements and "deepspeed" not in requirements
    recorded = mlflow.models.Model.load(str(folder)).metadata["sha256"]
    assert recorded.keys() == {"card.json", "config.json", "model.safetensors", "tokenizer.model"}
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False
    )
    assert checked.returncode == 0  # people can check it with what they have

    pulled = registry.pull(registered.uri, uri, tmp_path / "model")
    for path in exported.iterdir():
        assert (pulled / path.name).read_bytes() == path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing is left over


def test_a_model_loaded_in_its_store_can_still_be_pulled(
    registered: Registered, uri: str, tampered: Path, tmp_path: Path
) -> None:
    cache = tampered / "code" / "pretrain" / "__pycache__"
    cache.mkdir()
    (cache / "x.cpython-311.pyc").write_bytes(b"x")
    registry.pull(registered.uri, uri, tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("code/pretrain/inference.py", "append", "file='code/pretrain/inference.py' differs"),
        ("MLmodel", "append", "file='MLmodel' differs"),
        ("SHA256SUMS", "append", "file='SHA256SUMS' is missing or differs"),
        ("code/pretrain/rng.py", "remove", "file='code/pretrain/rng.py' is missing"),
        ("code/pretrain/planted.pkl", "append", "file='code/pretrain/planted.pkl' was added"),
        ("model.safetensors", "flip", "model.safetensors' differs from what was registered"),
    ],
)
def test_a_tampered_file_is_refused_and_named(
    registered: Registered,
    uri: str,
    tampered: Path,
    tmp_path: Path,
    file: str,
    change: str,
    said: str,
) -> None:
    path = next(tampered.rglob(file), tampered / file)
    if change == "append":
        with path.open("ab") as stream:
            stream.write(b"\n")
    elif change == "remove":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(RegistryError, match=said):
        registry.pull(registered.uri, uri, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_commands(
    exported: Path, run: Path, uri: str, registered: Registered, tmp_path: Path, capsys: Any
) -> None:
    named = ["--name", "diffdis-emoji", "--alias", "candidate"]
    assert main(["register", "--model", str(exported), *named, "--output", str(run)]) == 0
    printed = capsys.readouterr().out
    version = int(registered.version) + 1
    assert (
        f"diffdis-emoji version {version} as candidate: models:/diffdis-emoji@candidate" in printed
    )
    assert tracking.recorded_run(str(run)).run_id in printed and uri in printed
    client = mlflow_env.load().MlflowClient(uri)
    champion = client.get_model_version_by_alias("diffdis-emoji", "champion")
    assert str(champion.version) == registered.version  # the other alias stays where it was

    out = str(tmp_path / "model")
    assert main(["pull", "models:/diffdis-emoji@candidate", "--out", out, "--uri", uri]) == 0
    Predictor.load(out)
    assert main(["pull", "models:/diffdis-emoji@candidate", "--out", out, "--uri", uri]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["pull", "models:/diffdis-emoji@nobody", "--out", f"{out}2", "--uri", uri]) == 2
    assert "models:/diffdis-emoji@nobody" in capsys.readouterr().err
    assert main(["pull", "diffdis-emoji", "--out", f"{out}3", "--uri", uri]) == 2
    assert "give models:/NAME@ALIAS or models:/NAME/VERSION" in capsys.readouterr().err
