"""Runs a job on hosts that ssh reaches: attempts, until one succeeds or none is allowed any more.

What deepspeed and pdsh say is not believed (a killed pdsh ends with 0 and leaves its ranks): every
rank records how it ended (`launcher.rank`), `launcher.monitor` sees the ranks that hang, and what
is left on a host is ended by its recorded process ids, before each attempt and after it.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import records, remote, supervise
from launcher.handle import marker_before
from launcher.launch import Launch
from launcher.monitor import Monitor
from launcher.plan import Plan
from launcher.records import REQUEUE_EXIT_CODE
from launcher.restarts import Restarts

UNREACHABLE_EXIT_CODE = 69  # EX_UNAVAILABLE
WRONG_EXIT_CODE = 2  # of the trainer: an error that comes again
# Names of variables that go from here to every rank, in the ticket: no command line holds them.
_PASSED = ("AWS_", "DS_", "GLOO_", "GOOGLE_", "HF_", "MLFLOW_", "NCCL_", "OMP_", "TORCH_", "UCX_")
# What deepspeed, ssh, Open MPI and MPICH need themselves. deepspeed would put MLFLOW_*, UCX_* and
# NCCL_* on a command line.
_KEPT = {"HOME", "LANG", "LOGNAME", "PATH", "SHELL", "SSH_AUTH_SOCK", "TMPDIR", "USER"}
_KEPT_BEGINNINGS = ("LC_", "OMPI_", "PRTE_", "HYDRA_")
_ASK_SECONDS = 60.0
_END_SECONDS = 10.0  # for ranks that cannot save any more: one of them is gone
_LEFT_SECONDS = 20.0  # for the ranks that wait for one that ended badly, until they notice


def variables(launch: Launch, values: dict[str, str]) -> dict[str, str]:
    """Of every rank: what goes along from here, the job's own, and its secrets' ``values``."""
    passed = {n: v for n, v in os.environ.items() if n.startswith(_PASSED)}
    return {**passed, **launch.env, **values}


class Attempts:
    """One submission: attempts until one succeeds, or none is allowed any more."""

    def __init__(self, plan: Plan, launch: Launch, values: dict[str, str]) -> None:
        # deepspeed is started in the folder of the code, which may be another than this one.
        self.plan, self.launch = plan, replace(launch, folder=str(Path(launch.folder).absolute()))
        self.env = variables(launch, values)
        self.ranks = records.folder(launch.output)
        self.before = marker_before(plan.output)
        self.tried = False  # a host that was there may come back; one that never was is a mistake
        self.restarts = Restarts(launch.retries, launch.options["backoff_seconds"])
        self.min_nodes = launch.options["min_nodes"] or len(launch.hosts)

    def run(self) -> int:
        """The exit code; see `launcher.backends.hostfile.submit`."""
        with supervise.stop_signals() as pending:
            return self._attempts(pending)

    def _attempts(self, pending: list[signal.Signals]) -> int:
        while True:
            code, again = self._attempt()
            if not again or pending:
                return REQUEUE_EXIT_CODE if pending and again else code
            if code != REQUEUE_EXIT_CODE and not self.restarts.take():
                _say(f"no restart is left (retries={self.launch.retries})")
                return code
            wait = self.restarts.wait_seconds()
            _say(f"starts again in {wait:.0f} s; restarts left after that: {self.restarts.left}")
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and not pending:
                time.sleep(0.1)
            if pending:
                return REQUEUE_EXIT_CODE

    def _attempt(self) -> tuple[int, bool]:
        """Exit code, and whether it is worth another attempt."""
        # What an attempt before left is healthy, where its launcher was killed: it may save.
        self._end(list(self.launch.hosts), self.launch.grace_seconds)
        attempt = records.next_attempt(self.ranks)
        records.allow(self.ranks, attempt)
        hosts = self._prepare(attempt)
        if len(hosts) < self.min_nodes:
            self._end(hosts, 0.0)  # their tickets: nothing was started
            records.allow(self.ranks, "")
            return UNREACHABLE_EXIT_CODE, self.tried
        self.tried = True
        _say(f"attempt {attempt} on {', '.join(hosts)}")
        Path(self.launch.folder, "hostfile").write_text(self.launch.hostfile(hosts))
        log = Path(self.plan.log)
        options = self.launch.options
        pdsh = log if options["launcher"] == "pdsh" else None
        monitor = Monitor(
            Path(self.launch.output),
            self.ranks,
            attempt,
            options["silent_seconds"],
            _LEFT_SECONDS,
            self.launch.grace_seconds,
            pdsh,
            world=sum(self.launch.hosts[host] for host in hosts),
        )
        outcome = supervise.run(
            (
                self.launch.python,
                "-m",
                "deepspeed.launcher.runner",
                *self.launch.command(hosts)[1:],
            ),
            dict(self.plan.env),
            log,
            self.launch.grace_seconds,
            deliver=lambda _, number: self._signal(hosts, number),
            watch=monitor.look,
            inherit=lambda name: name in _KEPT or name.startswith(_KEPT_BEGINNINGS),
            cwd=self.launch.code,
        )
        broken = outcome.ended is not None or records.ends(self.ranks, attempt)
        self._end(hosts, _END_SECONDS if broken else self.launch.grace_seconds)
        records.allow(self.ranks, "")
        return self._verdict(attempt, hosts, outcome)

    def _prepare(self, attempt: str) -> list[str]:
        """Leave the tickets; the hosts that have theirs."""
        launch = self.launch
        request = {
            "do": "ticket",
            "name": launch.ticket,
            "ticket": {
                "ranks": str(self.ranks),
                "attempt": attempt,
                "argv": launch.argv,
                "env": self.env,
                "address": launch.options["main_address"] or "",
                "port": launch.port,
                "grace_seconds": launch.grace_seconds,
            },
        }
        ready = []
        for host, reply in self._ask(list(launch.hosts), request).items():
            if "unreachable" in reply:
                _say(
                    f"host {host} is not reachable ({reply['unreachable']}); see that "
                    f"`ssh {host} true` works without a question, or set min_nodes"
                )
            elif "error" in reply:
                _say(f"host {host} cannot run the job: {reply['error']}")
            else:
                ready.append(host)
        if ready and not launch.options["main_address"]:
            request["ticket"]["address"] = ready[0]  # type: ignore[index]
            if launch.options["launcher"] != "pdsh":
                self._ask(ready, request)
        return ready

    def _signal(self, hosts: list[str], number: signal.Signals) -> bool:
        request = {"do": "signal", "ranks": str(self.ranks), "number": int(number)}
        return any(reply.get("reached") for reply in self._ask(hosts, request).values())

    def _end(self, hosts: list[str], grace_seconds: float) -> None:
        request = {
            "do": "end",
            "ranks": str(self.ranks),
            "grace_seconds": grace_seconds,
            "name": self.launch.ticket,
        }
        for host, reply in self._ask(hosts, request, grace_seconds).items():
            if reply.get("ended"):
                _say(f"host {host}: ended what was left: {', '.join(map(str, reply['ended']))}")

    def _ask(
        self, hosts: list[str], request: dict[str, Any], more_seconds: float = 0.0
    ) -> dict[str, dict[str, Any]]:
        return remote.ask(
            self.launch.reach, dict.fromkeys(hosts, request), _ASK_SECONDS + more_seconds
        )

    def _verdict(
        self, attempt: str, hosts: list[str], outcome: supervise.Outcome
    ) -> tuple[int, bool]:
        ended = records.ends(self.ranks, attempt)
        world = sum(self.launch.hosts[host] for host in hosts)
        after = marker_before(self.plan.output)
        finished = after is not None and after != self.before
        codes = {e.code for e in ended}
        if finished and len(ended) == world and codes == {0}:
            _say(f"run {self.plan.name!r} is complete")
            return 0, False
        if ended and codes <= {0, REQUEUE_EXIT_CODE}:
            stopped = outcome.stopped_by.name if outcome.stopped_by else "a signal on its hosts"
            _say(f"was stopped by {stopped}, its state is saved; the same command continues it")
            return REQUEUE_EXIT_CODE, outcome.stopped_by is None
        if outcome.stopped_by is not None and not records.read(self.ranks, attempt):
            _say(f"was stopped by {outcome.stopped_by.name} before any rank had begun")
            return REQUEUE_EXIT_CODE, False
        if outcome.ended:
            _say(f"was ended: {outcome.ended}")
        first = records.first_failure([e for e in ended if e.code != REQUEUE_EXIT_CODE])
        code = outcome.code or 1
        if first is not None:
            path = records.log(self.ranks, attempt, first.rank)
            how = f"signal {-first.code}" if first.code < 0 else f"exit code {first.code}"
            _say(f"rank {first.rank} on {first.host} failed first, with {how} ({path}):")
            print(records.last_words(path), file=sys.stderr)
            code = first.exit_code()
        missing = world - len(ended)
        if missing:
            _say(f"{missing} of {world} ranks left no word of their end")
        if finished:
            _say("rank 0 wrote its end marker all the same")
        if outcome.stopped_by is not None:
            return code, False
        return code, code != WRONG_EXIT_CODE


def _say(text: str) -> None:
    print(f"[launcher] {text}", file=sys.stderr, flush=True)
