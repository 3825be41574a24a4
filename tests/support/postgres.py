"""A real PostgreSQL on loopback, made anew: the backend store of a real MLflow server."""

import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.support.s3 import free_ports


def find_programs() -> None:
    """Put PostgreSQL's own folder on PATH: Debian keeps `initdb` and `postgres` out of it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if shutil.which("initdb") is None and found:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(found[-1])])


class Postgres:
    """A server without passwords for loopback alone, while the block lasts.

    Args:
        folder: for its data; empty, and every folder above it can be entered by others.
    """

    START_SECONDS = 60

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        self._process: subprocess.Popen[bytes] | None = None
        # It refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None

    def uri(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def __enter__(self) -> "Postgres":
        if self._user:
            owner = pwd.getpwnam(self._user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        data = self.folder / "data"
        make = ["initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
        self._run([*make, "-E", "UTF8", "--no-locale"])
        # Its data are rubbish: nothing is synced.
        flags = ["-p", str(self.port), "-k", str(self.folder), "-h", "127.0.0.1", "-F"]
        with open(self.folder.parent / f"{self.folder.name}.log", "wb") as log:
            self._process = subprocess.Popen(
                ["postgres", "-D", str(data), *flags],
                stdout=log,
                stderr=log,
                cwd="/",
                user=self._user,
            )
        ends = time.monotonic() + self.START_SECONDS
        while not self._answers():
            log_text = Path(log.name).read_text()
            assert self._process.poll() is None and time.monotonic() < ends, log_text
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)  # at once, and its children with it
        self._process.wait(20)

    def make_database(self, name: str) -> str:
        """Its URI."""
        self._ask("postgres", f'CREATE DATABASE "{name}"')
        return self.uri(name)

    def query(self, statement: str, database: str = "mlflow") -> list[tuple[Any, ...]]:
        """Its rows."""
        return self._ask(database, statement)

    def _answers(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(self.uri("postgres")).close()
        except psycopg2.OperationalError:
            return False
        return True

    def _ask(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        import psycopg2

        connection = psycopg2.connect(self.uri(database))
        try:
            connection.autocommit = True  # CREATE DATABASE wants no transaction
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, cwd="/", user=self._user, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
