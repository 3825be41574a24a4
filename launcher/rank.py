"""`python -m launcher.rank TICKET`: one rank, as any launcher starts it.

The ticket (`launcher.ticket`) holds the command and its environment. This process stands beside the
rank: it finds its place in the launcher's variables, keeps its output in a file, records who it is
and how it ended, passes signals on, and ends it when another attempt of the run has begun.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# Started by its path, its own folder comes first, whose `secrets` would hide Python's.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launcher import records, supervise
from launcher.rendezvous import rank_place
from launcher.strict import JobError
from launcher.ticket import Ticket

_FENCE_SECONDS = 5.0
# deepspeed's runner is given this one (`launcher.backends.hostfile`), and mpirun would hand it on.
_OF_THE_RUNNER = "DS_ACCELERATOR"


def run(ticket: Ticket) -> int:
    """Start the rank and wait for it; its exit code, as a shell gives it."""
    names = {"MASTER_ADDR": ticket.address, "MASTER_PORT": str(ticket.port)}
    given = {name: value for name, value in names.items() if value not in ("", "0")}
    place = rank_place({**given, **os.environ})
    ranks, attempt = Path(ticket.ranks), ticket.attempt
    look_at = 0.0

    def fenced() -> str | None:
        nonlocal look_at
        if ticket.fenced and time.monotonic() >= look_at:
            look_at = time.monotonic() + _FENCE_SECONDS
            if not records.allowed(ranks, attempt):
                return "another attempt of this run has begun"
        return None

    if (why := fenced()) is not None:
        raise JobError(f"attempt={attempt!r} of {ticket.ranks} must not start: {why}")

    def inherited(name: str) -> bool:
        return name not in supervise.RANK_VARIABLES and name != _OF_THE_RUNNER

    log = records.log(ranks, attempt, place.rank)
    # Or every rank takes every core.
    threads = max(1, len(os.sched_getaffinity(0)) // place.local_world)
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **ticket.env}
    outcome = supervise.run(
        ticket.argv,
        {**env, **place.environment(), "LAUNCHER_ATTEMPT": attempt},
        log,
        ticket.grace_seconds,
        deliver=supervise.to_process,
        watch=fenced,
        started=lambda pid: records.begin(
            ranks, attempt, place.rank, place.world, (pid, os.getpid(), *_launcher())
        ),
        inherit=inherited if ticket.fenced else None,
        tied=True,
    )
    if outcome.ended is not None:
        print(f"rank {place.rank} was ended: {outcome.ended}", file=sys.stderr)
    code = 128 - outcome.code if outcome.code > 128 else outcome.code
    records.end(ranks, attempt, place.rank, code)
    return outcome.code


def main(arguments: Sequence[str]) -> int:
    """Exit code of the rank; 2 where it cannot start."""
    try:
        (name,) = arguments
        return run(Ticket.read(name))
    except FileNotFoundError:
        print(
            f"error: ticket={name!r} is not on this host: `python -m launcher hostfile` leaves it, "
            "and takes it away when the attempt has ended",
            file=sys.stderr,
        )
    except (ValueError, TypeError) as error:
        print(f"error: usage: python -m launcher.rank TICKET ({error})", file=sys.stderr)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def _launcher() -> list[int]:
    """deepspeed's launch.py above this process, which may outlive its ranks for a moment."""
    with suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if b"deepspeed.launcher" in command:
            return [os.getppid()]
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
