"""What every file of launcher/backends/ keeps, the ones not yet written included."""

import inspect
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher import backends
from launcher.job import JobError
from launcher.plan import Plan
from tests.support.jobs import job

EVERY = pytest.mark.parametrize("name", backends.names())
HOSTILE = [
    "it's",
    'say "x"',
    "$(touch hacked)",
    "`touch hacked`",
    "a; touch hacked",
    "a\ntouch hacked",
    "-rf",
    "a b",
    "*",
]


@EVERY
def test_it_has_the_parts_of_a_backend(name: str) -> None:
    backend = backends.load(name)
    assert backend.HELP and "\n" not in backend.HELP
    for verb in ("plan", "submit", "status", "logs", "cancel"):
        assert callable(getattr(backend, verb))


@EVERY
def test_planning_is_pure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same, no file written, no process started, nobody called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("plan has an effect")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    backend = backends.load(name)
    first, second = backend.plan(job(name)), backend.plan(job(name))
    assert isinstance(first, Plan)
    assert first == second and first.render() == second.render()
    assert list(tmp_path.iterdir()) == []


@EVERY
def test_a_plan_says_what_it_is(name: str) -> None:
    plan = backends.load(name).plan(job(name))
    assert (plan.backend, plan.name) == (name, "contract")
    assert plan.output == "s3://bucket/runs/contract"
    assert plan.commands or plan.calls
    assert all(isinstance(part, str) for command in plan.commands for part in command)
    assert "configs/debug.yaml" in plan.render()


@EVERY
@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("field", ["name", "config", "output", "overrides"])
def test_hostile_text_is_quoted_or_refused(name: str, field: str, hostile: str) -> None:
    """Each command line, read back by a shell's rules, is the argument list that will run.

    What files and calls of a plan make of it: tests/unit/launcher/test_hostile.py.
    """
    value: Any = (f"note={hostile}",) if field == "overrides" else hostile
    try:
        plan = backends.load(name).plan(job(name, **{field: value}))
    except JobError as refused:
        assert str(refused).startswith(field)
        return
    assert "\n" not in hostile
    lines = plan.render().splitlines()
    for command in plan.commands:
        assert list(command) in [shlex.split(line) for line in lines if not line.startswith("#")]


def test_an_unknown_backend_lists_those_there_are() -> None:
    with pytest.raises(JobError, match=rf"there are: .*{backends.names()[0]}"):
        backends.load("mainframe")


def test_local_takes_a_host_that_defaults_to_this_one() -> None:
    """The contract's `plan(job)` is complete without further arguments in every backend."""
    for name in backends.names():
        extra = list(inspect.signature(backends.load(name).plan).parameters.values())[1:]
        assert all(parameter.default is not parameter.empty for parameter in extra), name
