"""The registry's side of MLflow: which version is meant, its tags, and its files."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain import mlflow_env
from pretrain.errors import RegistryError

SUMS_TAG = "pretrain.sha256sums"
METRIC_TAG = "metric."
SETS_TAG = "pretrain.evaluated_on"
GATE_TAG = "pretrain.gate."
# Where `register` puts what it makes. Every other alias says that a gate was passed.
CANDIDATE = "candidate"


@contextmanager
def mlflow_at(uri: str, what: str) -> Iterator[Any]:
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


def find(client: Any, model_uri: str) -> tuple[Any, str | None]:
    """The version, and the alias by which it was asked for.

    Raises:
        RegistryError: the URI is none of a version.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if match is None:
        raise RegistryError(
            f"model={model_uri!r} names no version; give models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    name, alias, number = match.groups()
    version = (
        client.get_model_version_by_alias(name, alias)
        if alias
        else client.get_model_version(name, number)
    )
    return version, alias


def holder(client: Any, name: str, alias: str) -> Any | None:
    """The version that ``alias`` points to, if any."""
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def download(version: Any, folder: Path) -> Path:
    """All files of a version, into a folder below ``folder``."""
    from mlflow.artifacts import download_artifacts

    uri = f"models:/{version.name}/{version.version}"
    return Path(download_artifacts(uri, dst_path=str(folder)))


def metrics(version: Any) -> dict[str, float]:
    """The metrics of a version's card, from its tags: in the registry even if the files are not."""
    return {
        name.removeprefix(METRIC_TAG): float(value)
        for name, value in version.tags.items()
        if name.startswith(METRIC_TAG)
    }


def sets(version: Any) -> dict[str, str]:
    """Fingerprints of the sets that a version was scored on."""
    return dict(json.loads(version.tags.get(SETS_TAG, "{}")))


def record_gate(client: Any, version: Any, alias: str, result: Mapping[str, Any]) -> None:
    """Keep what the gate for ``alias`` said, as a tag of the version."""
    tree = {**result, "sha256sums": version.tags.get(SUMS_TAG)}
    for field in ("passed", "failed"):  # a tag holds 5,000 characters
        tree[field] = [text[:200] for text in tree[field][:10]]
    client.set_model_version_tag(version.name, version.version, GATE_TAG + alias, json.dumps(tree))


def check_gate(version: Any, alias: str) -> None:
    """Refuse an alias that was moved to a version which has not passed the gate for it.

    Raises:
        RegistryError: saying what the gate said.
    """
    if alias == CANDIDATE:
        return
    which = f"alias={alias!r} points to version {version.version} of {version.name!r}"
    number = f"models:/{version.name}/{version.version}"
    remedy = (
        f"run `python -m pretrain promote {number} --to {alias}`, or take it as it is by {number}"
    )
    text = version.tags.get(GATE_TAG + alias)
    if text is None:
        raise RegistryError(f"{which}, which has not passed the gate for it; {remedy}")
    try:
        result = json.loads(text)
    except ValueError:
        result = {"failed": ["its record cannot be read"]}
    if result.get("failed"):
        raise RegistryError(
            f"{which}, which failed the gate for it ({'; '.join(result['failed'])}); {remedy}"
        )
    if result.get("sha256sums") != version.tags.get(SUMS_TAG):
        raise RegistryError(f"{which}, whose files are not those that passed the gate; {remedy}")
