"""A real MLflow server, with users, over a real PostgreSQL and a real S3, by the project's own
command; it can be killed and started again."""

import base64
import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support.s3 import free_ports

ROOT = Path(__file__).resolve().parents[2]
READY = "Ctrl-C ends"


class TrackingServer:
    """`python -m pretrain server`, from `start` to `kill`.

    Args:
        folder: of its secrets and logs.
        database, users: URIs.
        artifacts: s3://bucket/prefix.
        environment: its AWS_* variables.
        nice: how far it stands back for others.
    """

    def __init__(
        self,
        folder: Path,
        database: str,
        users: str,
        artifacts: str,
        environment: dict[str, str],
        nice: int = 0,
    ) -> None:
        self.folder, self.port, self.nice = folder, free_ports(1)[0], nice
        self.url = f"http://127.0.0.1:{self.port}"
        self.artifacts = artifacts
        # As users give a password: not on the command line.
        self.environment = {
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_USERS_DATABASE_URI": users,
            **environment,
        }
        self._process: psutil.Popen | None = None
        self._log = folder.with_suffix(".out")

    def start(self) -> None:
        """Return at once; `wait` tells when it answers."""
        command = [sys.executable, "-m", "pretrain", "server", "--folder", str(self.folder)]
        command += ["--port", str(self.port), "--artifacts", self.artifacts, "--workers", "1"]
        with open(self._log, "wb") as log:
            self._process = psutil.Popen(
                ["nice", "-n", str(self.nice), *command],
                env={**os.environ, **self.environment},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float = 650) -> None:
        """Until it answers."""
        assert self._process is not None
        ends = time.monotonic() + seconds
        while READY not in (text := self._log.read_text()):
            assert self._process.poll() is None and time.monotonic() < ends, text
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to all of it."""
        assert self._process is not None
        found = [self._process]
        with suppress(psutil.NoSuchProcess):
            found += self._process.children(recursive=True)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in found:
            process.wait(20)

    def secrets(self) -> dict[str, str]:
        return dict(json.loads((self.folder / "secrets.json").read_text()))

    def admin(self) -> dict[str, str]:
        """Variables of a client that may do all."""
        return {
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self.secrets()["admin_password"],
        }

    def set_password(self, user: str, password: str) -> None:
        """From now on the one before is refused."""
        self.call("PATCH", "users/update-password", {"username": user, "password": password})

    def call(self, method: str, path: str, body: dict[str, Any]) -> Any:
        """As admin, past any proxy."""
        pair = f"admin:{self.secrets()['admin_password']}".encode()
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/{path}",
            json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": "Basic " + base64.b64encode(pair).decode(),
            },
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def log(self) -> str:
        """What the server wrote, requests and all."""
        return (self.folder / "mlflow.log").read_text(errors="replace")
