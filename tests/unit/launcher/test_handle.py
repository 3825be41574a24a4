"""What is known of a submitted job: the handle, the verbs of the command line, and the truth."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import __main__ as cli
from launcher.backends import slurm
from launcher.handle import Handle, Status, marker_before, truth
from launcher.job import JobError, JobSpec
from launcher.marker import read_marker
from launcher.plan import Plan, PlanFile


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(output: str = "out") -> Plan:
    return Plan("slurm", "demo", output, "log", folder="runs/demo/slurm")


def finish(samples: int) -> None:
    Path("out").mkdir(exist_ok=True)
    Path("out/_FINISHED").write_text(f'{{"samples": {samples}}}')


def test_a_handle_is_read_as_written() -> None:
    for handle in (Handle("slurm", "7"), Handle("slurm", "7", ("now", "{}"))):
        handle.save("runs/demo/slurm")
        assert Handle.load(plan()) == handle
    for broken in ("", "[]", '{"id": 7}', "{"):
        Path("runs/demo/slurm/handle.json").write_text(broken)
        with pytest.raises(JobError, match="was not submitted to slurm from this folder"):
            Handle.load(plan())


def test_success_needs_a_new_end_marker() -> None:
    said = Status("succeeded", 0, "job 7")
    finish(1)
    Handle("slurm", "7", marker_before("out")).save("runs/demo/slurm")
    old = truth(plan(), said)
    assert (old.state, old.code) == ("failed", 1)
    assert old.detail == "job 7 ends without an end marker of this job in out"
    finish(22)
    assert truth(plan(), said) == said
    assert truth(plan(), Status("running")) == Status("running")
    assert truth(plan(), Status("failed", 71)) == Status("failed", 71)
    Path("out/_FINISHED").unlink()
    assert truth(plan(), said).state == "failed"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("/data/run", "output='/data/run' is not on this machine"),
        ("s3://bucket/run", "output='s3://bucket/run' cannot be read (OSError: no network)"),
    ],
)
def test_what_cannot_be_seen_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: str, said: str
) -> None:
    def fail(_: str) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr("launcher.handle.read_marker", fail)
    assert marker_before(output) is None
    assert ("warning: output=" in capsys.readouterr().err) == ("://" in output)
    Handle("slurm", "7").save("runs/demo/slurm")
    status = truth(plan(output), Status("succeeded", 0, "job 7"))
    assert (status.state, status.exit_code()) == ("unknown", 1) and said in status.detail


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *[(Status("queued"), 0), (Status("running"), 0), (Status("succeeded", 0), 0)],
        *[(Status("failed", 71), 71), (Status("failed"), 1), (Status("failed", 0), 1)],
        *[(Status("cancelled", 143), 143), (Status("cancelled"), 1), (Status("unknown"), 1)],
    ],
)
def test_the_exit_code_of_status(status: Status, code: int) -> None:
    assert status.exit_code() == code


def test_files_of_a_plan_are_the_users_alone() -> None:
    Path("x").mkdir()
    Path("x/y").write_text("old")
    Path("x/y").chmod(0o644)
    Plan(
        "slurm", "demo", "o", "l", files=(PlanFile("x/y", "é\n"), PlanFile("a/b", ""))
    ).write_files()
    assert Path("x/y").read_text(encoding="utf-8") == "é\n" and Path("a/b").read_text() == ""
    assert Path("x/y").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Slurm's plan, with verbs that note that they were called."""
    called: list[str] = []
    answers: Iterator[Status] = iter([])

    def status(_: Plan) -> Status:
        called.append("status")
        return next(answers)

    def submit(made: Plan) -> int:
        called.append("submit")
        Handle("slurm", "7", read_marker(made.output)).save(made.folder)
        return 0

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "status", status)
    monkeypatch.setattr(slurm, "logs", lambda _: iter(["one", "two"]))
    monkeypatch.setattr(slurm, "cancel", lambda _: called.append("cancel"))
    monkeypatch.setattr(cli, "_POLL_SECONDS", 0.01)
    Path("job.yaml").write_text("name: demo\nconfig: run.yaml\noutput: out\n")

    def main(*arguments: str, statuses: tuple[Status, ...] = ()) -> int:
        nonlocal answers
        called.clear()
        answers = iter(statuses)
        return cli.main(["slurm", *arguments, "--config", "job.yaml"])

    main.called = called  # type: ignore[attr-defined]
    return main


