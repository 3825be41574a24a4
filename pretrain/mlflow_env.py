"""MLflow as this project uses it: imported late, silent on the network and on the terminal."""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from pretrain.errors import ConfigError

# Secrets that change while a process runs are read from files: variable + _FILE names one.
_FROM_FILES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

# Defaults only: what the user has set in the environment wins.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no call to mlflow.org at import
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # no warning where git is not installed
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # a uv.lock of the working directory is not the model's
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own 7 tries take minutes; ours are resumable
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # A line nobody reads, for which each end of a run asks the server once more.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def load() -> ModuleType:
    """The `mlflow` package; the first call takes seconds.

    Raises:
        ImportError: it is not installed.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    read_credentials()
    import mlflow

    # Alembic tells of some fifty migrations when a SQLite file is new.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return mlflow


def request_timeout() -> float:
    """Seconds that a request may take, by the environment or our default."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    return float(os.environ.get(name, DEFAULTS[name]))


def read_credentials() -> None:
    """Set MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN anew from the files that
    MLFLOW_TRACKING_USERNAME_FILE, ... name, where they do. MLflow looks at the variables in every
    request. A file that is missing or empty, as in the midst of a change, changes nothing.
    """
    for name in _FROM_FILES:
        path = os.environ.get(f"{name}_FILE")
        if path:
            with suppress(OSError, UnicodeDecodeError):
                if value := Path(path).read_text(encoding="utf-8").strip():
                    os.environ[name] = value


def resolve_uri(uri: str | None, default: str) -> str:
    """``uri``, else the environment's MLFLOW_TRACKING_URI, else ``default``."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def require_uri(uri: str | None) -> str:
    """As `resolve_uri`, where there is no default.

    Raises:
        ConfigError: neither is given.
    """
    if resolved := resolve_uri(uri, ""):
        return resolved
    raise ConfigError("--uri is not given; pass MLflow's tracking URI, or set MLFLOW_TRACKING_URI")


def public(uri: str) -> str:
    """``uri`` without user and password: the form that may be written down and logged."""
    return re.sub(r"(?<=://)[^/\s]*@", "", uri)


def key(name: str) -> str:
    """``name`` in the characters and the length that MLflow takes: recall@5 is recall_at_5."""
    return re.sub(r"[^/\w.\- ]", "_", name.replace("@", "_at_"))[:250]


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The id of experiment ``name``, made where it is missing.

    With a SQLite file its artifacts go beside that file, in `mlartifacts`; MLflow's own default is
    the working directory. A server decides for itself.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        beside = None
        if uri.startswith("sqlite:///"):
            beside = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")
        try:
            return str(client.create_experiment(name, artifact_location=beside))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run was faster
    return str(found.experiment_id)
