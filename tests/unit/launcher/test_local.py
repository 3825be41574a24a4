"""The local backend: the plan word for word, and submit's verdict on real processes."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import supervise
from launcher.backends import local
from launcher.handle import Handle, Status
from launcher.job import JobError, JobSpec
from launcher.plan import Plan

JOB = JobSpec(
    name="quickstart",
    config="configs/quickstart.yaml",
    output="runs/quickstart",
    overrides=("seed=1",),
)


def test_the_plan_on_a_laptop(repo_root: Path) -> None:
    text = local.plan(JOB, local.Host(cores=8, accelerators=0)).render()
    assert text.splitlines() == [
        "# local: quickstart",
        "# output: runs/quickstart",
        "# log: runs/quickstart/launcher.log",
        "export DS_ACCELERATOR=cpu",
        "export OMP_NUM_THREADS=4",
        f"export PYTHONPATH={shlex.quote(str(repo_root))}",
        "deepspeed --num_gpus 2 --master_port 22021 --no_local_rank --log_level error"
        " --module pretrain train --config configs/quickstart.yaml"
        " --set seed=1 --set output=runs/quickstart",
    ]


@pytest.mark.parametrize(
    ("host", "ranks", "threads"),
    [
        (local.Host(cores=1, accelerators=0), 1, "1"),
        (local.Host(cores=2, accelerators=0), 2, "1"),
        (local.Host(cores=64, accelerators=0), 2, "32"),
        (local.Host(cores=64, accelerators=8), 8, "8"),
        (local.Host(cores=4, accelerators=8), 8, "1"),
    ],
)
def test_ranks_and_threads_follow_the_host(host: local.Host, ranks: int, threads: str) -> None:
    plan = local.plan(JOB, host)
    assert plan.commands[0][:3] == ("deepspeed", "--num_gpus", str(ranks))
    assert dict(plan.env)["OMP_NUM_THREADS"] == threads
    assert ("DS_ACCELERATOR" in dict(plan.env)) == (host.accelerators == 0)


def test_what_the_user_has_set_stays() -> None:
    host = local.Host(8, 0, frozenset({"OMP_NUM_THREADS", "DS_ACCELERATOR"}), python_path="/mine")
    env = dict(local.plan(JOB, host).env)
    assert set(env) == {"PYTHONPATH"}
    assert env["PYTHONPATH"].endswith(":/mine")
    job = JobSpec(
        name="a", config="c", output="o", env={"OMP_NUM_THREADS": "3"}, ranks_per_node=4, port=5000
    )
    plan = local.plan(job, local.Host(8, 0))
    assert dict(plan.env)["OMP_NUM_THREADS"] == "3"
    assert plan.commands[0][1:5] == ("--num_gpus", "4", "--master_port", "5000")


def test_runs_on_one_machine_do_not_share_a_port() -> None:
    other = JobSpec(name="quickstart", config="configs/quickstart.yaml", output="runs/other")
    assert _port(local.plan(JOB)) != _port(local.plan(other))
    assert _port(local.plan(JOB)) == _port(local.plan(JOB))


def test_two_nodes_are_refused() -> None:
    with pytest.raises(JobError, match="nodes=2"):
        local.plan(JobSpec(name="a", config="c", output="o", nodes=2))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": "x"}, "image='x' has no meaning on local; it runs what is installed here"),
        ({"environment": {"python": "/py"}}, "environment="),
        ({"storage": [{"source": "host:/x", "path": "/x"}]}, "storage="),
        ({"time_limit_minutes": 5}, "time_limit_minutes=5"),
        ({"memory_gib_per_node": 5}, "memory_gib_per_node=5"),
        ({"grace_seconds": 60}, "grace_seconds=60 has no meaning on local; it grants 120 s"),
        ({"retries": 1}, "retries=1"),
        ({"preemptible": True}, "preemptible=True"),
    ],
)
def test_what_one_machine_cannot_do_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as refused:
        local.plan(JobSpec(name="a", config="c", output="o", **fields))
    assert str(refused.value).startswith(said)


def test_what_a_job_file_asks_of_this_machine() -> None:
    job = JobSpec(name="a", config="c", output="o", accelerators_per_node=4, cores_per_node=8)
    plan = local.plan(job, local.Host(cores=64, accelerators=8))
    assert plan.commands[0][1:3] == ("--num_gpus", "4")
    assert dict(plan.env)["OMP_NUM_THREADS"] == "2"


def test_a_log_beside_an_output_in_an_object_store() -> None:
    plan = local.plan(JobSpec(name="a", config="c", output="s3://bucket/run"))
    assert plan.log == "runs/a/launcher.log"


RANK = """import os, pathlib, signal, subprocess, sys, time
code = (
    "import os, pathlib, signal, sys, time\\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\\n"
    "pathlib.Path('up').touch()\\n"
    "time.sleep(60)"
)
sys.exit(subprocess.call([sys.executable, "-c", code], env={**os.environ, "LOCAL_RANK": "0"}))
"""
FINISH = (
    "import json, pathlib; pathlib.Path('out/_FINISHED').write_text(json.dumps({'samples': 1}))"
)


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        (FINISH, 0, ""),
        ("print('half done')", 1, "without the end marker"),
        ("print('half done'); raise SystemExit(3)", 3, "exit code 3"),
        (FINISH + "; raise SystemExit(4)", 4, "but a process exited with 4"),
        (
            "print('half done', flush=True); import os; os.kill(os.getpid(), 9)",
            137,
            "exit code 137",
        ),
        (
            "import pathlib; pathlib.Path('out/_FINISHED').write_text('{')",
            1,
            "without the end marker",
        ),
    ],
)
def test_the_verdict(
    tmp_path: Path, monkeypatch: Any, capfd: Any, code: str, expected: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local.submit(_plan(code)) == expected
    err = capfd.readouterr().err
    assert said in err
    assert ("half done" in err) == ("half done" in code)


def test_status_logs_and_cancel(tmp_path: Path, monkeypatch: Any, repo_root: Path) -> None:
    """From another process than the one that submitted; the rank is asked to stop, and is."""
    monkeypatch.chdir(tmp_path)
    plan = replace(_plan(""), folder="out")
    assert local.submit(replace(_plan(FINISH), folder="out")) == 0
    assert local.status(plan) == Status("succeeded", 0)
    assert local.submit(replace(_plan("raise SystemExit(3)"), folder="out")) == 3
    assert local.status(plan) == Status("failed", 3)
    local.cancel(plan)  # it has ended: nothing to do
    process = _submit_in_a_process("print('ready', flush=True); " + RANK, tmp_path, repo_root)
    _wait_for(tmp_path / "up")
    assert local.status(plan).state == "running"
    assert list(local.logs(plan))[-1] == "ready"
    local.cancel(plan)
    assert process.wait(20) == 75
    assert local.status(plan) == Status("failed", 75)
    Handle("local", f"pid {process.pid} 1.0").save("out")  # the id of a process that is gone
    assert local.status(plan).state == "failed"


def test_an_old_marker_is_no_success(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert local.submit(_plan(FINISH)) == 0
    assert local.submit(_plan("pass")) == 1
    assert local.submit(_plan(FINISH)) == 0  # the same text, written again


def test_a_taken_port_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    import socket

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "_PORT_SECONDS", 0.3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JobError, match=f"port={port} is in use"):
            local.submit(local.plan(JobSpec(name="a", config="c", output="o", port=port)))


def test_a_port_that_is_freed_in_time_is_waited_for() -> None:
    """A run that was killed a moment ago holds its port for a little longer."""
    import socket
    import threading

    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    assert not local._is_free(port)
    threading.Timer(0.4, taken.close).start()
    local._check_port(("deepspeed", "--master_port", str(port)))
    assert local._is_free(port)


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match="no-such-program"):
        local.submit(Plan("local", "a", "out", "out/log", (("no-such-program",),)))


# A launcher that dies of signals, two ranks that save before they leave, each with a worker that
# must not be hit.
TREE = """
import os, subprocess, sys
rank = '''
import os, pathlib, signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def save(number, _):
    assert worker.poll() is None
    time.sleep(0.3)
    pathlib.Path("saved" + os.environ["LOCAL_RANK"]).write_text(signal.Signals(number).name)
    worker.kill()
    sys.exit(0)
for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(s, save)
pathlib.Path("ready" + os.environ["LOCAL_RANK"]).touch()
time.sleep(60)
'''
def start(r):
    return subprocess.Popen([sys.executable, "-c", rank], env={**os.environ, "LOCAL_RANK": r})
