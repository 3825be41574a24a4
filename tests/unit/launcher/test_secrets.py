"""A secret appears in no plan, file, log or process list; the process that needs it has it."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import backends
from launcher.__main__ import main
from launcher.job import JobError, JobSpec
from launcher.secrets import is_secret, resolve
from tests.support.jobs import EXTRA, job
from tests.support.programs import Programs, programs

__all__ = ["programs"]  # the fixture
PLANTED = "planted $ecret's-7f3a"

# A reference to the planted secret as each backend can have one, and what a plan may say of it.
REFERENCES = {
    "kubernetes": "kubernetes:store/key",
    "aws_batch": "aws:arn:aws:secretsmanager:eu-central-1:123456789012:secret:store",
    "gcp_batch": "gcp:projects/my-project/secrets/store/versions/1",
}
LOCALLY = "env:PLANTED"  # everywhere else


def of(name: str, **fields: Any) -> JobSpec:
    """A job whose HF_TOKEN is the planted secret, as ``name`` can have it, and in a file."""
    fields["secrets"] = {"HF_TOKEN": REFERENCES.get(name, LOCALLY), "OTHER": "file:/run/planted"}
    if name == "aws_batch":
        role = "arn:aws:iam::123456789012:role/batch"
        options = EXTRA[name]["backends"][name]
        fields["backends"] = {name: {**options, "execution_role_arn": role}}
    return job(name, **fields)


@pytest.mark.parametrize("name", backends.names())
def test_no_plan_shows_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a value in the environment of who plans, nor one given by mistake."""
    monkeypatch.setenv("PLANTED", PLANTED)
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    plan = backends.load(name).plan(of(name))
    for text in (plan.render(), repr(plan)):
        assert PLANTED not in text and shlex.quote(PLANTED) not in text
        assert REFERENCES.get(name, LOCALLY).partition(":")[2].split("/")[0] in text
        assert "HF_TOKEN" in text and "/run/planted" in text


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize(
    "fields",
    [
        {"env": {"HF_TOKEN": PLANTED}},
        {"env": {"AWS_SECRET_ACCESS_KEY": PLANTED}},
        {"env": {"MLFLOW_TRACKING_URI": f"https://me:{PLANTED.split()[0]}@host"}},
        {"secrets": {"HF_TOKEN": PLANTED}},
        {"secrets": {"HF_TOKEN": f"env:{PLANTED}"}},
        {"secrets": {"HF_TOKEN": f"vault:{PLANTED}"}},
        {"secrets": {"HF_TOKEN": 1}},
        {"overrides": (f"tracking.token={PLANTED}",)},
        {"output": "s3://me:planted@bucket/run"},
    ],
)
def test_a_secret_given_as_a_value_is_refused_unseen(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(JobError) as refused:
        backends.load(name).plan(job(name, **fields))
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize("reference", ["env:A", "kubernetes:a/b", REFERENCES["gcp_batch"]])
def test_a_reference_that_a_backend_cannot_read_is_refused(name: str, reference: str) -> None:
    scheme = reference.partition(":")[0]
    try:
        backends.load(name).plan(job(name, secrets={"HF_TOKEN": reference}))
    except JobError as refused:
        assert f"secrets.HF_TOKEN={reference!r} cannot be read on {name}" in str(refused)
        assert scheme not in REFERENCES.get(name, LOCALLY).partition(":")[0]
    else:
        assert scheme in REFERENCES.get(name, LOCALLY).partition(":")[0]


@pytest.mark.parametrize(
    ("name", "command", "printed"),
    [
        ("slurm", "sbatch", "71\n"),
        ("skypilot", "sky", "submitted\n"),
        ("kubernetes", "kubectl", ""),
    ],
)
def test_a_submission_gives_the_secret_to_its_client_alone(
    name: str,
    command: str,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    programs: Programs,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In its environment: no command line on the machine has it, no file, no line printed.

    sbatch passes its environment on (--export=ALL); `sky --secret NAME` reads it there.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLANTED", PLANTED)
    programs.answer(command, text=printed)
    asked = of(name, output=str(tmp_path / "run")) if name == "slurm" else of(name)
    monkeypatch.setattr(f"launcher.backends.{name}.marker_before", lambda output: None)
    backend = backends.load(name)
    assert backend.submit(backend.plan(asked)) == 0
    calls = programs.calls()
    assert calls[0]["argv"][0] == command
    for call in calls:
        assert not [line for line in call["processes"] if PLANTED in line]
        assert call["processes"], "the stand-in saw no process at all"
        assert (call["env"].get("HF_TOKEN") == PLANTED) == (name != "kubernetes")
    _found_nowhere(tmp_path, besides=programs.folder)
    said = capfd.readouterr()
    assert PLANTED not in said.out + said.err


TOY = """
import json, os, pathlib, sys
lines = []
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        lines.append(path.read_bytes().decode(errors="replace"))
    except OSError:
        pass
assert lines and not [line for line in lines if os.environ["HF_TOKEN"] in line]
assert os.environ["HF_TOKEN"] == os.environ["OTHER"] == os.environ["PLANTED"]
pathlib.Path("run").mkdir(exist_ok=True)
pathlib.Path("run/_FINISHED").write_text(json.dumps({"samples": 1}))
"""


def test_a_local_run_has_the_secret_in_its_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the real submit; the ranks look at every command line of the machine."""
    from launcher.backends import local

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLANTED", PLANTED)
    (tmp_path / "toy.py").write_text(TOY)
    kept = tmp_path.parent / f"{tmp_path.name}-planted"
    kept.write_text(PLANTED + "\n")
    # The launcher in between is tested with the secret too, but costs ten seconds: test_local.py.
    monkeypatch.setattr(local, "_program", lambda command: (sys.executable, "toy.py"))
    (tmp_path / "run.yaml").write_text("seed: 1\noutput: run\n")
    given = ("--secret", "HF_TOKEN=env:PLANTED", "--secret", f"OTHER=file:{kept}")
    assert main(["local", "--config", "run.yaml", *given]) == 0
    _found_nowhere(tmp_path)
    said = capfd.readouterr()
    assert PLANTED not in said.out + said.err
    assert main(["local", "status", "--config", "run.yaml", *given]) == 0
    assert capfd.readouterr().out == "run: succeeded, exit code 0\n"


def test_a_secret_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLANTED", raising=False)
    with pytest.raises(JobError, match=r"secrets\.A='env:PLANTED', but PLANTED is not set here"):
        resolve({"A": "env:PLANTED"})
    with pytest.raises(JobError, match=r"cannot be read \(No such file"):
        resolve({"A": f"file:{tmp_path}/none"})
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match="not UTF-8 text"):
        resolve({"A": f"file:{tmp_path}/bytes"})


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        *[(name, True) for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")],
        *[(name, True) for name in ("DB_PASSWORD", "PGPASSWORD", "WANDB_API_KEY", "my_token")],
        *[(name, True) for name in ("DB_CREDENTIALS", "MYSECRET", "OPENAI_APIKEY")],
        *[(name, False) for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD", "NCCL_DEBUG", "PATH")],
        *[(name, False) for name in ("OMP_NUM_THREADS", "AUTHOR", "PASSES", "MONKEY")],
        *[(name, False) for name in ("GOOGLE_APPLICATION_CREDENTIALS", "AWS_CREDENTIALS_FILE")],
    ],
)
def test_what_looks_like_a_secret(variable: str, expected: bool) -> None:
    assert is_secret(variable) is expected


def _found_nowhere(folder: Path, besides: Path | None = None) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if besides is None or besides not in path.parents]
    assert files
    for path in files:
        text = path.read_bytes()
        for form in (PLANTED, shlex.quote(PLANTED), json.dumps(PLANTED)):
            assert form.encode() not in text, path
