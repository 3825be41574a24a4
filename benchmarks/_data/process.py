"""Runs a contestant as a process of its own, and watches the memory of all its processes."""

import json
import os
import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks._data import tree
from benchmarks._data.corpus import ROOT
from benchmarks._data.measure import Task

SECONDS_BETWEEN_LOOKS = 0.5


class Failed(Exception):
    """A contestant's process ended with an error; the message is its last lines."""


def run(
    python: str, module: str, task: Task | dict[str, Any], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The result of ``python -m module`` on ``task``, with ``peak_rss_mib``: the largest sum of
    resident memory over the process and its descendants (shared pages count in each).

    Raises:
        Failed: it wrote no result.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result, log = (Path(folder) / name for name in ("task", "result", "log"))
        fields = task if isinstance(task, dict) else asdict(replace(task, started=time.time()))
        given.write_text(json.dumps(fields))
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [python, "-m", module, str(given), str(result)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
                stdout=stream,
                stderr=stream,
            )
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree.rss_bytes(process.pid))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if process.returncode or not result.exists():
            raise Failed(log.read_text(errors="replace")[-2000:])
        return {**json.loads(result.read_text()), "peak_rss_mib": peak / (1 << 20)}
