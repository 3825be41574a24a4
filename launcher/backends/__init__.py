"""One file per place to run: a pure `plan(job) -> Plan`, and thin verbs that take the plan."""

import importlib
import pkgutil
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Protocol, cast

from launcher.handle import Status
from launcher.job import JobError, JobSpec
from launcher.plan import Plan


class Backend(Protocol):
    """What a file of this folder offers. Whoever has the job has the plan, and with it the rest.

    HELP: one line.
    plan: reads the job, and the machine it runs on where that matters; writes and starts nothing.
    submit: does what the plan says, and leaves a handle in the plan's folder; 0 only if the run
        succeeded (or, if it is queued, its submission).
    status: what the scheduler says; `launcher.handle.truth` lays the run's end marker beside it.
    logs: the lines that the job has printed so far, of every node that can be reached.
    cancel: asks the job to stop; a job that has ended is left alone.
    """

    HELP: str

    def plan(self, job: JobSpec) -> Plan: ...

    def submit(self, plan: Plan) -> int: ...

    def status(self, plan: Plan) -> Status: ...

    def logs(self, plan: Plan) -> Iterator[str]: ...

    def cancel(self, plan: Plan) -> None: ...


def names() -> list[str]:
    """Names of the backends there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> Backend:
    """The backend of this name.

    Raises:
        JobError: there is none; the message lists those there are.
    """
    known = names()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise JobError(f"backend={name!r} is unknown{hint} (there are: {', '.join(known)})")
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
