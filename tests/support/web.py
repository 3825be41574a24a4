"""A small HTTP server on loopback, of bytes in memory."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class WebServer:
    """Serves ``files`` (path -> bytes) while the block lasts.

    Args:
        ranges: whether it honours Range; simple servers send all.
        lengths: whether it tells how long a body is.

    Attributes:
        files: may be changed at any time.
        status: other than 200, every answer is this.
        before: called with the first byte asked for, before each answer.
        port: on 127.0.0.1.
    """

    def __init__(
        self, files: dict[str, bytes], *, ranges: bool = True, lengths: bool = True
    ) -> None:
        self.files, self.ranges, self.lengths, self.status = files, ranges, lengths, 200
        self.before: Callable[[int], object] = lambda _: None
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web._answer(self, body=True)

            def do_HEAD(self) -> None:
                web._answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # clients that were cut off are what these tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        data = self.files.get(handler.path.partition("?")[0].lstrip("/"))
        status = self.status if data is not None or self.status != 200 else 404
        data = data if data is not None and status == 200 else b"<html>an error page</html>"
        asked = handler.headers.get("Range")
        first, last = (asked or "bytes=0-0").removeprefix("bytes=").split("-")
        self.before(int(first))
        if asked and self.ranges and status == 200:
            status = 206 if int(first) < len(data) else 416
            data = data[int(first) : int(last) + 1]
        handler.send_response(status)
        if self.lengths:
            handler.send_header("Content-Length", str(len(data)))
        else:
            handler.send_header("Connection", "close")
        handler.end_headers()
        if body:
            handler.wfile.write(data)
        handler.close_connection = not self.lengths
