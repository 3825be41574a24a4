"""`python -m launcher`, up to the plan."""

from pathlib import Path

import pytest

from launcher.__main__ import main


@pytest.fixture(autouse=True)
def _configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("seed: 1\noutput: runs/from-base\n")
    (tmp_path / "configs" / "Sub_run.v2.yaml").write_text("base: tiny.yaml\nseed: 2\n")


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["local", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    text = dry(capsys, "--config", "configs/tiny.yaml", "--ranks", "3", "--set", "a.b=c d")
    assert text.startswith("# local: tiny\n")
    assert "deepspeed --num_gpus 3" in text
    assert "train --config configs/tiny.yaml --set 'a.b=c d' --set output=runs/from-base\n" in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ((), "runs/from-base"),  # inherited
        (("--set", "output=runs/x", "--set", "output=runs/set"), "runs/set"),
        (("--set", "output=runs/set", "--output", "runs/option"), "runs/option"),
    ],
)
def test_where_the_output_comes_from(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], output: str
) -> None:
    text = dry(capsys, "--config", "configs/Sub_run.v2.yaml", *arguments)
    assert text.startswith("# local: sub-run-v2\n")
    assert text.count("output=") == 1 and f"--set output={output}\n" in text


def test_a_config_without_output_runs_under_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare.yaml").write_text("seed: 1\n")
    assert "--set output=runs/bare\n" in dry(capsys, "--config", "bare.yaml")


def test_secrets_are_given_by_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "hunter22")
    given = ("--secret", "AWS_SECRET_ACCESS_KEY=env:MY_KEY", "--env", "PLAIN=1")
    text = dry(capsys, "--config", "configs/tiny.yaml", *given)
    assert "hunter2" not in text
    assert "# secret: AWS_SECRET_ACCESS_KEY from env:MY_KEY\n" in text
    assert "export PLAIN=1\n" in text


@pytest.mark.parametrize(
    "given",
    [
        ("--env", "AWS_SECRET_ACCESS_KEY=hunter22"),
        ("--env", "MLFLOW_TRACKING_URI=https://me:hunter22@host"),
        ("--secret", "AWS_SECRET_ACCESS_KEY=hunter22"),
        ("--output", "s3://me:hunter22@host/run"),
        ("--set", "data.train=https://me:hunter22@host/x"),
    ],
)
def test_a_secret_itself_is_refused_unseen(
    capsys: pytest.CaptureFixture[str], given: tuple[str, str]
) -> None:
    assert main(["local", "--config", "configs/tiny.yaml", *given]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "secret" in said.err
    assert "hunter22" not in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("loca", "--config", "configs/tiny.yaml"), "did you mean 'local'? (there are: "),
        (("local", "--config", "none.yaml"), "config='none.yaml' cannot be read"),
        (("local", "--config", "configs"), "config='configs' cannot be read"),
        (("local", "--config", "list.yaml"), "must hold a mapping"),
        (("local", "--config", "circle.yaml"), "includes itself"),
        (("local", "--config", "configs/tiny.yaml", "--ranks", "0"), "ranks_per_node=0"),
        (("local", "--config", "configs/tiny.yaml", "--nodes", "2"), "nodes=2"),
        (("local", "--config", "configs/tiny.yaml", "--set", "seed"), "overrides='seed'"),
        (("local", "--config", "configs/tiny.yaml", "--env", "SECRET"), "--env 'SECRET' must have"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "circle.yaml").write_text("base: circle.yaml\n")
    assert main([*arguments, "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and "Traceback" not in err


def test_help_lists_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "local        run on this machine" in capsys.readouterr().out
