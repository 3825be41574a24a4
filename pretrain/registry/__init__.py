"""The model registry: code and safetensors, no pickle, every byte hashed.

A version is an MLflow model (models-from-code, see pyfunc_model.py) with two more files:
golden.json, answers that must come out again, and SHA256SUMS, whose own hash is a tag of the
version. So the registry vouches for what the artifact store holds.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import mlflow_env, storage
from pretrain.errors import RegistryError
from pretrain.registry import golden, server, version
from pretrain.registry.pickles import find_pickles
from pretrain.registry.promotion import Promotion, promote
from pretrain.registry.server import CANDIDATE
from pretrain.registry.version import REQUIREMENTS, SUMS, verify

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CANDIDATE",
    "REQUIREMENTS",
    "Promotion",
    "Registered",
    "find_pickles",
    "opened",
    "promote",
    "pull",
    "register",
    "verify",
]


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        name, version: which.
        uri: by which MLflow and `pull` find it, models:/NAME/VERSION.
        run_id: the training run it came from, if known.
    """

    name: str
    version: str
    uri: str
    run_id: str | None


def register(
    folder: str | Path,
    *,
    name: str,
    uri: str,
    run_id: str | None = None,
    experiment: str = "diffdis",
    input_example: "pd.DataFrame | None" = None,
    tags: Mapping[str, str] | None = None,
) -> Registered:
    """Make a version of an exported model, prove that it can be pulled, and call it the candidate.

    Args:
        folder: config.json, model.safetensors, tokenizer.model; card.json, whose `metrics` become
            tags, and README.md, which becomes the version's description.
        name: registered model; made where missing.
        uri: MLflow's tracking URI.
        run_id: the training run, in the same MLflow; without one the version belongs to no run.
        experiment: where a version without a run is kept.
        input_example: rows of the model's signature; else one of each task.
        tags: further tags of the version.

    Raises:
        RegistryError: the folder is no exported model or holds a pickle, or MLflow refuses it.
    """
    folder = Path(folder)
    version.check_exported(folder)
    with (
        server.mlflow_at(uri, f"name={name!r}") as client,
        tempfile.TemporaryDirectory() as scratch,
    ):
        experiment_id = (
            client.get_run(run_id).info.experiment_id
            if run_id
            else mlflow_env.experiment_id(client, uri, experiment)
        )
        logged = client.create_logged_model(experiment_id, name, source_run_id=run_id)
        path = Path(scratch) / "version"
        try:
            version.save(folder, path, logged, run_id, input_example)
            client.log_model_artifacts(logged.model_id, str(path))
        except BaseException:
            client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
        if run_id:
            from mlflow.entities import LoggedModelOutput

            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        all_tags = {**(tags or {}), **_card_tags(folder)}
        all_tags[server.SUMS_TAG] = storage.sha256(str(path / SUMS))
        number = _create(client, name, logged.model_id, run_id, all_tags, _readme(folder))
        try:
            # Golden outputs are for the gate: nothing but the candidate's alias points here yet.
            pull(f"models:/{name}/{number}", uri, Path(scratch) / "pulled", reproduce=False)
        except BaseException:
            client.delete_model_version(name, number)
            raise
        client.set_registered_model_alias(name, CANDIDATE, number)
    return Registered(name, number, f"models:/{name}/{number}", run_id)


def pull(
    model_uri: str, uri: str, out: str | Path, *, reproduce: bool = True, whole: bool = False
) -> Path:
    """Download the exported model of a version to the new folder ``out``, every byte checked.

    Args:
        model_uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        uri: MLflow's tracking URI.
        out: a folder that does not exist or is empty.
        reproduce: also let the version reproduce its golden outputs in a clean environment.
        whole: keep all of the version, the MLflow model with its code, and not the exported model
            alone; what `mlflow models serve` takes.

    Raises:
        RegistryError: no such version; the alias points to one that has not passed its gate; a file
            (named) is missing, differs from its recorded hash or holds a pickle; golden outputs
            differ; or ``out`` holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RegistryError(f"out={str(out)!r} is not empty; give a folder that does not exist yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=out.parent) as scratch:
        downloaded = _fetch(model_uri, uri, Path(scratch))
        if reproduce:
            golden.check(downloaded)
        if out.exists():
            out.rmdir()
        (downloaded if whole else version.model_folder(downloaded)).rename(out)
    return out


@contextmanager
def opened(model_uri: str, uri: str) -> Iterator[Path]:
    """The exported model of a version, for use by this process with this code, while the block
    lasts.

    Raises:
        RegistryError: as `pull`; or this code answers the golden requests otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="version-") as scratch:
        downloaded = _fetch(model_uri, uri, Path(scratch))
        folder = version.model_folder(downloaded)
        kept = golden.read(downloaded)
        answers = version.in_process(folder)(kept["rows"], kept["params"])
        if wrong := golden.differences(kept, answers):
            raise RegistryError(
                f"model={model_uri!r}: this program answers otherwise than the code that was "
                f"registered with the weights: {'; '.join(wrong)}; use it through mlflow.pyfunc in "
                "a fresh process, or check out the release it was made with"
            )
        yield folder


def _fetch(model_uri: str, uri: str, scratch: Path) -> Path:
    """A version's files in a folder below ``scratch``, verified."""
    with server.mlflow_at(uri, f"model={model_uri!r}") as client:
        found, alias = server.find(client, model_uri)
        if alias:
            server.check_gate(found, alias)
        downloaded = server.download(found, scratch)
        verify(downloaded, found.tags.get(server.SUMS_TAG))
    return downloaded


def _create(
    client: Any,
    name: str,
    model_id: str,
    run_id: str | None,
    tags: Mapping[str, str],
    description: str | None,
) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name,
        f"models:/{model_id}",
        run_id,
        tags=dict(tags),
        description=description,
        model_id=model_id,
    )
    return str(made.version)


def _card_tags(folder: Path) -> dict[str, str]:
    card = version.card(folder)
    tags = {server.METRIC_TAG + key: repr(v) for key, v in version.card_metrics(card).items()}
    sets = card.get("evaluated_on") or {}
    return tags | ({server.SETS_TAG: json.dumps(sets)} if sets else {})


def _readme(folder: Path) -> str | None:
    path = folder / "README.md"
    return path.read_text(encoding="utf-8")[:5000] if path.is_file() else None
