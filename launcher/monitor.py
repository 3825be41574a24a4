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
from launcher.records import REQUEUE_EXIT_CODE

_OVER = ("ended", "failed")  # phases of a rank that will write no more heartbeats
_PAUSE_SECONDS = 45.0  # between two looks, which are seconds apart: this process was suspended
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
        saved_seconds: that they have after one was stopped with its state saved: theirs may be
            under way.
        log: what the launcher prints, if pdsh is it.
        own: the ranks whose heartbeats are looked at; None for all.
        world: ranks that must have begun within begin_seconds; 0 where nobody here starts them all.
    """

    output: Path
    ranks: Path
    attempt: str
    silent_seconds: float
    left_seconds: float
    saved_seconds: float
    log: Path | None = None
    own: range | None = None
    world: int = 0
    begin_seconds: float = 600.0
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _old: list[records.End] = field(default_factory=list)
    _looked: float = field(default_factory=time.monotonic)
    _began: float = field(default_factory=time.monotonic)
    _read: int = 0

    def __post_init__(self) -> None:
        # Schedulers that do not number a job's starts leave this one the folder of the last.
        self._old = records.ends(self.ranks, self.attempt)
        for path in self.output.glob("heartbeats/rank-*.json"):  # of the attempt before
            with suppress(OSError):
                self._seen[path.name] = (path.read_text(encoding="utf-8"), float("inf"))
        if self.log is not None and self.log.exists():
            self._read = self.log.stat().st_size

    def look(self) -> str | None:
        """Why the attempt is to be ended now; None while it goes on."""
        now = time.monotonic()
        if now - self._looked > _PAUSE_SECONDS:
            self._forget(now)
        self._looked = now
        why = self._silent(now) or self._not_begun(now)
        if why is not None:
            return why
        for kind, why, limit in self._failures():
            since = self._since.setdefault(kind, now)
            if now - since > limit:
                return f"{why}, and other ranks still waited for it {limit:.0f} s on"
        return None

    def _forget(self, now: float) -> None:
        """This process was itself suspended, and perhaps the ranks with it: times begin anew."""
        self._since.clear()
        self._began = now
        for name, (text, since) in self._seen.items():
            self._seen[name] = (text, max(since, now))

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
            if self.own is not None and beat.get("rank") not in self.own:
                continue
            every = float(beat.get("every_seconds", 5.0))
            limit = max(self.silent_seconds, _MISSED * every)
            if beat.get("phase") not in _OVER and now - since > limit:
                return (
                    f"rank {beat.get('rank')} on {beat.get('host')} (process {beat.get('pid')}; "
                    f"{beat.get('phase')!r} at {beat.get('samples', 0):,} samples) has written no "
                    f"heartbeat for {now - since:.0f} s"
                )
        return None

    def _not_begun(self, now: float) -> str | None:
        if not self.world or now - self._began <= self.begin_seconds:
            return None
        begun = {record.rank for record in records.read(self.ranks, self.attempt)}
        missing = [str(rank) for rank in range(self.world) if rank not in begun]
        if not missing:
            self.world = 0  # nothing more to look for
            return None
        names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        return (
            f"{len(missing)} of {self.world} ranks ({names}) have not begun "
            f"{now - self._began:.0f} s after the start"
        )

    def _failures(self) -> list[tuple[str, str, float]]:
        """What the others cannot go on without, and how long they have: one that ended badly, and
        one that was stopped in order."""
        found = [
            (f"rank {e.rank} on {e.host} ended with {e.exit_code()}", e.code)
            for e in records.ends(self.ranks, self.attempt, self._old)
            if e.code
        ]
        if self.log is not None:
            with suppress(OSError), open(self.log, "rb") as file:
                file.seek(self._read)
                for match in _SSH_ENDED.finditer(file.read()):
                    host, code = match[1].decode(errors="replace"), int(match[2])
                    found.append((f"ssh to {host} ended with exit code {code}", code))
        bad = [why for why, code in found if code != REQUEUE_EXIT_CODE]
        saved = [why for why, code in found if code == REQUEUE_EXIT_CODE]
        kinds = (("bad", bad, self.left_seconds), ("saved", saved, self.saved_seconds))
        return [(kind, whys[0], limit) for kind, whys, limit in kinds if whys]
