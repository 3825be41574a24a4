"""The model registry: code and safetensors, no pickle, every byte hashed.

A version is an MLflow model (models-from-code, see pyfunc_model.py) with one more file, SHA256SUMS,
whose own hash is a tag of the version. So the registry vouches for what the artifact store holds.
"""

import base64
import io
import json
import os
import pickletools
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pretrain import mlflow_env, storage
from pretrain.errors import RegistryError

if TYPE_CHECKING:
    import pandas as pd

SUMS = "SHA256SUMS"
SUMS_TAG = "pretrain.sha256sums"
REQUIRED = ("config.json", "model.safetensors", "tokenizer.model")
# What the served model imports (a test compares); never deepspeed.
REQUIREMENTS = (
    *("torch", "diffusers", "sentencepiece", "safetensors", "numpy", "pillow", "pandas"),
    *("pydantic", "pyyaml", "fsspec", "webdataset", "mlflow"),
)
_PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".cloudpickle"}
_PICKLE_WINDOW_BYTES = 1 << 20
_PICKLE_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD"}


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        name, version: which.
        alias: the alias that now points to it.
        uri: by which MLflow and `pull` find it, models:/NAME@ALIAS.
        run_id: the training run it came from, if known.
    """

    name: str
    version: str
    alias: str
    uri: str
    run_id: str | None


def register(
    folder: str | Path,
    *,
    name: str,
    uri: str,
    alias: str = "champion",
    run_id: str | None = None,
    experiment: str = "diffdis",
    input_example: "pd.DataFrame | None" = None,
    tags: Mapping[str, str] | None = None,
) -> Registered:
    """Make a version of an exported model, prove that it can be pulled, then point the alias to it.

    Args:
        folder: config.json, model.safetensors, tokenizer.model; card.json, whose `metrics` become
            tags.
        name: registered model; made where missing.
        uri: MLflow's tracking URI.
        alias: moved to the new version, last of all.
        run_id: the training run, in the same MLflow; without one the version belongs to no run.
        experiment: where a version without a run is kept.
        input_example: rows of the model's signature; else one of text tasks.
        tags: further tags of the version.

    Raises:
        RegistryError: the folder is no exported model or holds a pickle, or MLflow refuses it.
    """
    folder = Path(folder)
    _check_exported(folder)
    with _mlflow(uri, f"name={name!r}") as client, tempfile.TemporaryDirectory() as scratch:
        experiment_id = (
            client.get_run(run_id).info.experiment_id
            if run_id
            else mlflow_env.experiment_id(client, uri, experiment)
        )
        logged = client.create_logged_model(experiment_id, name, source_run_id=run_id)
        path = Path(scratch) / "version"
        try:
            _save(folder, path, logged, run_id, input_example)
            client.log_model_artifacts(logged.model_id, str(path))
        except BaseException:
            client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
        if run_id:
            from mlflow.entities import LoggedModelOutput

            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        all_tags = {f"metric.{key}": repr(value) for key, value in _card_metrics(folder).items()}
        all_tags |= {**(tags or {}), SUMS_TAG: storage.sha256(str(path / SUMS))}
        version = _create_version(client, name, logged.model_id, run_id, all_tags)
        try:
            pull(f"models:/{name}/{version}", uri, Path(scratch) / "pulled")
        except BaseException:
            client.delete_model_version(name, version)
            raise
        client.set_registered_model_alias(name, alias, version)
    return Registered(name, version, alias, f"models:/{name}@{alias}", run_id)


def pull(model_uri: str, uri: str, out: str | Path) -> Path:
    """Download the exported model of a version to the new folder ``out``, every byte checked.

    Args:
        model_uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        uri: MLflow's tracking URI.
        out: a folder that does not exist or is empty.

    Raises:
        RegistryError: no such version; a file (named) is missing, differs from its recorded hash or
            holds a pickle; or ``out`` holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RegistryError(f"out={str(out)!r} is not empty; give a folder that does not exist yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=out.parent) as scratch:
        with _mlflow(uri, f"model={model_uri!r}") as client:
            from mlflow.artifacts import download_artifacts
            from mlflow.models import Model

            version = _find_version(client, model_uri)
            exact = f"models:/{version.name}/{version.version}"
            downloaded = Path(download_artifacts(exact, dst_path=scratch))
            verify(downloaded, version.tags.get(SUMS_TAG))
            flavor = Model.load(str(downloaded)).flavors["python_function"]
        if out.exists():
            out.rmdir()
        (downloaded / flavor["artifacts"]["model"]["path"]).rename(out)
    return out


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
    found = {file for file in _files(folder) if "/__pycache__/" not in file}
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
    _refuse_pickles(folder)


def find_pickles(folder: str | Path) -> list[str]:
    """Files below ``folder`` that are Python pickles by name or by content, as `path: why`."""
    found = []
    for file in _files(Path(folder)):
        path = Path(folder) / file
        why = _pickle_name(file)
        if why is None:
            with path.open("rb") as stream:
                why = _pickle_content(stream)
        if why is None and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    with archive.open(entry) as stream:
                        why = why or _pickle_name(entry) or _pickle_content(stream)
        if why:
            found.append(f"{file}: {why}")
    return found


def example() -> "pd.DataFrame":
    """Rows of the input signature, one of each task."""
    import pandas as pd
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    return pd.DataFrame(
        [
            {"task": "generate", "text": "red apple", "image": None, "labels": None},
            {"task": "embed_text", "text": "red apple", "image": None, "labels": None},
            {"task": "embed_image", "text": None, "image": image, "labels": None},
            {"task": "classify", "text": None, "image": image, "labels": ["red apple", "blue car"]},
        ]
    )


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


def _save(
    folder: Path, path: Path, logged: Any, run_id: str | None, input_example: "pd.DataFrame | None"
) -> None:
    """Write the MLflow model and its SHA256SUMS to ``path``."""
    import mlflow
    from mlflow.models import Model

    package = Path(__file__).parent
    hashes = {file: storage.sha256(str(folder / file)) for file in _files(folder)}
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
                metadata={"sha256": hashes, "card": _card(folder)},
            ),
            python_model=str(code / "pyfunc_model.py"),
            code_paths=[str(code)],
            artifacts={"model": str(folder.absolute())},
            signature=signature(),
            input_example=example() if input_example is None else input_example,
            pip_requirements=[f"{name}=={_release(name)}" for name in REQUIREMENTS],
        )
    for cache in list(path.rglob("__pycache__")):
        shutil.rmtree(cache)
    _refuse_pickles(path)
    lines = [f"{storage.sha256(str(path / file))}  {file}\n" for file in _files(path)]
    (path / SUMS).write_text("".join(lines))


