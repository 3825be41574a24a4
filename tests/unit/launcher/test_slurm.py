"""The Slurm backend: its script under a real bash with stand-ins for Slurm, and Slurm's answers.

tests/cluster runs it on a real Slurm.
"""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.backends import slurm
from launcher.handle import Handle, Status
from launcher.job import JobError, JobSpec
from tests.support.programs import Programs, programs

__all__ = ["programs"]  # the fixture


def job(**fields: Any) -> JobSpec:
    return JobSpec(**{"name": "demo", "config": "c.yaml", "output": "runs/demo", **fields})


def directives(asked: JobSpec) -> set[str]:
    lines = slurm.plan(asked).files[0].text.splitlines()
    return {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}


def test_what_is_asked_for() -> None:
    asked = job(
        nodes=2,
        accelerators_per_node=8,
        cores_per_node=96,
        memory_gib_per_node=900,
        time_limit_minutes=60,
        grace_seconds=300,
        backends={"slurm": {"gpu_type": "a100", "partition": "gpu", "constraint": "ib&nvlink"}},
    )
    assert directives(asked) == {
        *("--requeue", "--job-name=demo", "--nodes=2", "--ntasks-per-node=1"),
        *("--gpus-per-node=a100:8", "--cpus-per-task=96", "--mem=900G", "--time=60"),
        *("--signal=B:TERM@300", "--partition=gpu", "--constraint=ib&nvlink"),
        *("--output=runs/demo/slurm/%j.log", "--open-mode=append"),
    }


def test_what_is_not_asked_for() -> None:
    assert directives(job()) == {
        *("--requeue", "--exclusive", "--job-name=demo", "--nodes=1", "--ntasks-per-node=1"),
        *("--output=runs/demo/slurm/%j.log", "--open-mode=append"),
    }


def test_another_folder() -> None:
    plan = slurm.plan(job(environment={"python": "/opt/py/bin/python", "folder": "/shared/it's"}))
    script = "/shared/it's/runs/demo/slurm/job.sbatch"
    assert plan.commands[0][-3:] == ("--chdir", "/shared/it's", script)
    assert plan.files[0].path == script and plan.output == "/shared/it's/runs/demo"
    assert "/opt/py/bin/python -m launcher node --scheduler slurm" in plan.files[0].text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": "x"}, "image='x' has no meaning on slurm; give environment"),
        ({"storage": [{"source": "pvc:x", "path": "/x"}]}, "storage="),
        ({"preemptible": True}, "preemptible=True"),
        ({"backends": {"slurm": {"partitoin": "x"}}}, "did you mean 'partition'"),
        ({"backends": {"slurm": {"partition": "a\nb"}}}, "backends.slurm.partition='a\\nb'"),
        ({"backends": {"slurm": {"max_requeues": -1}}}, "backends.slurm.max_requeues=-1"),
        ({"backends": {"slurm": 3}}, "backends.slurm must be a mapping"),
    ],
)
def test_what_slurm_cannot_do(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as refused:
        slurm.plan(job(**fields))
    assert said in str(refused.value)


# A step: says that it runs, ends with $CODE, or with 75 when it gets USR1 as the ranks do.
SRUN = """#!/bin/bash
trap 'sleep 0.2; exit 75' USR1
trap '' TERM
echo $$ >step
[ -n "${CODE:-}" ] && exit "$CODE"
while :; do sleep 0.05; done
"""
# `scancel --signal=USR1 JOB` reaches the steps, not the batch script.
SCANCEL = '#!/bin/bash\n[ "$*" = "--signal=USR1 7" ] && kill -USR1 "$(cat step)"\n'
SCONTROL = '#!/bin/bash\necho "$*" >>scontrol\n'


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Starts the plan's script in ``tmp_path`` as job 7."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(asked: JobSpec, **env: str) -> "subprocess.Popen[bytes]":
        (tmp_path / "runs/demo/slurm").mkdir(parents=True, exist_ok=True)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", slurm.plan(asked).files[0].text],
            cwd=tmp_path,
            env={"PATH": path, "SLURM_JOB_ID": "7", **env},
        )

    return start


@pytest.mark.parametrize("times", [1, 3])
def test_term_lets_the_step_save_and_requeues(script: Any, tmp_path: Path, times: int) -> None:
    """As Slurm sends it before the time limit and, again, in a requeue."""
    process = script(job())
    while not (tmp_path / "step").exists() or not (tmp_path / "step").read_text():
        time.sleep(0.02)
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait(10) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("code", "fields", "env", "requeues"),
    [
        (0, {}, {}, 0),
        (2, {"retries": 5}, {}, 0),  # a mistake stays one
        (75, {}, {}, 3),
        (75, {"backends": {"slurm": {"max_requeues": 2}}}, {"SLURM_RESTART_COUNT": "2"}, 0),
        (75, {"backends": {"slurm": {"max_requeues": 2}}}, {"SLURM_RESTART_COUNT": "1"}, 3),
        (1, {}, {}, 0),
        (1, {"retries": 2}, {}, 2),
        (71, {"retries": 1}, {}, 1),
    ],
)
def test_which_codes_go_back_into_the_queue(
    script: Any, tmp_path: Path, code: int, fields: Any, env: Any, requeues: int
) -> None:
    """Three attempts that each end with ``code``."""
    ends = [script(job(**fields), CODE=str(code), **env).wait(10) for _ in range(3)]
    assert ends == [0] * requeues + [code] * (3 - requeues)


