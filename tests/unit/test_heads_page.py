"""The page with both heads: what it serves, and what it refuses."""

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from pretrain.heads_page import HeadsServer, render

CARD = {"name": "<b>m</b>", "samples": 1234, "parameters": 56, "limits": ["knows $5 & no more"]}


def predict(rows: list[dict[str, Any]], params: dict[str, Any]) -> list[dict[str, Any]]:
    """Stands in for a model, whose own answers tests/integration/test_registry.py looks at."""
    if rows[0]["task"] == "break":
        raise RuntimeError("a secret of the inside")
    if rows[0]["task"] not in ("generate", "classify"):
        raise MlflowException.invalid_parameter_value("row 0: task='draw': give one of generate")
    return [{"rows": len(rows), "seed": params.get("seed"), "keys": sorted(rows[0])}]


@pytest.fixture
def server() -> Iterator[HeadsServer]:
    with HeadsServer(("127.0.0.1", 0), predict, CARD) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(
    server: HeadsServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    kind = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, body, {**kind, **headers})
    answer = connection.getresponse()
    return answer.status, answer.headers.get_content_type(), answer.read()


def test_the_page_says_what_the_model_is_and_loads_nothing_from_elsewhere() -> None:
    page = render(CARD)
    assert "&lt;b&gt;m&lt;/b&gt;" in page and "<b>m</b>" not in page
    assert "1,234 samples seen. 56 parameters. knows $5 &amp; no more" in page
    assert "http" not in page and "$$" not in page and "const $ = id" in page
    assert "model" in render({})


def test_it_serves_the_page_and_answers(server: HeadsServer) -> None:
    status, kind, page = ask(server, "GET", "/?text=owl")
    assert (status, kind) == (200, "text/html") and b"Tell apart" in page
    question = {"rows": [{"task": "generate", "text": "owl", "x": 1}] * 2, "params": {"seed": 3}}
    status, kind, answer = ask(server, "POST", "/answer", json.dumps(question).encode())
    assert (status, kind) == (200, "application/json")
    (row,) = json.loads(answer)["answers"]
    assert row == {"rows": 2, "seed": 3, "keys": ["image", "labels", "task", "text"]}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("GET", "/etc/passwd", None, 404, "the page is at /"),
        ("POST", "/", b"{}", 404, "questions go to /answer"),
        ("POST", "/answer", b"", 400, "the body has 0 bytes"),
        ("POST", "/answer", b"{", 400, "the body is no question (JSONDecodeError)"),
        ("POST", "/answer", b"[1]", 400, "the body is no question (TypeError)"),
        ("POST", "/answer", b'{"rows": []}', 400, "rows=0: give 1 to 64"),
        ("POST", "/answer", b'{"rows": [3]}', 400, "the body is no question"),
        ("POST", "/answer", b'{"rows": [{}], "params": {"seed": "x"}}', 400, "no question"),
        ("POST", "/answer", b'{"rows": [{"task": "draw"}]}', 400, "task='draw': give one of"),
        ("POST", "/answer", b'{"rows": [{"task": "break"}]}', 500, "the model failed"),
    ],
)
def test_a_bad_question_is_told_why(
    server: HeadsServer, method: str, path: str, body: bytes | None, status: int, said: str
) -> None:
    given, kind, answer = ask(server, method, path, body)
    assert (given, kind) == (status, "application/json")
    assert said in json.loads(answer)["error"] and b"secret" not in answer


def test_another_sites_form_and_a_huge_body_are_refused(server: HeadsServer) -> None:
    question = b'{"rows": [{"task": "generate"}]}'
    status, _, answer = ask(server, "POST", "/answer", question, **{"Content-Type": "text/plain"})
    assert status == 400 and b"must be application/json" in answer
    status, _, answer = ask(server, "POST", "/answer", b"{}", **{"Content-Length": str(1 << 30)})
    assert status == 400 and b"at most" in answer