def test_the_verbs(backend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert backend() == 0 and backend.called == ["submit"]
    assert backend("submit") == 0 and backend.called == ["submit"]
    assert backend("cancel") == 0 and backend.called == ["cancel"]
    assert backend("logs") == 0 and capsys.readouterr().out == "one\ntwo\n"
    assert backend("status", statuses=(Status("running", detail="job 7"),)) == 0
    assert capsys.readouterr().out == "demo: running (job 7)\n"
    assert backend("status", statuses=(Status("failed", 71),)) == 71
    assert capsys.readouterr().out == "demo: failed, exit code 71\n"


def test_waiting_ends_as_the_job_did(backend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    finish(1)
    order = (Status("queued"), Status("running"), Status("failed", 3))
    assert backend("--wait", statuses=order) == 3
    assert backend.called == ["submit", "status", "status", "status"]
    assert backend("--wait", statuses=(Status("running"), Status("succeeded", 0))) == 1  # no marker
    assert "ends without an end marker" in capsys.readouterr().out


def test_a_dry_run_of_any_verb_does_nothing(backend: Any) -> None:
    for verb in cli.VERBS:
        assert backend(verb, "--dry-run") == 0 and backend.called == []


# --- job files ------------------------------------------------------------------------------------


def load(text: str, **given: Any) -> JobSpec:
    from launcher import jobfile

    Path("job.yaml").write_text(text)
    Path("run.yaml").write_text("output: runs/of-the-config\n")
    return jobfile.load("job.yaml", given)


def test_a_job_file_and_what_is_given_with_it() -> None:
    text = "config: run.yaml\noverrides: [a=1]\nenv: {A: '1', B: '1'}\nnodes: 2\n"
    job = load(text, overrides=["b=2"], env={"B": "2"}, secrets={}, nodes=None, name="other")
    assert (job.name, job.nodes, job.output) == ("other", 2, "runs/of-the-config")
    assert job.overrides == ("a=1", "b=2") and dict(job.env) == {"A": "1", "B": "2"}
    assert load(text).name == "job"
    assert load(text, overrides=["output=o"]).output == "o"
    assert load(text, overrides=["output=o"], output="p").output == "p"
    assert load(text + "output: q\n").output == "q"


def test_a_config_of_a_run_is_a_job_of_its_own() -> None:
    job = load("seed: 1\n")
    assert (job.config, job.name, job.output) == ("job.yaml", "job", "runs/job")


def test_a_job_on_a_base() -> None:
    Path("base.yaml").write_text("config: run.yaml\nnodes: 4\nretries: 2\n")
    job = load("base: base.yaml\nnodes: 8\n")
    assert (job.nodes, job.retries, job.config) == (8, 2, "run.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config: run.yaml\nnodez: 1\n", "nodez: unknown field; did you mean 'nodes'?"),
        ("config: run.yaml\nnodes: '2'\n", "nodes='2' must be a whole number"),
        ("config: run.yaml\nenv: [A]\n", "env: "),
        ("config: run.yaml\nenv: {A: 1}\n", "env.A: must be text; put it in quotes"),
        ("config: run.yaml\noverrides: a=1\n", "overrides='a=1' must be a list"),
        ("config: run.yaml\nconfig: [\n", "config='job.yaml' is not valid YAML"),
        ("config: elsewhere.yaml\n", "output is not given, and config='elsewhere.yaml' cannot be"),
        ("config: 3\noutput: x\n", "config=3 must be text"),
        ("3: 4\n", "config='job.yaml' must hold a mapping"),
    ],
)
def test_mistakes_in_a_job_file(text: str, said: str) -> None:
    with pytest.raises(JobError) as refused:
        load(text)
    assert str(refused.value).startswith(said)
