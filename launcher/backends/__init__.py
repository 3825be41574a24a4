"""One file per place to run: HELP, a pure `plan(job) -> Plan`, a thin `submit(plan) -> int`."""

import importlib
import pkgutil
from difflib import get_close_matches
from typing import Protocol, cast

from launcher.job import JobError, JobSpec
from launcher.plan import Plan


class Backend(Protocol):
    """What a file of this folder offers.

    HELP: one line.
    plan: reads the job, and the machine it runs on where that matters; writes and starts nothing.
    submit: does what the plan says; 0 only if the run succeeded (or, if queued, its submission).
    """

    HELP: str

    def plan(self, job: JobSpec) -> Plan: ...

    def submit(self, plan: Plan) -> int: ...


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
