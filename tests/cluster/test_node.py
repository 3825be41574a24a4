"""`python -m launcher node` on two hosts, started as AWS Batch starts it: its variables, the main
node without its own address; one of the two as process 1 of its container."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.host_run import SAMPLES, SETTINGS, learned
from tests.support.hosts import Hosts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800), pytest.mark.soak]

START = 600.0


def nodes(hosts: Hosts, folder: Path, attempt: int) -> "list[subprocess.Popen[bytes]]":
    """Both nodes of a job; the second is process 1 of a pid namespace of its own."""
    command = [sys.executable, "-m", "launcher", "node", "--scheduler", "aws_batch"]
    command += ["--nodes", "2", "--ranks", "1", "--output", str(folder / "run"), "--"]
    command += ["tests.support.host_run", "train", "--config", "configs/debug.yaml"]
    for setting in (*SETTINGS, f"output={folder / 'run'}"):
        command += ["--set", setting]
    started = []
    for index, name in enumerate(hosts.names):
        env = {
            **os.environ,
            "HOST_RUN_DIARY": str(folder / "diary"),
            "HOST_RUN_STEP_SECONDS": "0.3",
            "AWS_BATCH_JOB_ID": f"a1b2#{index}",
            "AWS_BATCH_JOB_ATTEMPT": str(attempt),
            "AWS_BATCH_JOB_NUM_NODES": "2",
            "AWS_BATCH_JOB_NODE_INDEX": str(index),
            "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
        }
        if index:
            env["AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"] = f"{hosts.network}.1"
        container = ["unshare", "-p", "-f", "--mount-proc", "--kill-child"] if index else []
        with open(folder / f"node-{index}.log", "ab") as log:
            # Entering a host's file systems leads to their root.
            argv = hosts.command(name, ["env", "-C", str(ROOT), *container, *command])
            started.append(subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT))
    return started


def test_stopped_and_resumed_and_killed_and_resumed(hosts: Hosts, tmp_path: Path) -> None:
    """SIGTERM to process 1 of one node: both end with 75, and go on where they were. SIGKILL of a
    rank: both end soon, and say which one failed first."""

    def said() -> str:
        return "".join((tmp_path / f"node-{i}.log").read_text()[-3000:] for i in (0, 1))

    def under_way(attempt: int, steps: int) -> "list[subprocess.Popen[bytes]]":
        started = nodes(hosts, tmp_path, attempt)
        diary = tmp_path / "diary" / f"a1b2-{attempt}" / "diary-0.jsonl"
        give_up = time.monotonic() + START
        while not diary.exists() or len(diary.read_text().splitlines()) < steps:
            assert time.monotonic() < give_up and started[0].poll() is None, said()
            time.sleep(0.1)
        return started

    first = under_way(1, 4)
    agent = min(
        int(line.split()[0])
        for line in hosts.processes("node2", "launcher node --scheduler")
        if "unshare" not in line
    )
    began = time.monotonic()
    hosts.signal("node2", agent, signal.SIGTERM)
    assert [p.wait(120) for p in first] == [75, 75], said()
    print(f"75 and 75, {time.monotonic() - began:.1f} s after SIGTERM")
    second = under_way(2, 2)
    (rank,) = (
        int(line.split()[0])
        for line in hosts.processes("node2", "-m tests.support.host_run train")
        if "launcher" not in line
    )
    began = time.monotonic()
    hosts.signal("node2", rank, signal.SIGKILL)
    codes = [p.wait(120) for p in second]
    print(f"{codes}, {time.monotonic() - began:.1f} s after SIGKILL")
    assert codes[0] not in (0, 2, 75) and codes[1] == 137, said()
    assert "rank 1 on node2 failed first, with exit code 137" in said()
    third = nodes(hosts, tmp_path, 3)
    assert [p.wait(START) for p in third] == [0, 0], said()
    assert learned(tmp_path / "diary") == list(range(SAMPLES))
    for name in hosts.names:
        assert hosts.processes(name, "host_run") == []
