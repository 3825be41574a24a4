"""The preflight asks MLflow with the credentials that the trainer will have."""

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from launcher.facts import _mlflow


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server's URL, and the Authorization of each request to it."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    server.server_close()


def test_credentials_of_files_and_variables(
    asked: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = asked
    assert _mlflow(url) == "answers"
    (tmp_path / "token").write_text("t\n")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN_FILE", str(tmp_path / "token"))
    _mlflow(url)
    (tmp_path / "password").write_text("p\n")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "u")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "old")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD_FILE", str(tmp_path / "password"))
    _mlflow(url)  # as MLflow's client: user and password come before a token
    assert seen == ["", "Bearer t", "Basic " + base64.b64encode(b"u:p").decode()]


@pytest.fixture(autouse=True)
def no_credentials_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        for end in ("", "_FILE"):
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}{end}", raising=False)