ranks = [start("0"), start("1")]
sys.exit(max(r.wait() for r in ranks))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_lets_every_rank_save(
    tmp_path: Path, repo_root: Path, number: signal.Signals
) -> None:
    process = _submit_in_a_process(TREE, tmp_path, repo_root)
    _wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert [(tmp_path / f"saved{r}").read_text() for r in (0, 1)] == [number.name] * 2
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}" in err


DEAF = """
import os, pathlib, signal, subprocess, sys, time
for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)
if "LOCAL_RANK" not in os.environ:
    rank = subprocess.Popen([sys.executable, __file__], env={**os.environ, "LOCAL_RANK": "0"})
    pathlib.Path("pid").write_text(str(rank.pid))
    pathlib.Path("ready").touch()
time.sleep(60)
"""


def test_what_does_not_stop_is_killed(tmp_path: Path, monkeypatch: Any) -> None:
    """After the grace, nothing of the group is left, not even what ignores SIGTERM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervise, "_KILL_SECONDS", 0.3)
    (tmp_path / "deaf.py").write_text(DEAF)
    code = "import os, signal, time, pathlib\n"
    code += "while not pathlib.Path('ready').exists(): time.sleep(0.05)\n"
    code += f"time.sleep(0.2)\nos.kill({os.getpid()}, signal.SIGTERM)"
    sender = subprocess.Popen([sys.executable, "-c", code])
    outcome = supervise.run(
        [sys.executable, str(tmp_path / "deaf.py")], {}, tmp_path / "log", grace_seconds=0.3
    )
    sender.wait()
    assert outcome == supervise.Outcome(137, signal.SIGTERM)
    assert not _runs(int((tmp_path / "pid").read_text()))


def test_orphans_of_a_killed_launcher_are_ended(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import os, pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('pid').write_text(str(child.pid))\n"
        "os.kill(os.getpid(), 9)"
    )
    assert supervise.run([sys.executable, "-c", code], {}, tmp_path / "log").code == 137
    assert not _runs(int((tmp_path / "pid").read_text()))


def test_ranks_do_not_inherit_another_launchers_rank(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "7")
    log = tmp_path / "log"
    supervise.run([sys.executable, "-c", "import os; print(os.environ.get('LOCAL_RANK'))"], {}, log)
    assert log.read_text() == "None\n"


TOY = """
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("command"), parser.add_argument("--config")
parser.add_argument("--set", action="append")
args = parser.parse_args()
settings = dict(text.split("=", 1) for text in args.set)
out = pathlib.Path(settings["output"])
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "OMP_NUM_THREADS", "MASTER_PORT")
report = [settings, args.config, {n: os.environ[n] for n in names}]
(out / f"rank{os.environ['RANK']}").write_text(json.dumps(report))
if os.environ["RANK"] == "0" and settings["seed"] == "1":
    (out / "_FINISHED").write_text("{}")
