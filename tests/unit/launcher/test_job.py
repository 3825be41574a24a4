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
        *[("overrides", (bad,)) for bad in ("seed", "=1", "a b=1", "a=1\nb=2", "--x=1", "a..b=1")],
    ],
)
def test_bad_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(JobError) as error:
        JobSpec(**{**GOOD, field: value})
    shown = value[0] if isinstance(value, tuple) else value
    assert re.match(re.escape(f"{field}") + r"(\.0)?=" + re.escape(repr(shown)), str(error.value))


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
