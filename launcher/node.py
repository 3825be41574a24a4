"""`python -m launcher node ... -- MODULE ARGUMENTS...`: what a scheduler without ssh starts on each
node of a job (`JobSpec.node_command`).

It finds the node's place in the scheduler's variables, starts the node's ranks with
`deepspeed --no_ssh`, passes signals on to them, and ends as they end: 75 after a stop, so that the
scheduler starts the job again.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher import init, records, secrets, supervise
from launcher.marker import read_marker
from launcher.monitor import Monitor
from launcher.records import REQUEUE_EXIT_CODE
from launcher.rendezvous import NodePlace, node_place
from launcher.strict import JobError
from launcher.ticket import Ticket, remove

_LOOK_SECONDS = 10.0
_SILENT_SECONDS = 120.0  # without a heartbeat, after which a rank is lost
_LEFT_SECONDS = 30.0  # for this node's ranks to notice that one of another node has failed
_SAVED_SECONDS = 900.0  # to save, after another node has: the scheduler's own grace is shorter


def main(arguments: Sequence[str]) -> int:
    """The exit code of the ranks; 1 where rank 0's node ended well without the run's end marker.

    Raises:
        JobError: the scheduler's variables are incomplete, or a secret cannot be read.
    """
    args = _parser().parse_args(arguments)
    return init.run(lambda: _run(args))


def attempt(env: Mapping[str, str]) -> str:
    """A name for this start of the job, the same on all its nodes."""
    for job, again in _ATTEMPTS:
        if job in env:
            name = f"{env[job].partition('#')[0]}-{env.get(again, '0') or '0'}"
            return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100]
    return "node"


# The job's name, and the number of its start.
_ATTEMPTS = (
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ("AWS_BATCH_JOB_ID", "AWS_BATCH_JOB_ATTEMPT"),
    ("BATCH_JOB_UID", "BATCH_TASK_RETRY_ATTEMPT"),
    ("SKYPILOT_TASK_ID", ""),
)


def _run(args: argparse.Namespace) -> int:
    try:
        place = node_place(os.environ, args.scheduler, args.nodes, args.port)
        values = secrets.resolve(dict(_secret(text) for text in args.secret))
        return _Node(place, args.ranks, args.output, args.command, values, args.grace).run()
    except JobError as error:  # here too: in process 1 this is a child
        print(f"error: {error}", file=sys.stderr)
        return 2


# Slurm signals every process of a step. deepspeed's have no handler and would die of it, and with
# them their ranks; these and what watches them install their own.
_IGNORED = (signal.SIGUSR1,)


class _Node:
    def __init__(
        self,
        place: NodePlace,
        ranks: int,
        output: str,
        command: Sequence[str],
        values: dict[str, str],
        grace_seconds: float,
    ) -> None:
        self.place, self.slots, self.output = place, ranks, output
        self.grace_seconds = grace_seconds
        self.records, self.attempt = records.folder(output), attempt(os.environ)
        # Nodes may share a home.
        self.ticket = f"{self.attempt}-{os.uname().nodename}-{place.rank}-{os.getpid()}"
        argv = (sys.executable, "-u", "-m", *command)
        self._ticket = Ticket(
            str(self.records),
            self.attempt,
            argv,
            values,
            fenced=False,
            grace_seconds=grace_seconds,
        )

    def run(self) -> int:
        """Start the ranks and wait for them."""
        place = self.place
        print(
            f"[launcher] {place.scheduler}: node {place.rank} of {place.nodes}, {self.slots} "
            f"ranks, meeting at {place.address}:{place.port}, attempt {self.attempt}",
            flush=True,
        )
        before = read_marker(self.output) if place.rank == 0 else None
        records.forget_ends(self.records, self.attempt, self._own())
        old = records.ends(
            self.records, self.attempt
        )  # other nodes'; they forget them, perhaps later
        # While the ranks run, `supervise.run` has the signals. One that comes after them, as from
        # srun when another node has ended, must not hide how they ended.
        for number in supervise.STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._ticket.write(self.ticket)
        try:
            with tempfile.NamedTemporaryFile("w", suffix=".hostfile") as hostfile:
                hosts = range(place.nodes)
                hostfile.write("".join(f"node-{n} slots={self.slots}\n" for n in hosts))
                hostfile.flush()
                outcome = supervise.run(
                    self._command(hostfile.name),
                    _environment(),
                    self._log(),
                    self.grace_seconds,
                    watch=self._watch(),
                    ignored=_IGNORED,
                )
        finally:
            remove(self.ticket)
        code = outcome.code
        ended = records.ends(self.records, self.attempt, old)
        own = [e.code for e in ended if e.rank in self._own()]
        if own == [REQUEUE_EXIT_CODE] * self.slots:
            # Whatever befell deepspeed after them: when a node ends with 75, srun terminates the
            # others, whose ranks have saved as well.
            code = REQUEUE_EXIT_CODE
        elif outcome.stopped_by is not None:
            code = code or 128 + outcome.stopped_by
        elif code == 0 and place.rank == 0:
            after = read_marker(self.output)
            if after is None or after == before:
                print("[launcher] the ranks ended without an end marker", file=sys.stderr)
                code = 1
        if outcome.ended is not None:
            print(f"[launcher] was ended: {outcome.ended}", file=sys.stderr, flush=True)
        first = records.first_failure([e for e in ended if e.code != REQUEUE_EXIT_CODE])
        if code not in (0, REQUEUE_EXIT_CODE) and first is not None:
            path = records.log(self.records, self.attempt, first.rank)
            print(
                f"[launcher] rank {first.rank} on {first.host} failed first, with exit code "
                f"{first.exit_code()} ({path}):\n{records.last_words(path)}",
                file=sys.stderr,
                flush=True,
            )
        return code

    def _watch(self) -> Callable[[], str | None]:
        """Sees a rank of this node that hangs, and one of any node that has failed, where the
        output is storage that the nodes share: else only this node's."""
        monitor = Monitor(
            Path(self.output),
            self.records,
            self.attempt,
            _SILENT_SECONDS,
            _LEFT_SECONDS,
            _SAVED_SECONDS,
            own=self._own(),
        )
        look_at = 0.0

        def look() -> str | None:
            nonlocal look_at
            if time.monotonic() < look_at:
                return None
            look_at = time.monotonic() + _LOOK_SECONDS
            return monitor.look()

        return look

    def _own(self) -> range:
        """The ranks of this node."""
        return range(self.place.rank * self.slots, (self.place.rank + 1) * self.slots)

    def _command(self, hostfile: str) -> list[str]:
        place = self.place
        return [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile),
            *("--no_ssh", "--node_rank", str(place.rank), "--master_addr", place.address),
            *("--master_port", str(place.port), "--no_local_rank", "--log_level", "error"),
            *("--module", "launcher.rank", self.ticket),
        ]

    def _log(self) -> Path:
        return self.records / self.attempt / f"node-{self.place.rank:05d}.log"


def _environment() -> dict[str, str]:
    """deepspeed is started in the folder of the code, wherever that is."""
    code = str(Path(__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(part for part in (code, known) if part)}


def _secret(text: str) -> tuple[str, str]:
    name, separator, reference = text.partition("=")
    if not separator:
        raise JobError(f"--secret {name!r} must have the form NAME=file:/path")
    return name, reference


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launcher node", description="Run this node's ranks of a scheduler's job."
    )
    parser.add_argument("--scheduler", help="whose variables tell this node's place")
    parser.add_argument("--nodes", type=int, help="of the job")
    parser.add_argument("--ranks", type=int, default=1, help="on this node (default: 1)")
    parser.add_argument("--port", type=int, help="of the main node")
    parser.add_argument(
        "--grace",
        type=float,
        default=supervise.GRACE_SECONDS,
        metavar="SECONDS",
        help="for the ranks to save after a stop (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, help="folder or URL of the run")
    parser.add_argument("--secret", action="append", default=[], metavar="NAME=file:/path")
    parser.add_argument("command", nargs="+", metavar="MODULE ARGUMENT", help="after --")
    return parser
