"""`python -m launcher.host`: what a host does when it is asked through ssh.

One request comes on standard input, as JSON, and one answer goes to standard output: so nothing of
it stands on a command line. Requests, and what answers them:

    {"do": "ticket", "name": ..., "ticket": {...}}     leave a rank's ticket here
    {"do": "signal", "ranks": ..., "number": 15}       to the ranks of a run on this host
    {"do": "end", "ranks": ..., "grace_seconds": 10}   end what is left of a run on this host
    {"do": "facts", ...}, {"do": "pairs", ...}         see launcher.facts, launcher.pairs
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import records, ticket

_KILL_SECONDS = 10.0


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what ``request`` asks for."""
    asked = request["do"]
    if asked == "ticket":
        ticket.Ticket(**request["ticket"]).write(request["name"])
        return {}
    if asked == "signal":
        return {
            "reached": sum(_ask(record, request["number"]) for record in _here(request["ranks"]))
        }
    if asked == "end":
        left = end(Path(request["ranks"]), request["grace_seconds"])
        if request.get("name"):
            ticket.remove(request["name"])
        return {"ended": left}
    if asked == "facts":
        from launcher import facts

        return facts.gather(request)
    if asked == "pairs":
        from launcher import pairs

        return pairs.measure(request)
    raise ValueError(f"do={asked!r} is unknown")


def end(ranks: Path, grace_seconds: float) -> list[int]:
    """End every recorded process of a run on this host: ask its ranks to stop, then kill.

    Returns:
        Ids of the processes that were there.
    """
    found = list(_here(ranks))
    left = [process for record in found for process in record.alive()]
    if grace_seconds > 0:
        for record in found:
            _ask(record, signal.SIGTERM)
    give_up = time.monotonic() + grace_seconds
    while time.monotonic() < give_up and any(p.alive() for p in left):
        time.sleep(0.1)
    give_up = time.monotonic() + _KILL_SECONDS
    while any(p.alive() for p in left) and time.monotonic() < give_up:
        for process in left:
            _send(process, signal.SIGKILL)
        time.sleep(0.1)
    return sorted({process.pid for process in left})


def _here(ranks: Path | str) -> Iterator[records.Record]:
    """Records of this host whose processes still run."""
    host = os.uname().nodename
    for record in records.read(Path(ranks)):
        if record.host == host and record.alive():
            yield record


def _ask(record: records.Record, number: int) -> bool:
    """Signal what watches the rank, which passes it on; the rank itself if nobody does."""
    rank_itself, watcher = record.processes[:2]
    return _send(watcher, number) or _send(rank_itself, number)


def _send(process: records.Process | None, number: int) -> bool:
    if process is not None and process.alive():
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
            return True
    return False


def main() -> int:
    """Read, do, answer."""
    try:
        reply = answer(json.load(sys.stdin))
    except Exception as error:  # the asker prints it beside the host's name
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
