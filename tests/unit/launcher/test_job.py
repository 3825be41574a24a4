"""A job that cannot run says which field, which value, and what to do."""

import re
from typing import Any

import pytest

from launcher.job import JobError, JobSpec

GOOD: dict[str, Any] = {"name": "demo", "config": "configs/debug.yaml", "output": "runs/demo"}


def test_arguments_end_with_the_output() -> None:
    job = JobSpec(**GOOD, overrides=("seed=1", "output_note=x y"))
    assert job.arguments() == (
        *("train", "--config", "configs/debug.yaml"),
        *("--set", "seed=1", "--set", "output_note=x y", "--set", "output=runs/demo"),
    )


def test_a_job_keeps_no_handle_of_its_caller() -> None:
    env = {"A": "1"}
    job = JobSpec(**GOOD, env=env)
    env["A"] = "2"
    assert job.env["A"] == "1"
    with pytest.raises(TypeError):
        job.env["A"] = "3"  # type: ignore[index]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("name", bad)
            for bad in ("", "Demo", "a b", "-a", "a-", "a;b", "a\nb", "$(id)", "a" * 64, "é", None)
        ],
        *[("config", bad) for bad in ("", "a\nb.yaml", "--help", "a\0b", 3)],
        *[("output", bad) for bad in ("", "-o", "a\tb")],
        *[("module", bad) for bad in ("", "pretrain;id", "a-b", ".x", "a..b")],
        *[("nodes", bad) for bad in (0, -1, 1.5, "2", True)],
        *[("ranks_per_node", bad) for bad in (0, 2_000, "2")],
        *[("port", bad) for bad in (80, 70_000)],
        *[("nodes", bad) for bad in (10_001,)],
        *[("accelerators_per_node", bad) for bad in (-1, 8.0, "8")],
        *[("cores_per_node", bad) for bad in (0, 5_000)],
        *[("memory_gib_per_node", bad) for bad in (0, "64G")],
        *[("time_limit_minutes", bad) for bad in (0, "12:00:00")],
        *[("grace_seconds", bad) for bad in (0, 5_000)],
        *[("retries", bad) for bad in (-1, 10)],
        *[("preemptible", bad) for bad in ("yes", 1)],
        *[("image", bad) for bad in ("", "a b", "-x", "$(id)", 3)],
        *[("environment", bad) for bad in ("python", 3)],
        *[("env", bad) for bad in ("A=1", ["A=1"])],
        *[("storage", bad) for bad in ("/data", 3)],
        *[("overrides", (bad,)) for bad in ("seed", "=1", "a b=1", "a=1\nb=2", "--x=1", "a..b=1")],
    ],
)
def test_bad_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(JobError) as error:
        JobSpec(**{**GOOD, field: value})
    shown = value[0] if isinstance(value, tuple) else value
    said = str(error.value)
    if field == "env":  # whose values are never shown
        assert said.startswith("env: ") and "A=1" not in said
    else:
        assert re.match(re.escape(field) + r"(\.0)?=" + re.escape(repr(shown)), said)


def test_a_secret_has_no_place_on_a_command_line() -> None:
    with pytest.raises(JobError, match="environment variable") as error:
        JobSpec(**GOOD, overrides=("tracking.api_key=hunter22",))
    assert "hunter22" not in str(error.value)
    JobSpec(
        **GOOD, overrides=("tokenizer.vocabulary=512", "data.keys_per_shard=3")
    )  # only look like it


def test_a_bad_variable_is_refused_without_showing_it() -> None:
    with pytest.raises(JobError, match="env='A-B'"):
        JobSpec(**GOOD, env={"A-B": "1"})
    for value in ("hunter22\n", "hunter22\ud800", 22):
        with pytest.raises(JobError) as error:
            JobSpec(**GOOD, env={"NOTE": value})
        assert "env.NOTE" in str(error.value) and "22" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nodez": 2}, "nodez: unknown field; did you mean 'nodes'?"),
        ({"xyz": 2}, "xyz: unknown field; there are: accelerators_per_node, backends, "),
        (
            {"environment": {"pyhton": "x"}},
            "environment.pyhton: unknown field; did you mean 'python'",
        ),
        ({"environment": {"python": "-c"}}, "environment.python='-c' would be read as an option"),
        ({"environment": {"folder": ""}}, "environment.folder='' is empty"),
        ({"storage": [{"path": "/x"}]}, "storage.0.source: required, but not given"),
        (
            {"storage": [{"source": "/x", "path": "/x"}]},
            "storage.source='/x' is not usable; give host:",
        ),
        ({"storage": [{"source": "host:/x", "path": "x"}]}, "storage.path='x' must begin with /"),
        (
            {"storage": [{"source": "host:/x", "path": "/x:y"}]},
            "storage.path='/x:y' must begin with",
        ),
        ({"secrets": {"A-B": "env:A"}}, "secrets='A-B' is not usable"),
        ({"env": {"A": "1"}, "secrets": {"A": "env:A"}}, "secrets.A is in env too"),
        (
            {"image": "x", "environment": {"python": "p"}},
            "image='x' and environment are both given",
        ),
        ({"backends": {"slurm": {}, 3: {}}}, "backends.3.[key]=3 must be text"),
    ],
)
def test_what_does_not_fit_together(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as error:
        JobSpec(**{**GOOD, **fields})
    assert str(error.value).startswith(said)


def test_a_job_from_yaml_has_lists() -> None:
    """What YAML gives as lists and mappings is taken, and frozen."""
    job = JobSpec(
        **GOOD,
        command=["train", "--quiet"],
        overrides=["seed=1"],
        storage=[{"source": "host:/x", "path": "/x"}],
        environment={"python": "/py"},
        backends={"slurm": {"qos": "spot"}},
    )
    assert job.command == ("train", "--quiet") and job.overrides == ("seed=1",)
    assert job.storage[0].of("host") == "/x" and job.storage[0].of("pvc") is None
    assert job.environment.python == "/py"
    with pytest.raises(TypeError):
        job.backends["slurm"] = {}  # type: ignore[index]


def test_what_a_node_runs() -> None:
    job = JobSpec(
        **GOOD,
        nodes=2,
        accelerators_per_node=4,
        port=2_345,
        grace_seconds=600,
        environment={"python": "/py"},
        secrets={"B": "file:/b", "A": "env:A"},
    )
    assert job.node_command("slurm") == (
        *("/py", "-m", "launcher", "node", "--scheduler", "slurm", "--nodes", "2", "--ranks", "4"),
        *("--port", "2345", "--grace", "600", "--output", "runs/demo", "--secret", "B=file:/b"),
        *("--", "pretrain", *job.arguments()),
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"DS_ACCELERATOR": "cpu"}),
        ({"accelerators_per_node": 8}, {}),
        ({"accelerators_per_node": 8, "cores_per_node": 96}, {"OMP_NUM_THREADS": "12"}),
        (
            {"cores_per_node": 2, "ranks_per_node": 4, "env": {"DS_ACCELERATOR": "xpu", "A": "1"}},
            {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "xpu", "A": "1"},
        ),
    ],
)
def test_variables_of_a_rank(fields: dict[str, Any], expected: dict[str, str]) -> None:
    assert JobSpec(**GOOD, **fields).variables() == expected
