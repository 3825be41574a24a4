"""The SkyPilot backend: what its task says, SkyPilot's own reading of it, and `sky`'s answers."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.backends import skypilot
from launcher.handle import Handle
from launcher.job import JobError
from launcher.plan import Plan
from tests.conftest import ROOT
from tests.support.jobs import job
from tests.support.programs import Programs, programs

__all__ = ["programs"]  # the fixture
FULL: dict[str, Any] = {
    "nodes": 3,
    "accelerators_per_node": 8,
    "cores_per_node": 96,
    "memory_gib_per_node": 900,
    "time_limit_minutes": 60,
    "retries": 2,
    "preemptible": True,
    "env": {"NOTE": "it's $(x)"},
    "secrets": {"HF_TOKEN": "env:MINE", "OTHER": "file:/run/other"},
    "storage": [{"source": "s3://sets", "path": "/data"}],
    "backends": {"skypilot": {"accelerator": "A100-80GB"}},
}


def test_what_the_task_says() -> None:
    plan = skypilot.plan(job("skypilot", **FULL))
    task = yaml.safe_load(plan.files[0].text)
    assert task["run"].splitlines() == [
        "cd /work",
        "export NOTE='it'\"'\"'s $(x)'",
        "export OMP_NUM_THREADS=12",
        "exec timeout --preserve-status --kill-after=120 3480 python -m launcher node"
        " --scheduler skypilot --nodes 3 --ranks 8 --output s3://bucket/runs/contract"
        " --secret OTHER=file:/run/other"
        " -- pretrain train --config configs/debug.yaml --set output=s3://bucket/runs/contract",
    ]
    assert task["secrets"] == {"HF_TOKEN": None} and "envs" not in task
    assert plan.secrets == (("HF_TOKEN", "env:MINE"),)
    assert plan.commands[0][-3:] == ("--secret", "HF_TOKEN", plan.files[0].path)


def test_without_an_image_the_folder_goes_along() -> None:
    asked = job("skypilot", image=None, environment={"python": ".venv/bin/python"})
    task = yaml.safe_load(skypilot.plan(asked).files[0].text)
    assert task["workdir"] == "." and "cd " not in task["run"]
    assert ".venv/bin/python -m launcher node" in task["run"]


def test_the_time_limit_lets_the_run_save(tmp_path: Path) -> None:
    """`timeout` as the script calls it, with a real process: TERM first, and its own exit code."""
    run = "trap 'sleep 0.1; exit 75' TERM; while :; do sleep 0.05; done"
    words = ["timeout", "--preserve-status", "--kill-after=10", "0.3", "bash", "-c", run]
    assert subprocess.run(words).returncode == 75


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output": "runs/x"}, "output='runs/x' would be lost"),
        ({"name": "a---b"}, "name='a---b' is not usable"),
        ({"accelerators_per_node": 8}, "accelerators_per_node=8, but SkyPilot asks"),
        ({"storage": [{"source": "pvc:x", "path": "/x"}]}, "storage.source='pvc:x' cannot be"),
        (
            {"storage": [{"source": "s3://x", "path": "/x", "read_only": True}]},
            "storage.read_only=True of '/x'",
        ),
        ({"backends": {"skypilot": {"accelerator": "a b"}}}, "backends.skypilot.accelerator='a b'"),
        ({"backends": {"skypilot": {"setup": ["a\nb"]}}}, "backends.skypilot.setup='a\\nb'"),
    ],
)
def test_what_skypilot_cannot_do(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as refused:
        skypilot.plan(job("skypilot", **fields))
    assert str(refused.value).startswith(said)


# --- SkyPilot itself, in an environment of its own (docs/LAUNCH.md) -------------------------------


def parse(plan: Plan, tmp_path: Path, *secrets: str) -> "subprocess.CompletedProcess[str]":
    python = os.environ.get("SKYPILOT_PYTHON")
    if not python:
        pytest.skip("SKYPILOT_PYTHON is not set: SkyPilot is optional (docs/LAUNCH.md)")
    path = tmp_path / "task.yaml"
    path.write_text(plan.files[0].text, encoding="utf-8")
    script = ROOT / "tests" / "support" / "sky_parse.py"
    env = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return subprocess.run(
        [python, "-P", str(script), str(path), *secrets], env=env, capture_output=True, text=True
    )


def test_skypilot_reads_the_task(tmp_path: Path) -> None:
    plan = skypilot.plan(job("skypilot", **FULL))
    done = parse(plan, tmp_path, "HF_TOKEN=planted")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("PARSED "))
    found = json.loads(line.removeprefix("PARSED "))
    assert found.pop("run") == yaml.safe_load(plan.files[0].text)["run"]
    assert found == {
        "name": "contract",
        "nodes": 3,
        "accelerators": {"A100-80GB": 8},
        "cpus": "96+",
        "memory": "900+",
        "spot": True,
        "image": "registry.example.com/pretrain:1",
        "recovery": {"strategy": None, "max_restarts_on_errors": 2, "recover_on_exit_codes": [75]},
        "secrets": {"HF_TOKEN": "planted"},
        "mounts": {"/data": "s3://sets"},
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [("num_nodes:", "num_node:"), ("use_spot: true", "use_spot: 3"), ("name: c", "name: c c")],
)
def test_skypilot_refuses_another_task(tmp_path: Path, old: str, new: str) -> None:
    plan = skypilot.plan(job("skypilot", **FULL))
    (file,) = plan.files
    text = file.text.replace(old, new, 1)
    assert text != file.text
    changed = Plan("skypilot", "x", "x", "x", files=(type(file)(file.path, text),))
    assert parse(changed, tmp_path, "HF_TOKEN=planted").returncode != 0


# --- what `sky` answers ---------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs) -> Plan:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", "planted")
    monkeypatch.setattr(skypilot, "marker_before", lambda output: None)
    programs.answer("sky", "jobs", "launch", text="Managed job 3 submitted\n")
    plan = skypilot.plan(job("skypilot", **FULL))
    assert skypilot.submit(plan) == 0
    assert Handle.load(plan).id == "contract"
    return plan


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("PENDING", "queued"),
        ("STARTING", "queued"),
        ("RECOVERING", "queued"),
        ("ManagedJobStatus.RUNNING", "running"),
        ("CANCELLING", "running"),
        ("SUCCEEDED", "succeeded"),
        ("CANCELLED", "cancelled"),
        ("FAILED", "failed"),
        ("FAILED_NO_RESOURCE", "failed"),
        ("NEW_WORD", "unknown"),
    ],
)
def test_status(submitted: Plan, programs: Programs, word: str, state: str) -> None:
    """Of the newest job of the name."""
    jobs = [
        {"job_id": 9, "job_name": "other", "status": "FAILED"},
        {"job_id": 2, "job_name": "contract", "status": "FAILED"},
        {"job_id": 3, "job_name": "contract", "status": word, "failure_reason": None},
    ]
    programs.answer("sky", "jobs", "queue", "--output", "json", text=json.dumps(jobs))
    status = skypilot.status(submitted)
    assert (status.state, status.code) == (state, None) and status.detail.startswith("job 3: ")


def test_cancel_and_logs(submitted: Plan, programs: Programs) -> None:
    programs.answer("sky", "jobs", text="one\ntwo\n")
    assert list(skypilot.logs(submitted)) == ["one", "two"]
    skypilot.cancel(submitted)
    assert [call["argv"][2:] for call in programs.calls()[-2:]] == [
        ["logs", "--no-follow", "--name", "contract"],
        ["cancel", "--yes", "--name", "contract"],
    ]
    programs.answer("sky", "jobs", "queue", text="[]")
    assert skypilot.status(submitted).state == "unknown"
