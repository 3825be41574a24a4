"""Where a run stands in MLflow, as its server says. Standard library only."""

import base64
import json
import os
import sqlite3
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

_SECONDS = 10.0
_OVER = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class Tracked:
    """A run's id and its server, as rank 0 wrote them down when the server had answered.

    None of it is known before, and where the output is a URL or not on this machine: the journal of
    a run lies on a disk of rank 0's host.
    """

    id: str
    uri: str

    @classmethod
    def read(cls, output: str) -> "Tracked | None":
        """Of the run in ``output``."""
        try:
            run = json.loads(Path(output, "journal", "run.json").read_bytes())
            return cls(str(run["run_id"]), str(run["uri"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def status(self) -> str:
        """MLflow's word for it: RUNNING, FINISHED, FAILED, KILLED; or why there is none."""
        try:
            if self.uri.startswith("http"):
                path = f"runs/get?run_id={quote(self.id, safe='')}"
                return str(ask(self.uri, path)["run"]["info"]["status"])
            if self.uri.startswith("sqlite:///"):
                return _stored(Path(self.uri.removeprefix("sqlite:///")), self.id)
            return "not asked"
        except Exception as error:  # network, rights, another program's answer
            return f"no answer ({type(error).__name__}: {str(error)[:200]})"

    def describe(self, output: str, ended: bool) -> str:
        """For people; with the remedy, where MLflow has not heard that the job has ``ended``."""
        status = self.status()
        text = f"MLflow run {self.id} at {self.uri}: {status}"
        if ended and status == "RUNNING":
            text += (
                "; nobody could tell it of the end. Submitting again continues the run; "
                f"`python -m pretrain sync --output {output}` sends what the journal still holds"
            )
        return text


def ask(uri: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an MLflow server answers, asked with the credentials that MLflow's client would use.

    Raises:
        OSError, ValueError: no answer, or not MLflow's.
    """
    headers = {"Content-Type": "application/json"}
    user, password, token = map(_credential, ("USERNAME", "PASSWORD", "TOKEN"))
    if user and password:
        pair = f"{user}:{password}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    elif token:
        headers["Authorization"] = f"Bearer {token}"
    url = f"{uri.rstrip('/')}/api/2.0/mlflow/{path}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, headers), timeout=_SECONDS
    ) as reply:
        return dict(json.load(reply))


def _credential(name: str) -> str:
    """As the trainer will find it: in a file that a variable names, or in a variable."""
    variable = f"MLFLOW_TRACKING_{name}"
    path = os.environ.get(f"{variable}_FILE")
    return Path(path).read_text().strip() if path else os.environ.get(variable, "")


def _stored(path: Path, run: str) -> str:
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        found = database.execute("SELECT status FROM runs WHERE run_uuid = ?", (run,)).fetchone()
    return str(found[0]) if found else "no such run"
