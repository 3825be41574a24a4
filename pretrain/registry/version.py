"""The files of a version: an MLflow model of code and safetensors, golden outputs, hashes."""

import json
import shutil
import tempfile
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import mlflow_env, storage
from pretrain.errors import RegistryError
from pretrain.registry import golden
from pretrain.registry.pickles import files_below, refuse_pickles
from pretrain.registry.server import SUMS_TAG

if TYPE_CHECKING:
    import pandas as pd

SUMS = "SHA256SUMS"
REQUIRED = ("config.json", "model.safetensors", "tokenizer.model")  # or the folder tokenizer
# What the served model imports (a test compares); never deepspeed.
REQUIREMENTS = (
    *("torch", "diffusers", "sentencepiece", "safetensors", "numpy", "pillow", "pandas"),
    *("pydantic", "pyyaml", "fsspec", "webdataset", "mlflow"),
)


def check_exported(folder: Path) -> None:
    """Raises:
    RegistryError: ``folder`` is no exported model, or holds a pickle.
    """
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if (folder / "tokenizer").is_dir() and "tokenizer.model" in missing:
        missing.remove("tokenizer.model")
    if missing:
        raise RegistryError(
            f"model={str(folder)!r} lacks {', '.join(missing)}; give a folder of `pretrain export`"
        )
    refuse_pickles(folder)


def card(folder: Path) -> dict[str, Any]:
    """The model card of an exported model; empty if it has none."""
    path = folder / "card.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def card_metrics(card: dict[str, Any]) -> dict[str, float]:
    """The numbers among a card's metrics, by `mlflow_env.key` of their names."""
    metrics = card.get("metrics") or {}
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {mlflow_env.key(name): value for name, value in numbers.items()}


def save(
    folder: Path, path: Path, logged: Any, run_id: str | None, input_example: "pd.DataFrame | None"
) -> None:
    """Write the MLflow model of an exported one, with golden.json and SHA256SUMS, to ``path``."""
    import mlflow
    from mlflow.models import Model

    package = Path(__file__).parents[1]
    hashes = {file: storage.sha256(str(folder / file)) for file in files_below(folder)}
    with tempfile.TemporaryDirectory(prefix="register-") as scratch:
        code = Path(scratch) / "pretrain"
        shutil.copytree(
            package, code, ignore=shutil.ignore_patterns("__pycache__", "*.py[co]", ".*")
        )
        mlflow.pyfunc.save_model(
            str(path),
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=run_id,
                metadata={"sha256": hashes, "card": card(folder)},
            ),
            python_model=str(code / "pyfunc_model.py"),
            code_paths=[str(code)],
            artifacts={"model": str(folder.absolute())},
            signature=signature(),
            input_example=example() if input_example is None else input_example,
            pip_requirements=[f"{name}=={_release(name)}" for name in _needed(folder)],
        )
    for cache in list(path.rglob("__pycache__")):
        shutil.rmtree(cache)
    golden.write(path / golden.FILE, golden.make(in_process(folder)))
    refuse_pickles(path)
    lines = [f"{storage.sha256(str(path / file))}  {file}\n" for file in files_below(path)]
    (path / SUMS).write_text("".join(lines))


def in_process(folder: Path) -> golden.Predict:
    """The served model over an exported one, in this process and with this code."""
    from types import SimpleNamespace

    import pandas as pd

    from pretrain.pyfunc_model import DiffDisModel

    model = DiffDisModel()
    model.load_context(SimpleNamespace(artifacts={"model": str(folder)}))

    def predict(rows: list[dict[str, Any]], params: dict[str, Any]) -> list[dict[str, Any]]:
        answers = model.predict(None, pd.DataFrame(rows, dtype=object), params)
        return [dict(row) for row in answers.to_dict("records")]

    return predict


def verify(folder: str | Path, sums_sha256: str | None) -> None:
    """Check a downloaded version against its `SHA256SUMS`, and that against the registry's tag.

    Raises:
        RegistryError: naming the file that is missing, added, changed or pickled.
    """
    folder = Path(folder)
    remedy = "do not use it; register the model again"
    if sums_sha256 is None:
        raise RegistryError(
            f"the version has no tag {SUMS_TAG!r}: it was not made by `pretrain register`; {remedy}"
        )
    listing = folder / SUMS
    if not listing.is_file() or storage.sha256(str(listing)) != sums_sha256:
        raise RegistryError(
            f"file={SUMS!r} is missing or differs from what was registered; {remedy}"
        )
    lines = (line.partition("  ") for line in listing.read_text(encoding="utf-8").splitlines())
    recorded = {file: digest for digest, _, file in lines}
    # MLflow adds `registered_model_meta`, and Python its cache where a model is loaded in place.
    found = {file for file in files_below(folder) if "/__pycache__/" not in file}
    found -= {SUMS, "registered_model_meta"}
    for file in sorted(found | recorded.keys()):
        if file not in found:
            raise RegistryError(f"file={file!r} is missing from the version; {remedy}")
        if file not in recorded:
            raise RegistryError(
                f"file={file!r} was added to the version after it was registered; {remedy}"
            )
        if storage.sha256(str(folder / file)) != recorded[file]:
            raise RegistryError(f"file={file!r} differs from what was registered; {remedy}")
    # Nobody vouches for a cache, and Python would run it in place of the code beside it.
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    refuse_pickles(folder)


def model_folder(version: Path) -> Path:
    """The exported model inside a downloaded version."""
    from mlflow.models import Model

    flavor = Model.load(str(version)).flavors["python_function"]
    return version / str(flavor["artifacts"]["model"]["path"])


def example() -> "pd.DataFrame":
    """Rows of the input signature, one of each task."""
    import pandas as pd

    return pd.DataFrame(golden.requests()[1:], columns=["task", "text", "image", "labels"])


def _needed(folder: Path) -> tuple[str, ...]:
    """What the served model of an exported one imports."""
    pretrained = (folder / "tokenizer").is_dir()  # with a text encoder of transformers
    return (*REQUIREMENTS, "transformers") if pretrained else REQUIREMENTS


def signature() -> Any:
    """The columns and parameters that pyfunc_model.py reads and gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    def column(name: str, kind: Any, required: bool = False) -> ColSpec:
        return ColSpec(kind, name, required=required)

    inputs: list[ColSpec | TensorSpec] = [
        column("task", DataType.string, required=True),
        column("text", DataType.string),
        column("image", DataType.string),
        column("labels", Array(DataType.string)),
    ]
    outputs: list[ColSpec | TensorSpec] = [
        column("task", DataType.string, required=True),
        column("image", DataType.string),
        column("embedding", Array(DataType.double)),
        column("label", DataType.string),
        column("probabilities", Array(DataType.double)),
    ]
    params = [
        ParamSpec("steps", DataType.integer, 0),
        ParamSpec("guidance", DataType.double, -1.0),
        ParamSpec("seed", DataType.integer, 0),
        ParamSpec("noises", DataType.integer, 0),
    ]
    return ModelSignature(Schema(inputs), Schema(outputs), ParamSchema(params))


def _release(package: str) -> str:
    """The installed version without its local part: 2.13.0+cpu is 2.13.0 for a pip elsewhere."""
    return installed_version(package).partition("+")[0]
