"""Hostile names and values: refused before anything is planned, or they arrive as they are.

Shell scripts of a plan are run by a real bash; for what a service would interpret, its own parser
or its documented rule stands in (named at each reader).
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher import backends
from launcher.job import JobError
from launcher.plan import Plan
from tests.support.jobs import expand, job

FRAGMENTS = [
    *("'", '"', "`touch hacked`", "$(touch hacked)", "$HOME", "${HOME}", "$$", "$$(A)", "$(A)"),
    *(
        "\n",
        "\r",
        "\t",
        "\0",
        "\x1b[31m",
        "\x7f",
        "\\",
        "\\n",
        ";",
        "&&",
        "|",
        "> hacked",
        "#",
        " ",
    ),
    *("--help", "-rf", "=", ": ", "- ", "{}", "%j", "!", "*", "~", "é", "中", "\u2028", "\ud800"),
    *("Ref::x", "null", "yes", "1e3", "@REGISTERED", "../", "EOF", "%s", "{0}", "\N{PILE OF POO}"),
]
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=6).map("".join)

# What arrives: the variables of a rank's process, and the words of `launcher node`.
Arrival = tuple[dict[str, str], list[str]]


def run_by_bash(script: str, tmp_path: Path) -> Arrival:
    """Run ``script`` with programs that write down what they were given, and nothing else."""
    programs = tmp_path / "bin"
    record = tmp_path / "record"
    if not programs.exists():
        programs.mkdir()
        for name in ("srun", "python"):
            text = f'#!/bin/bash\n{{ printf "%s\\0" "$0" "$@"; printf "\\0"; env -0; }} >{record}\n'
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
    record.unlink(missing_ok=True)
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "HOME": "/nowhere"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    words, _, variables = record.read_text(encoding="utf-8").partition("\0\0")
    pairs = (line.partition("=") for line in variables.split("\0") if line)
    return {name: value for name, _, value in pairs}, words.split("\0")


def local(plan: Plan, tmp_path: Path) -> Arrival:
    """The printed plan, pasted into bash as its documentation says."""
    exports = [line for line in plan.render().split("\n") if line.startswith("export ")]
    line = " ".join(["python", shlex.join(plan.commands[0][1:])])
    variables, words = run_by_bash("\n".join([*exports, line]), tmp_path)
    assert words[1:] == list(plan.commands[0][1:])
    assert {name: variables[name] for name, _ in plan.env} == dict(plan.env)
    return variables, words


def slurm(plan: Plan, tmp_path: Path) -> Arrival:
    return run_by_bash(plan.files[0].text, tmp_path)


def skypilot(plan: Plan, tmp_path: Path) -> Arrival:
    return run_by_bash(yaml.safe_load(plan.files[0].text)["run"], tmp_path)


def kubernetes(plan: Plan, _: Path) -> Arrival:
    """PyYAML reads the manifest; expansion by Kubernetes' documented rule."""
    pod = yaml.safe_load(plan.files[-1].text)["spec"]["template"]["spec"]["containers"][0]
    known: dict[str, str] = {}
    for variable in pod["env"]:
        known[variable["name"]] = expand(variable["value"], known)
    return known, [expand(word, known) for word in pod["command"]]


def aws_batch(plan: Plan, _: Path) -> Arrival:
    container = plan.calls[0].arguments()["containerProperties"]
    assert not any("Ref::" in word for word in container["command"])
    return {v["name"]: v["value"] for v in container["environment"]}, container["command"]


def gcp_batch(plan: Plan, _: Path) -> Arrival:
    """Google's own parser of the request."""
    from google.cloud import batch_v1

    request = json.dumps(plan.calls[0].arguments()["job"])
    made = batch_v1.Job.from_json(request, ignore_unknown_fields=False)
    runnable = made.task_groups[0].task_spec.runnables[0]
    container = runnable.container
    return dict(runnable.environment.variables), [container.entrypoint, *container.commands]


READERS: dict[str, Callable[[Plan, Path], Arrival]] = {
    "local": local,
    "slurm": slurm,
    "kubernetes": kubernetes,
    "aws_batch": aws_batch,
    "gcp_batch": gcp_batch,
    "skypilot": skypilot,
}
EVERY = pytest.mark.parametrize("name", sorted(READERS))


def test_every_backend_is_read_here() -> None:
    elsewhere = {"hostfile"}  # starts its ranks itself: test_hostfile.py, tests/cluster
    assert set(backends.names()) - elsewhere == set(READERS)


def hostile(value: str) -> bool:
    """Whether no command line or variable of a job may hold ``value``."""
    return bool(re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value))


@EVERY
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=st.lists(TEXT, min_size=1, max_size=6))
@example(values=["$(touch hacked)", "it's", '"', "-rf", "$$(A)", "é"])
def test_values_arrive_or_are_refused(name: str, values: list[str], tmp_path: Path) -> None:
    fine = [value for value in values if not hostile(value) and "Ref::" not in value]
    for value in set(values) - set(fine):
        if hostile(value):
            with pytest.raises(JobError, match="note"):
                job(name, overrides=(f"note={value}",))
            with pytest.raises(JobError, match="NOTE"):
                job(name, env={"NOTE": value})
    variables = {f"NOTE_{i}": value for i, value in enumerate(fine)}
    overrides = tuple(f"note={value}" for value in fine)
    given = {"skypilot": {"backends": {"skypilot": {"image_folder": str(tmp_path)}}}}
    asked = job(name, env=variables, overrides=overrides, **given.get(name, {}))
    env, words = READERS[name](backends.load(name).plan(asked), tmp_path)
    assert {key: env[key] for key in variables} == variables
    assert [word for word in words if word.startswith("note=")] == list(overrides)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("name", backends.names())
@settings(max_examples=50, deadline=None)
@given(value=TEXT)
def test_a_name_is_plain_or_refused(name: str, value: str) -> None:
    try:
        plan = backends.load(name).plan(job(name, name=value))
    except JobError as refused:
        assert str(refused).startswith("name=")
    else:
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", value) and plan.name == value


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize("value", [f for f in FRAGMENTS if not re.fullmatch("[a-z0-9]+", f)])
def test_options_are_plain_or_refused(name: str, value: str) -> None:
    """No option of a backend carries hostile text into a plan: most forms are closed."""
    options = getattr(backends.load(name), "Options", None)
    if options is None:
        return
    given = dict(job(name).backends.get(name, {}))
    for field, info in options.model_fields.items():
        if info.annotation not in (str, str | None):
            continue
        if (name, field) == ("skypilot", "image_folder"):  # a path, quoted in the script
            continue
        with pytest.raises(JobError, match=rf"^backends\.{name}\.{field}="):
            asked = job(name, backends={name: {**given, field: f"a{value} "}})
            backends.load(name).plan(asked)
