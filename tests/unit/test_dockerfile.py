"""The Dockerfile in its form. That it builds and runs was seen by hand (docs/LAUNCH.md)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

TEXT = (ROOT / "Dockerfile").read_text()


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program, "hadolint is missing; run `make env`"
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_it_copies_is_there_and_let_through() -> None:
    """.dockerignore leaves everything out but what it names."""
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [w for m in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.M) for w in m.split()]
    assert copied and all((ROOT / name).exists() and name in allowed for name in copied)


def test_it_runs_as_a_user_that_is_not_root_under_an_init() -> None:
    last = TEXT[TEXT.rindex("\nFROM ") :]
    assert re.search(r"^USER 1\d+:1\d+$", last, re.MULTILINE)
    assert 'ENTRYPOINT ["tini", "--"]' in last and "HEALTHCHECK" in last
    assert re.search(r"^ARG BASE=\S+:\d+\.\d+", TEXT, re.MULTILINE)
