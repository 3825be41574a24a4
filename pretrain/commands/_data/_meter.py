"""How far a long command is: a line on standard error every few seconds."""

import sys
import time


class Meter:
    """``meter(done, total, note)`` says something at most every ``every_seconds``, and at the end.

    Args:
        name: of the command.
        what: is counted, plural.
        every_seconds: between two lines; on a terminal the line is rewritten in place.
    """

    def __init__(self, name: str, what: str, every_seconds: float = 2.0) -> None:
        self.name, self.what = name, what
        self._live = sys.stderr.isatty()
        self._every = 0.2 if self._live else every_seconds
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """Now ``done`` of ``total`` (None: unknown)."""
        now = time.monotonic()
        finished = total is not None and done >= total
        if now - self._last < self._every and not finished:
            return
        self._last = now
        rate = done / max(now - self._began, 1e-9)
        text = f"[{self.name}] {done:,}"
        if total is not None:
            text += f"/{total:,}"
        text += f" {self.what}, {rate:,.0f}/s"
        if total is not None and not finished and done:
            text += f", {(total - done) / rate:,.0f} s left"
        if note:
            text += f"  {note}"
        end = "\n" if finished or not self._live else ""
        print(f"\r\033[K{text}" if self._live else text, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End a line that is rewritten in place."""
        if self._live:
            print(file=sys.stderr)