def test_a_cancelled_job_stays_so(script: Any, tmp_path: Path) -> None:
    (tmp_path / "runs/demo/slurm").mkdir(parents=True)
    (tmp_path / "runs/demo/slurm/7.cancelled").touch()
    assert script(job(retries=3), CODE="75").wait(10) == 75
    assert not (tmp_path / "scontrol").exists()


# --- what Slurm answers ---------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs) -> Any:
    monkeypatch.chdir(tmp_path)
    programs.answer("sbatch", text="42;cluster\n")
    plan = slurm.plan(job())
    assert slurm.submit(plan) == 0
    return plan


def test_submit_leaves_a_handle(submitted: Any, programs: Programs) -> None:
    assert programs.calls()[0]["argv"] == list(submitted.commands[0])
    assert Handle.load(submitted) == Handle("slurm", "42", None)
    assert Path(submitted.files[0].path).stat().st_mode & 0o077 == 0


SHOWN = "JobId=42 JobName=demo UserId=me(1) JobState={} Reason={} ExitCode={} NodeList=a[1-2]\n"


@pytest.mark.parametrize(
    ("state", "reason", "code", "expected"),
    [
        ("PENDING", "Resources", "0:0", Status("queued", None, "job 42: PENDING, Resources")),
        ("RUNNING", "None", "0:0", Status("running", None, "job 42: RUNNING")),
        ("COMPLETED", "None", "0:0", Status("succeeded", 0, "job 42: COMPLETED")),
        (
            "FAILED",
            "NonZeroExitCode",
            "71:0",
            Status("failed", 71, "job 42: FAILED, NonZeroExitCode"),
        ),
        (
            "FAILED",
            "RaisedSignal:9",
            "0:9",
            Status("failed", 137, "job 42: FAILED, RaisedSignal:9"),
        ),
        ("TIMEOUT", "TimeLimit", "0:15", Status("failed", 143, "job 42: TIMEOUT, TimeLimit")),
        ("CANCELLED", "None", "0:15", Status("cancelled", 143, "job 42: CANCELLED")),
    ],
)
def test_status(
    submitted: Any, programs: Programs, state: str, reason: str, code: str, expected: Status
) -> None:
    programs.answer("scontrol", "show", text=SHOWN.format(state, reason, code))
    assert slurm.status(submitted) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CANCELLED by 1000|0:15|None\n", Status("cancelled", 143, "job 42: CANCELLED by 1000")),
        ("NODE_FAIL|1:0|\nNODE_FAIL|1:0|\n", Status("failed", 1, "job 42: NODE_FAIL")),
        ("", Status("unknown", None, "job 42: unknown to Slurm")),
    ],
)
def test_the_status_of_a_job_that_the_controller_has_forgotten(
    submitted: Any, programs: Programs, text: str, expected: Status
) -> None:
    programs.answer("scontrol", text="Invalid job id specified\n", code=1)
    programs.answer("sacct", text=text)
    assert slurm.status(submitted) == expected


def test_cancel_and_logs(submitted: Any, programs: Programs) -> None:
    folder = Path(submitted.folder)
    (folder / "42.node-0.log").write_text("epoch 1\n")
    (folder / "42.log").write_text("back into the queue\n")
    (folder / "41.log").write_text("another job\n")
    assert list(slurm.logs(submitted)) == [
        *(f"==> {folder}/42.log <==", "back into the queue"),
        *(f"==> {folder}/42.node-0.log <==", "epoch 1"),
    ]
    programs.answer("scancel")
    slurm.cancel(submitted)
    assert programs.calls()[-1]["argv"] == ["scancel", "42"]
    assert (folder / "42.cancelled").exists()


def test_what_sbatch_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs
) -> None:
    monkeypatch.chdir(tmp_path)
    programs.answer("sbatch", text="sbatch: error: invalid partition specified: gpu\n", code=1)
    with pytest.raises(JobError, match="exit code 1: sbatch: error: invalid partition"):
        slurm.submit(slurm.plan(job()))
    with pytest.raises(JobError, match="name='demo' was not submitted to slurm from this folder"):
        slurm.status(slurm.plan(job()))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobError, match="program='sbatch' is not installed here"):
        slurm.submit(slurm.plan(job()))