raise SystemExit(0 if settings["seed"] == "1" else 3 * int(os.environ["RANK"]))
"""


@pytest.mark.distributed
@pytest.mark.parametrize(("seed", "expected"), [("1", 0), ("2", 3)])
def test_the_real_deepspeed_launcher(
    tmp_path: Path, monkeypatch: Any, seed: str, expected: int
) -> None:
    """Two ranks get what the plan says, and a rank's exit code comes back."""
    import json

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "toy.py").write_text(TOY)
    hostile = 'it\'s $(touch hacked) "quoted".yaml'
    job = JobSpec(
        name="toy",
        module="toy",
        config=hostile,
        output="out",
        overrides=(f"seed={seed}",),
        ranks_per_node=2,
    )
    plan = local.plan(job, local.Host(cores=2, accelerators=0))
    assert local.submit(plan) == expected
    assert not (tmp_path / "hacked").exists()
    settings, config, env = json.loads((tmp_path / "out" / "rank1").read_text())
    assert (settings, config) == ({"seed": seed, "output": "out"}, hostile)
    assert env == {
        **{
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "LOCAL_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        },
        "MASTER_PORT": str(_port(plan)),
    }


def _plan(code: str) -> Plan:
    command = (sys.executable, "-c", code)
    return Plan("local", "demo", "out", "out/launcher.log", (command,), folder="out")


def _port(plan: Plan) -> int:
    return int(plan.commands[0][plan.commands[0].index("--master_port") + 1])


def _submit_in_a_process(code: str, cwd: Path, root: Path) -> "subprocess.Popen[str]":
    program = (
        "import sys; from launcher.plan import Plan; from launcher.backends import local\n"
        f"command = (sys.executable, '-c', {code!r})\n"
        "plan = Plan('local', 'demo', 'out', 'out/launcher.log', (command,), folder='out')\n"
        "sys.exit(local.submit(plan))"
    )
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=cwd, env=env, stderr=subprocess.PIPE, text=True
    )


def _wait_for(*paths: Path, seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < give_up, f"{paths} did not appear"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
