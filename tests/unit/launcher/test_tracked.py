"""Where a run stands in MLflow: a database that MLflow made, and its interface over HTTP."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launcher import facts
from launcher.tracked import Tracked

USER, PASSWORD, RUN = "me", "s3cret-of-the-test", "0123abcd"


class Server(BaseHTTPRequestHandler):
    """A stand-in for an MLflow server with basic authentication: two of its answers. The real one
    takes half a minute to start."""

    def do_GET(self) -> None:
        known = self.path == f"/api/2.0/mlflow/runs/get?run_id={RUN}"
        self._answer(200 if known else 404, {"run": {"info": {"status": "KILLED"}}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.path == "/api/2.0/mlflow/experiments/search"
        self._answer(200 if known else 404, {"experiments": []})

    def _answer(self, code: int, tree: dict[str, object]) -> None:
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        allowed = self.headers.get("Authorization") == f"Basic {pair}"
        self.send_response(code if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps(tree if allowed else {}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def credentials(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def test_what_the_run_left_behind(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    assert Tracked.read(str(tmp_path)) is None
    for text in ("{", "[]", "{}"):
        (tmp_path / "journal" / "run.json").write_text(text)
        assert Tracked.read(str(tmp_path)) is None
    (tmp_path / "journal" / "run.json").write_text('{"run_id": "r1", "uri": "https://host"}')
    assert Tracked.read(str(tmp_path)) == Tracked("r1", "https://host")


def test_a_server_is_asked_with_credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(monkeypatch, PASSWORD)
    assert Tracked(RUN, server).status() == "KILLED"
    assert "no answer (HTTPError: HTTP Error 404" in Tracked("another", server).status()
    credentials(monkeypatch, "wrong")
    assert "no answer (HTTPError: HTTP Error 401" in Tracked(RUN, server).status()
    assert "no answer (URLError" in Tracked(RUN, "http://127.0.0.1:9").status()


def test_the_preflight_tries_the_credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(monkeypatch, PASSWORD)
    assert facts._mlflow(server) == "answers"
    credentials(monkeypatch, "wrong")
    with pytest.raises(OSError, match="401"):
        facts._mlflow(server)


@pytest.mark.slow
def test_a_database_of_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'm l%flow.db'}"
    client = MlflowClient(uri)
    run = client.create_run("0").info.run_id
    tracked = Tracked(run, uri)
    assert tracked.status() == "RUNNING"
    text = tracked.describe("runs/demo", ended=True)
    assert "RUNNING; nobody could tell it" in text and "sync --output runs/demo" in text
    assert tracked.describe("runs/demo", ended=False).endswith(": RUNNING")
    client.set_terminated(run, "FAILED")
    assert tracked.describe("runs/demo", ended=True) == f"MLflow run {run} at {uri}: FAILED"
    assert Tracked("another", uri).status() == "no such run"
    assert "no answer" in Tracked(run, f"sqlite:///{tmp_path / 'none.db'}").status()
