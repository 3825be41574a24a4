"""The plan over a hostfile, the monitor and the budget; tests/cluster/test_hosts.py runs it."""

import itertools
import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import records
from launcher.backends import hostfile
from launcher.job import JobError, JobSpec
from launcher.monitor import Monitor
from launcher.restarts import Restarts


def job(hosts: Any = ("node1 slots=4", "node2 slots=4"), **fields: Any) -> JobSpec:
    options = {"hosts": hosts, **fields.pop("options", {})}
    given = {"name": "demo", "config": "c.yaml", "output": "runs/demo", "nodes": 2}
    return JobSpec(**{**given, "backends": {"hostfile": options}, **fields})


def test_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode1 slots=4\n\nnode2 slots=8  # new\nnode3\n")
    plan = hostfile.plan(job(str(path), secrets={"HF_TOKEN": "env:HF_TOKEN"}))
    assert plan.files[0].text == "node1 slots=4\nnode2 slots=8\n"
    (command,) = plan.commands
    assert command[:3] == ("deepspeed", "--hostfile", "runs/demo/hostfile/hostfile")
    assert ("--launcher", "pdsh") in itertools.pairwise(command)
    assert command[-3:-1] == ("--module", "launcher.rank")
    assert "ServerAliveInterval=5" in dict(plan.env)["PDSH_SSH_ARGS_APPEND"]
    assert plan.secrets == (("HF_TOKEN", "env:HF_TOKEN"),)
    assert plan.files[0].text == hostfile.plan(job(path.read_text().splitlines())).files[0].text
    (command,) = hostfile.plan(job(options={"launcher": "openmpi"})).commands
    assert "openmpi" in command and command[-3:-1] == ("--module", "launcher.rank")
    (command,) = hostfile.plan(job(options={"launcher": "mpich"})).commands
    assert "mpich" in command and command[-2] == f"{Path.cwd()}/launcher/rank.py"


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_nothing_of_a_job_stands_on_a_command_line(value: str, override: str) -> None:
    """Whatever it is: deepspeed's words go through shells on every host."""
    try:
        asked = job(env={"NOTE": value}, overrides=[f"note={override}"])
    except JobError:
        return
    plan = hostfile.plan(asked)
    (command,) = plan.commands
    assert all(shlex.quote(word) == word for word in command)
    assert command == hostfile.plan(job()).commands[0]
    assert json.loads(plan.files[1].text)["argv"][-3] == f"note={override}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hosts": "/none"}, "backends.hostfile.hosts='/none' cannot be read"),
        ({"hosts": ["node1"]}, "nodes=2, but backends.hostfile.hosts lists 1 hosts"),
        ({"hosts": ["node1", "node1"]}, "'node1' must be a new host's name"),
        ({"hosts": ["node1", "-oProxyCommand=x"]}, "must be a new host's name"),
        ({"hosts": ["node1", "a; reboot"]}, "must be a new host's name"),
        ({"options": {"launcher": "rsh"}}, "launcher='rsh' must be one of pdsh, openmpi, mpich"),
        ({"options": {"min_nodes": 3}}, "min_nodes=3 must be from 1 to 2"),
        ({"options": {"main_address": "a b"}}, "main_address='a b'"),
        ({"environment": {"folder": "/my code"}, "output": "/x"}, "environment.folder='/my code'"),
        ({"environment": {"folder": "/srv"}}, "output='runs/demo' would be one folder here"),
        ({"image": "x"}, "image='x' has no meaning on hostfile"),
        ({"secrets": {"X": "gcp:projects/p/secrets/s/versions/1"}}, "cannot be read on hostfile"),
    ],
)
def test_what_cannot_be_run(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as refused:
        hostfile.plan(job(**fields))
    assert said in str(refused.value)


def beat(output: Path, number: int, rank: int = 0, phase: str = "step") -> None:
    path = output / "heartbeats" / f"rank-{rank:05d}.json"
    path.parent.mkdir(exist_ok=True)
    tree = {"rank": rank, "host": "node1", "pid": 7, "phase": phase, "samples": number}
    path.write_text(json.dumps({**tree, "every_seconds": 0.01, "time": number}))


def monitor(folder: Path, **fields: Any) -> Monitor:
    return Monitor(folder, folder / "ranks", "0001", 0.3, 0.1, 0.5, **fields)


def test_a_rank_that_is_silent(tmp_path: Path) -> None:
    """One that ended is not, and what the attempt before left is not looked at."""
    beat(tmp_path, 1, rank=0)
    one = monitor(tmp_path)
    beat(tmp_path, 1, rank=1)
    beat(tmp_path, 1, rank=2, phase="ended")
    give_up = time.monotonic() + 0.6
    for number in range(1_000):
        said = one.look()
        if said is not None or time.monotonic() > give_up:
            break
        beat(tmp_path, number, rank=3)
        time.sleep(0.02)
    assert said is not None and said.startswith("rank 1 on node1 (process 7; 'step' at 1 samples)")


def test_a_rank_that_failed_and_others_that_wait(tmp_path: Path) -> None:
    records.end(tmp_path / "ranks", "0001", 2, 1)  # of a start before: Kubernetes numbers none
    one = monitor(tmp_path)
    assert one.look() is None
    time.sleep(0.15)
    assert one.look() is None
    records.end(tmp_path / "ranks", "0001", 1, -9)
    assert one.look() is None  # the others may notice by themselves
    time.sleep(0.15)
    assert "ended with 137, and other ranks still waited" in str(one.look())


def test_after_one_has_saved_the_others_have_longer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    one = monitor(tmp_path, log=log)
    records.end(tmp_path / "ranks", "0001", 1, 75)
    log.write_text("pdsh@head: node2: ssh exited with exit code 75\n")
    assert one.look() is None
    time.sleep(0.2)
    assert one.look() is None
    time.sleep(0.4)
    assert "rank 1 on" in str(one.look()) and "ended with 75" in str(one.look())
    two = monitor(tmp_path)
    records.end(tmp_path / "ranks", "0001", 1, 75)
    records.end(tmp_path / "ranks", "0001", 0, 1)  # a failure counts from when it is seen
    assert two.look() is None
    time.sleep(0.15)
    assert "rank 0 on" in str(two.look()) and "ended with 1," in str(two.look())


def test_only_a_nodes_own_ranks_are_watched(tmp_path: Path) -> None:
    one = monitor(tmp_path, own=range(2, 4))
    for rank in (1, 2):
        beat(tmp_path, 1, rank=rank)
    assert one.look() is None
    time.sleep(0.4)
    assert str(one.look()).startswith("rank 2 on node1")


def test_ranks_that_never_begin(tmp_path: Path) -> None:
    """As under an mpirun that waits for its helper on a host that has none."""
    one = monitor(tmp_path, world=3, begin_seconds=0.2)
    records.begin(tmp_path / "ranks", "0001", 1, 3, [])
    assert one.look() is None
    time.sleep(0.25)
    assert str(one.look()).startswith("2 of 3 ranks (0, 2) have not begun")
    for rank in (0, 2):
        records.begin(tmp_path / "ranks", "0001", rank, 3, [])
    assert one.look() is None


def test_a_monitor_that_was_suspended_begins_anew(tmp_path: Path) -> None:
    one = monitor(tmp_path)
    beat(tmp_path, 1)
    records.end(tmp_path / "ranks", "0001", 1, 1)
    assert one.look() is None
    time.sleep(0.4)
    one._looked -= 60.0
    assert one.look() is None
    time.sleep(0.4)
    assert one.look() is not None


def test_a_host_whose_ssh_is_gone(tmp_path: Path) -> None:
    """pdsh says so, and waits for the others; what it said in the attempt before is over."""
    log = tmp_path / "log"
    log.write_text("pdsh@head: node9: ssh exited with exit code 255\n")
    one = monitor(tmp_path, log=log)
    assert one.look() is None
    with log.open("a") as file:
        file.write("node1: x\npdsh@head: node2: ssh exited with exit code 255\n")
    assert one.look() is None
    time.sleep(0.15)
    assert "ssh to node2 ended with exit code 255" in str(one.look())


def test_the_budget() -> None:
    restarts = Restarts(3, 4.0)
    waits = []
    while restarts.take():
        waits.append(restarts.wait_seconds())
    assert len(waits) == 3
    for wait, middle in zip(waits, (4, 8, 16), strict=True):
        assert 0.75 * middle <= wait <= 1.25 * middle
