"""Sees that a run which still has processes will not go on: what no exit code tells.

A stopped process, a host that is gone and a cut link all leave the launcher waiting. Their ranks
have in common that their heartbeats (OUTPUT/heartbeats, written by a thread of every rank) stop
changing; and where one rank has ended badly, the others cannot go on without it.
"""

import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import records

_OVER = ("ended", "failed")  # phases of a rank that will write no more heartbeats
_MISSED = 6  # heartbeats, at least: one may be late where a disk is slow
# pdsh's own words about a host whose ssh is gone, while it waits for the others.
_SSH_ENDED = re.compile(rb"^pdsh@\S+: (\S+): ssh exited with exit code (\d+)", re.MULTILINE)


@dataclass
class Monitor:
    """Watches one attempt of a run.

    Attributes:
        output: of the run; ranks, attempt: where its ranks leave their records.
        silent_seconds: without a new heartbeat, after which a rank is lost.
        left_seconds: that the others have to end after one has ended badly.
        log: what the launcher prints, if pdsh is it.
    """

    output: Path
    ranks: Path
    attempt: str
    silent_seconds: float
    left_seconds: float
    log: Path | None = None
    lost: str = ""  # host, if one was seen to be lost
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    _failed_at: float | None = None
    _why: str = ""
    _read: int = 0

    def __post_init__(self) -> None:
        for path in self.output.glob("heartbeats/rank-*.json"):  # of the attempt before
            with suppress(OSError):
                self._seen[path.name] = (path.read_text(encoding="utf-8"), float("inf"))
        if self.log is not None and self.log.exists():
            self._read = self.log.stat().st_size

    def look(self) -> str | None:
        """Why the attempt is to be ended now; None while it goes on."""
        now = time.monotonic()
        silent = self._silent(now)
        if silent is not None:
            return silent
        if self._failed_at is None:
            self._why = self._failure()
            self._failed_at = now if self._why else None
        elif now - self._failed_at > self.left_seconds:
            return f"{self._why}, and other ranks still waited for it {self.left_seconds:.0f} s on"
        return None

    def _silent(self, now: float) -> str | None:
        for path in sorted(self.output.glob("heartbeats/rank-*.json")):
            try:
                text = path.read_text(encoding="utf-8")
                beat: dict[str, Any] = json.loads(text)
            except (OSError, ValueError):
                continue
            known, since = self._seen.get(path.name, ("", 0.0))
            if text != known:
                self._seen[path.name] = (text, now)
                continue
            every = float(beat.get("every_seconds", 5.0))
            limit = max(self.silent_seconds, _MISSED * every)
            if beat.get("phase") not in _OVER and now - since > limit:
                self.lost = str(beat.get("host", ""))
                return (
                    f"rank {beat.get('rank')} on {self.lost} (process {beat.get('pid')}; "
                    f"{beat.get('phase')!r} at {beat.get('samples', 0):,} samples) has written no "
                    f"heartbeat for {now - since:.0f} s"
                )
        return None

    def _failure(self) -> str:
        failed = records.first_failure(records.ends(self.ranks, self.attempt))
        if failed is not None:
            return f"rank {failed.rank} on {failed.host} ended with {failed.exit_code()}"
        if self.log is not None:
            with suppress(OSError), open(self.log, "rb") as file:
                file.seek(self._read)
                found = _SSH_ENDED.search(file.read())
                if found is not None:
                    self.lost = found[1].decode(errors="replace")
                    return f"ssh to {self.lost} ended with exit code {int(found[2])}"
        return ""