def _release(package: str) -> str:
    """The installed version without its local part: 2.13.0+cpu is 2.13.0 for a pip elsewhere."""
    return installed_version(package).partition("+")[0]


def _create_version(
    client: Any, name: str, model_id: str, run_id: str | None, tags: Mapping[str, str]
) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    made = client.create_model_version(name, source, run_id, tags=dict(tags), model_id=model_id)
    return str(made.version)


def _find_version(client: Any, model_uri: str) -> Any:
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if match is None:
        raise RegistryError(
            f"model={model_uri!r} names no version; give models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    name, alias, number = match.groups()
    return (
        client.get_model_version_by_alias(name, alias)
        if alias
        else client.get_model_version(name, number)
    )


@contextmanager
def _mlflow(uri: str, what: str) -> Iterator[Any]:
    """A client for ``uri``, which is MLflow's global URI meanwhile: only so is models:/ resolved.

    Raises:
        RegistryError: in place of MLflow's own, naming ``what``.
    """
    mlflow = mlflow_env.load()
    from mlflow.exceptions import MlflowException

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield mlflow.MlflowClient(uri)
    except MlflowException as error:
        where = mlflow_env.public(uri)
        raise RegistryError(f"{what}: MLflow at {where} says: {error}") from error
    finally:
        mlflow.set_tracking_uri(None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:  # set_tracking_uri writes the variable, too
            os.environ["MLFLOW_TRACKING_URI"] = before


def _check_exported(folder: Path) -> None:
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise RegistryError(
            f"model={str(folder)!r} lacks {', '.join(missing)}; give a folder of `pretrain export`"
        )
    _refuse_pickles(folder)


def _card(folder: Path) -> dict[str, Any]:
    path = folder / "card.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _card_metrics(folder: Path) -> dict[str, float]:
    metrics = _card(folder).get("metrics") or {}
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {mlflow_env.key(name): value for name, value in numbers.items()}


def _files(folder: Path) -> list[str]:
    """Paths of all files below ``folder``, relative, with forward slashes, sorted."""
    return sorted(
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
    )


def _refuse_pickles(folder: Path) -> None:
    if pickles := find_pickles(folder):
        raise RegistryError(
            f"pickles run code when they are read, and are refused: {'; '.join(pickles)}; "
            "export weights as safetensors"
        )


def _pickle_name(file: str) -> str | None:
    suffixes = [s.lower() for s in Path(file).suffixes]
    hit = next((s for s in suffixes if s in _PICKLE_SUFFIXES), None)
    return f"has the suffix {hit}" if hit else None


def _pickle_content(stream: IO[bytes]) -> str | None:
    """Why the bytes are a pickle, or None.

    Protocol 2 and later begins with a marker: it counts if a valid opcode follows (the length at
    the head of a safetensors file can look like the marker). Protocols 0 and 1 have none, and
    letters are opcodes there: the whole file must be one program that keeps its stack in order and
    calls something.
    """
    head = stream.read(_PICKLE_WINDOW_BYTES)
    operations, end = [], 0
    try:
        for operation, _, position in pickletools.genops(head):
            operations.append(operation.name)
            end = (position or 0) + 1
        pickletools.dis(head, out=io.StringIO())  # raises where the stack is out of order
    except (ValueError, OverflowError):  # other files break off within a few bytes
        end = 0
    if operations[:1] == ["PROTO"] and len(operations) >= 2:
        return "begins as a pickle"
    if end == len(head) and _PICKLE_CALLS.intersection(operations):
        return "is a pickle of protocol 0 or 1"
    return None
