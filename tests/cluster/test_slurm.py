"""The Slurm backend on a real Slurm of two nodes: what it submits trains, is stopped, requeued and
resumed twice, and completes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import jobfile
from launcher.backends import slurm as backend
from tests.conftest import ROOT, require_programs_now
from tests.support import slurm as slurm_support
from tests.support.host_run import SAMPLES, SETTINGS, learned
from tests.support.slurm import Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

START = 600.0  # seconds that a start may take on a busy machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    require_programs_now(*slurm_support.PROGRAMS)
    if os.geteuid() != 0:
        pytest.skip("needs root, for munge and slurmd")
    with Slurm(tmp_path_factory.mktemp("slurm"), 2) as cluster:
        yield cluster


@pytest.fixture
def job(cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file for it, in the folder from which it is submitted."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    tree = {
        "name": "two-nodes",
        "config": str(ROOT / "configs/debug.yaml"),
        "output": str(tmp_path / "run"),
        "module": "tests.support.host_run",
        "overrides": list(SETTINGS),
        "environment": {"python": sys.executable},
        "nodes": 2,
        "ranks_per_node": 1,
        "cores_per_node": 1,
        "time_limit_minutes": 60,
        "grace_seconds": 120,
        # Names of the two nodes resolve nowhere: both are this machine.
        "env": {
            "MASTER_ADDR": "127.0.0.1",
            "HOST_RUN_DIARY": str(tmp_path / "diary"),
            "HOST_RUN_STEP_SECONDS": "0.3",
        },
        "secrets": {"TEST_TOKEN": "env:TEST_TOKEN"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "SLURM_CONF": cluster.environment["SLURM_CONF"],
        "PYTHONPATH": str(ROOT),
        "TEST_TOKEN": "s3cret-value-of-the-test",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "job.yaml"


def launcher(job: Path, verb: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launcher", "slurm", verb, "--config", str(job)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def until(said: Callable[[], bool], what: Callable[[], Any], seconds: float = START) -> None:
    give_up = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < give_up, what()
        time.sleep(0.1)


def test_slurm_takes_the_plan(cluster: Slurm, job: Path) -> None:
    """As the real controller judges it, by `sbatch --test-only`."""
    plan = backend.plan(jobfile.load(str(job), {}))
    plan.write_files()
    done = subprocess.run(
        ["sbatch", "--test-only", *plan.commands[0][2:]], capture_output=True, text=True
    )
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def test_cancelled(cluster: Slurm, job: Path) -> None:
    """As soon as it is submitted; it does not come back."""
    assert launcher(job, "submit").returncode == 0
    assert launcher(job, "cancel").returncode == 0
    status = launcher(job, "status")
    assert status.returncode != 0 and "two-nodes: cancelled" in status.stdout
    until(lambda: not cluster.run(["squeue", "-h"]).strip(), lambda: cluster.run(["squeue"]), 60)


@pytest.mark.soak
def test_stopped_requeued_and_resumed_twice(cluster: Slurm, job: Path) -> None:
    """SIGTERM to the batch script, as before a time limit: the ranks save, the job goes back into
    the queue and on; each sample is learned from once."""
    submitted = launcher(job, "submit")
    assert submitted.returncode == 0, submitted.stderr
    number = submitted.stdout.split("Slurm job ")[1].split(",")[0]
    diary, run = job.parent / "diary", job.parent / "run"

    def all_said() -> str:
        logs = "\n".join(p.read_text() for p in sorted((run / "ranks").glob("*/*.log")))
        return launcher(job, "logs").stdout[-3000:] + logs[-3000:]

    def field(name: str) -> str:
        shown = cluster.run(["scontrol", "show", "job", "--oneliner", number])
        return dict(w.split("=", 1) for w in shown.split() if "=" in w)[name]

    for restarts, samples in ((0, 12), (1, 28)):
        name = f"{number}-{restarts}"
        until(lambda n=name, s=samples: _learned(diary / n) >= s, all_said)  # type: ignore[misc]
        began = time.monotonic()
        cluster.run(["scancel", "--batch", "--signal=TERM", number])
        until(lambda r=restarts: field("Restarts") == str(r + 1), all_said, 300)  # type: ignore[misc]
        print(f"requeued {time.monotonic() - began:.1f} s after SIGTERM")
        # A requeued job waits for two minutes, so that a broken node does not eat the queue. Within
        # the second in which it was put back, its nodes still refuse its credential.
        until(lambda: field("JobState") == "PENDING", all_said, 60)
        cluster.run(["scontrol", "update", f"jobid={number}", "StartTime=now+2"])
    until(lambda: field("JobState") in ("COMPLETED", "FAILED"), all_said)
    status = launcher(job, "status")
    assert status.returncode == 0 and "two-nodes: succeeded" in status.stdout, all_said()
    assert "node 1 of 2" in launcher(job, "logs").stdout
    assert learned(diary) == list(range(SAMPLES))
    assert len(list(diary.iterdir())) == 3
    for path in job.parent.rglob("*"):
        if path.is_file():
            assert b"s3cret-value" not in path.read_bytes(), path


def _learned(attempt: Path) -> int:
    """Samples that a rank of this attempt has come to."""
    import json

    try:
        lines = (attempt / "diary-0.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["samples"])
    except (OSError, IndexError, ValueError):
        return -1
