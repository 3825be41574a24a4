"""An HTTP proxy on loopback that breaks what passes, as told: the weather of a bad network.

    with FaultProxy(upstream_port) as proxy:
        proxy.weather = Weather(p_503=0.3, p_reset=0.2)   # at any time, also while bytes flow
        ...                                               # clients speak to proxy.url
        assert proxy.counts["503"] > 0

It runs in a thread of the test. What happens to the n-th request follows from (seed, n) alone.
"""

import asyncio
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

BLOCK_BYTES = 64 << 10
HEAD_BYTES = 64 << 10  # longest header
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
END = b"\r\n\r\n"


@dataclass(frozen=True)
class Weather:
    """What happens to requests. The chances are of each request, drawn independently.

    Attributes:
        p_503: an answer "503 Slow Down" instead of the server's.
        p_reset: the connection is reset before an answer.
        p_truncate: half of the body comes, then a reset; of bodies above 1,000 bytes.
        p_stall: the answer stands still for ``stall_seconds``, half the time before its header
            and half the time in mid-body.
        bytes_per_second: of each answer's body; 0 for no bound.
        down: every connection is reset, those under way too.
        methods: which requests are hit by chances; None for all.
    """

    p_503: float = 0.0
    p_reset: float = 0.0
    p_truncate: float = 0.0
    p_stall: float = 0.0
    stall_seconds: float = 3.0
    bytes_per_second: float = 0.0
    down: bool = False
    methods: tuple[str, ...] | None = None


class _Cut(Exception):
    """The connection ends here, by reset."""


class FaultProxy:
    """Between clients and the HTTP server on ``127.0.0.1:upstream_port``, while the block lasts.

    Attributes:
        weather: may be replaced at any time.
        counts: of each method's requests and of "503", "reset", "truncate", "stall", "down"; and of
            "upstream", the errors that were the server's own.
        url: for clients.
    """

    def __init__(self, upstream_port: int, weather: Weather | None = None, seed: int = 0) -> None:
        self.upstream_port, self.weather, self.seed = upstream_port, weather or Weather(), seed
        self.counts: Counter[str] = Counter()
        self._requests, self._port = 0, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._started = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        assert self._started.wait(10), "the fault proxy did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def wait(self, what: str, count: int, seconds: float = 30) -> None:
        """Until ``counts[what]`` is ``count`` or more."""
        ends = time.monotonic() + seconds
        while self.counts[what] < count:
            assert time.monotonic() < ends, f"waited for {count} of {what}: {self.counts}"
            time.sleep(0.01)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=HEAD_BYTES)
        server = self._loop.run_until_complete(start)
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection: requests one after the other, over one connection upstream."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while head := await _head(reader):
                if upstream is None:
                    upstream = await asyncio.open_connection(
                        "127.0.0.1", self.upstream_port, limit=HEAD_BYTES
                    )
                await self._request(head, reader, writer, *upstream)
        except (_Cut, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        except asyncio.CancelledError:
            return  # the proxy ends; asyncio would print what is raised here
        finally:
            for side in (writer, upstream[1] if upstream else None):
                if side is not None:
                    with suppress(Exception):
                        side.close()

    async def _answer(self, upstream: asyncio.StreamReader) -> bytes:
        """The head of the server's answer; a server that died in the midst of it has none."""
        if not (head := await _head(upstream)):
            raise _Cut
        return head

    async def _request(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        method = head.split(b" ", 1)[0].decode()
        weather, self._requests = self.weather, self._requests + 1
        dice = random.Random(f"{self.seed} {self._requests}")
        # Always drawn in the same order, so that one chance does not move the others.
        names = ("reset", "503", "truncate", "stall")
        chances = [weather.p_reset, weather.p_503, weather.p_truncate, weather.p_stall]
        struck = weather.methods is None or method in weather.methods
        fate = {n for n, p in zip(names, chances, strict=True) if dice.random() < p and struck}
        late = dice.random() < 0.5
        self.counts[method] += 1
        self._check_up()
        if "reset" in fate:
            self._cut("reset")
        if "503" in fate:
            await self._slow_down(method, head, reader, writer)
        up_writer.write(head)
        if b"100-continue" in head.lower():
            interim = await self._answer(up_reader)
            writer.write(interim)
            if b" 100 " not in interim.split(b"\r\n")[0]:
                raise _Cut
        await self._pump(reader, up_writer, _length(head))
        reply = await self._answer(up_reader)
        while reply.split(b" ", 2)[1] == b"100":
            reply = await self._answer(up_reader)
        status = reply.split(b" ", 2)[1]
        if status >= b"500":  # the server's own, under load: asked again, and rightly
            self.counts["upstream"] += 1
        length = 0 if method == "HEAD" or status in (b"204", b"304") else None
        length = _length(reply) if length is None else length
        if "stall" in fate and not late:
            await self._stall(weather)
        writer.write(reply)
        if "truncate" in fate and length > 1000:
            await self._pump(up_reader, writer, length // 2)
            self._cut("truncate")
        if "stall" in fate and late:
            first = max(length, 0) // 2
            await self._pump(up_reader, writer, first)
            await self._stall(weather)
            length -= first
        await self._pump(up_reader, writer, length, paced=True)

    async def _slow_down(
        self,
        method: str,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.counts["503"] += 1
        if b"100-continue" not in head.lower() and (length := _length(head)) > 0:
            await reader.readexactly(length)
        writer.write(
            b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b"
            % (len(SLOW_DOWN), b"" if method == "HEAD" else SLOW_DOWN)
        )
        await writer.drain()
        writer.close()
        raise asyncio.IncompleteReadError(b"", None)

    async def _stall(self, weather: Weather) -> None:
        self.counts["stall"] += 1
        await asyncio.sleep(weather.stall_seconds)

    def _cut(self, what: str) -> None:
        self.counts[what] += 1
        raise _Cut

    def _check_up(self) -> None:
        if self.weather.down:
            self._cut("down")

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        length: int,
        paced: bool = False,
    ) -> None:
        """Pass a body of ``length`` bytes on; -1 for one in chunks."""
        while length < 0:
            line = await reader.readline()
            rest = await reader.readexactly(int(line.split(b";")[0], 16) + 2)
            writer.write(line + rest)
            await writer.drain()
            if len(rest) == 2:
                return
        while length > 0:
            self._check_up()
            rate = self.weather.bytes_per_second if paced else 0
            # Slow answers flow in small pieces, ten a second.
            block = await reader.read(min(length, max(1, int(rate / 10)) if rate else BLOCK_BYTES))
            if not block:
                raise _Cut
            writer.write(block)
            await writer.drain()
            length -= len(block)
            if rate:
                await asyncio.sleep(len(block) / rate)
        await writer.drain()


async def _head(reader: asyncio.StreamReader) -> bytes:
    """A message's first line and header; empty at the end of the connection."""
    try:
        return await reader.readuntil(END)
    except asyncio.IncompleteReadError:
        return b""


def _length(head: bytes) -> int:
    """Bytes of the body that follows a header; -1 for one in chunks."""
    for line in head.lower().split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"transfer-encoding":
            return -1
        if name == b"content-length":
            return int(value)
    return 0
