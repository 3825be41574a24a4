"""One MLflow database for all tests here: making its tables takes ten seconds."""

import os
import shutil
from pathlib import Path

import pytest

from pretrain import mlflow_env


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_env.load().MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(template: Path, tmp_path: Path) -> str:
    """A tracking URI with no run in it."""
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def no_uri_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING")]:
        monkeypatch.delenv(name)
