"""Runs the command-line client of a scheduler, and turns what goes wrong into a sentence."""

import os
import subprocess
from collections.abc import Mapping, Sequence

from launcher.strict import JobError

_SECONDS = 120.0  # a scheduler that does not answer by then is down


def call(argv: Sequence[str], env: Mapping[str, str] | None = None, remedy: str = "") -> str:
    """What ``argv`` prints, run with ``env`` added to this environment.

    Raises:
        JobError: there is no such program, it failed, or it gave no answer.
    """
    try:
        done = subprocess.run(
            list(argv),
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except FileNotFoundError:
        raise JobError(
            f"program={argv[0]!r} is not installed here; {remedy or 'install it'}, or submit from "
            "a machine that has it"
        ) from None
    except subprocess.TimeoutExpired:
        raise JobError(
            f"program={argv[0]!r} gave no answer within {_SECONDS:.0f} s; is its service up?"
        ) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise JobError(f"{argv[0]} failed with exit code {done.returncode}: {said}")
    return done.stdout
