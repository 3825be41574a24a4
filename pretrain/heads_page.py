"""A small web page with both heads side by side, over the model as it is served.

The standard library's server: one model, one request at a time, for one person's own machine. For
many people there is `mlflow models serve` (docs/REGISTRY.md).
"""

import html
import json
import logging
import string
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pretrain.registry.golden import Predict

_log = logging.getLogger(__name__)

_PAGE = Path(__file__).parent / "page" / "heads.html"
_MAX_BODY_BYTES = 48 << 20
_MAX_ROWS = 64
_FIELDS = {"task", "text", "image", "labels"}


class HeadsServer(ThreadingHTTPServer):
    """The page at /, and its questions at /answer.

    Args:
        address: host and port; port 0 takes a free one.
        predict: answers rows of the served model's signature.
        card: of the model; empty if it has none.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], predict: Predict, card: Mapping[str, Any]) -> None:
        super().__init__(address, _Handler)
        self.predict = predict
        self.page = render(card).encode()
        self.busy = threading.Lock()

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/"


def render(card: Mapping[str, Any]) -> str:
    """The page, with what the card says at its head."""
    average = card.get("ema_half_life_samples")
    facts = [
        f"{card['samples']:,} samples seen" if card.get("samples") else "",
        f"{card['parameters']:,} parameters" if card.get("parameters") else "",
        f"A moving average of half-life {average:,} samples" if average else "",
        *(str(limit).rstrip(".") for limit in list(card.get("limits") or ())[:1]),
    ]
    fill = {"name": str(card.get("name") or "model"), "facts": ". ".join(filter(None, facts))}
    page = string.Template(_PAGE.read_text(encoding="utf-8"))
    return page.substitute({key: html.escape(value) for key, value in fill.items()})


class _Refused(Exception):
    """A question that cannot be answered, and why."""


class _Handler(BaseHTTPRequestHandler):
    server: HeadsServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/":
            self._send(200, "text/html; charset=utf-8", self.server.page)
        else:
            self._tell(404, f"there is nothing at {self.path[:100]}; the page is at /")

    def do_POST(self) -> None:
        if self.path != "/answer":
            self._tell(404, f"there is nothing at {self.path[:100]}; questions go to /answer")
            return
        try:
            rows, params = self._question()
        except _Refused as error:
            self.close_connection = True  # its body may not have been read
            self._tell(400, str(error))
            return
        from mlflow.exceptions import MlflowException

        try:
            with self.server.busy:
                began = time.monotonic()
                answers = self.server.predict(rows, params)
                seconds = time.monotonic() - began
        except MlflowException as error:
            self._tell(400, error.message)
        except Exception:
            _log.exception("a question failed")
            self._tell(500, "the model failed; the terminal that runs this page says why")
        else:
            tree = {"answers": answers, "seconds": seconds}
            self._send(200, "application/json", json.dumps(tree).encode())

    def _question(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        # Another site's form cannot send this type without asking first, and is never allowed to.
        if self.headers.get_content_type() != "application/json":
            raise _Refused("Content-Type must be application/json")
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise _Refused("Content-Length is missing") from None
        if not 0 < length <= _MAX_BODY_BYTES:
            raise _Refused(f"the body has {length} bytes; at most {_MAX_BODY_BYTES} are read")
        try:
            tree = json.loads(self.rfile.read(length))
            rows, params = tree["rows"], tree.get("params") or {}
            if not 1 <= len(rows) <= _MAX_ROWS:
                raise _Refused(f"rows={len(rows)}: give 1 to {_MAX_ROWS}")
            blank = dict.fromkeys(_FIELDS)
            rows = [{**blank, **{k: v for k, v in row.items() if k in _FIELDS}} for row in rows]
            whole = {
                name: int(params[name]) for name in ("steps", "seed", "noises") if name in params
            }
            if "guidance" in params:
                return rows, {**whole, "guidance": float(params["guidance"])}
            return rows, whole
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _Refused(
                f'the body is no question ({type(error).__name__}); send {{"rows": [{{"task": '
                '"generate", "text": "red apple"}], "params": {"seed": 0}}'
            ) from None

    def _tell(self, status: int, error: str) -> None:
        self._send(status, "application/json", json.dumps({"error": error}).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is for errors."""
