"""Runs a task as a process of its own."""

import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._data.corpus import ROOT
from benchmarks._data.measure import Task


class Failed(Exception):
    """A contestant's process ended with an error; the message is its last lines."""


def run(
    python: str, module: str, task: Task | dict[str, Any], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The result of ``python -m module`` on ``task``.

    Raises:
        Failed: it wrote no result.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "task", Path(folder) / "result"
        given.write_text(json.dumps(task if isinstance(task, dict) else asdict(task)))
        done = subprocess.run(
            [python, "-m", module, str(given), str(result)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode or not result.exists():
            raise Failed(done.stdout[-2000:])
        return dict(json.loads(result.read_text()))
