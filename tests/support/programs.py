"""Programs that stand in for a scheduler's client: what they were given is written down.

They are no schedulers: they show what this project sends, and what it makes of an answer.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """\
#!{python} -IS
import json, os, pathlib, sys
folder, name = pathlib.Path({folder!r}), pathlib.Path(sys.argv[0]).name
lines = []
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        lines.append(path.read_bytes().decode(errors="replace"))
    except OSError:
        pass
call = {{"argv": [name, *sys.argv[1:]], "env": dict(os.environ), "processes": lines}}
calls = folder / "calls"
calls.mkdir(exist_ok=True)
(calls / f"{{len(list(calls.iterdir())):03d}}").write_text(json.dumps(call))
answers = json.loads((folder / "answers.json").read_text())
for words, (text, code) in answers:
    if words == [name, *sys.argv[1:]][:len(words)]:
        print(text, end="", file=sys.stderr if code else sys.stdout)
        sys.exit(code)
"""


@dataclass
class Programs:
    """A folder of stand-ins, first on PATH."""

    folder: Path

    def answer(self, *words: str, text: str = "", code: int = 0) -> None:
        """What a command that begins with ``words`` prints, and its exit code. The first fits."""
        path = self.folder / "answers.json"
        answers = json.loads(path.read_text())
        path.write_text(json.dumps([[list(words), [text, code]], *answers]))
        program = self.folder / words[0]
        program.write_text(_PROGRAM.format(python=sys.executable, folder=str(self.folder)))
        program.chmod(0o755)

    def calls(self) -> list[dict[str, Any]]:
        """argv, env and the command lines of all processes at each call so far, in order."""
        found = sorted((self.folder / "calls").glob("*"))
        return [json.loads(path.read_text()) for path in found]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "answers.json").write_text("[]")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Programs(folder)
