"""What every file in pretrain/commands must keep, and what `python -m pretrain` makes of them."""

import argparse
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import plugins
from pretrain.__main__ import PACKAGE, main
from pretrain.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
NAMES = plugins.names(PACKAGE)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_help_configure_and_run(name: str) -> None:
    module = plugins.load(PACKAGE, name, "command")
    assert isinstance(module.HELP, str) and module.HELP.strip() == module.HELP != ""
    assert "\n" not in module.HELP and not module.HELP.endswith(".")
    assert list(inspect.signature(module.configure).parameters) == ["parser"]
    assert list(inspect.signature(module.run).parameters) == ["args"]
    module.configure(argparse.ArgumentParser())  # twice the same option would raise


@pytest.mark.parametrize("name", NAMES)
def test_its_help_says_what_each_option_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m pretrain {name}" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    plugins.load(PACKAGE, name, "command").configure(parser)
    undocumented = [
        action.option_strings or action.dest
        for action in parser._actions
        if action.required and not action.help and action.dest != "verb"
    ]
    assert not undocumented


def test_the_list_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"    {name} " in out or f"    {name}\n" in out for name in NAMES)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "--confg", "x"]])
def test_a_wrong_call_ends_with_code_2_and_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m pretrain" in capsys.readouterr().err


def test_an_error_a_user_can_mend_is_one_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise DataError(f"shard={args.model!r} is broken; mend it")

    monkeypatch.setattr(plugins.load(PACKAGE, "pull", "command"), "run", fail)
    assert main(["pull", "models:/x", "--out", "y"]) == 2
    assert capsys.readouterr() == ("", "error: shard='models:/x' is broken; mend it\n")


def test_the_code_of_a_command_is_the_code_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugins.load(PACKAGE, "pull", "command"), "run", lambda args: 75)
    assert main(["pull", "models:/x", "--out", "y"]) == 75


def test_the_deepspeed_launchers_own_argument_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugins.load(PACKAGE, "pull", "command"), "run", lambda args: 0)
    assert main(["--local_rank=1", "pull", "models:/x", "--out", "y"]) == 0


def test_a_wrong_path_is_named_without_a_traceback() -> None:
    command = [sys.executable, "-m", "pretrain", "data", "verify", "/none.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "/none.json" in done.stderr
    assert "Traceback" not in done.stderr
