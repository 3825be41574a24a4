"""Every backend's plan of every preset, word for word."""

import shlex

import pytest

from launcher import backends
from launcher.__main__ import main
from tests.golden.__main__ import FOLDER, ROOT, plans, text

COMMAND = "python -m launcher "


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_plans_are_as_they_were() -> None:
    for path, plan in plans():
        assert path.exists(), f"{path} is missing; run: python -m tests.golden"
        assert text(plan) == path.read_text(encoding="utf-8"), (
            f"{path} differs; if this is meant, run: python -m tests.golden"
        )


def test_every_backend_has_a_job_and_every_file_a_plan() -> None:
    kept = {path for path, _ in plans()}
    assert {path.parent.name.partition("-")[0] for path in kept} == set(backends.names())
    assert set(FOLDER.glob("*/*.txt")) == kept


def test_the_commands_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    """Every launcher command of docs/LAUNCH.md gives a plan."""
    lines = (ROOT / "docs" / "LAUNCH.md").read_text(encoding="utf-8").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith(COMMAND)]
    seen = set()
    for words in commands:
        assert main([*words[3:], "--dry-run"]) == 0, words
        seen.add(words[3])
        assert f"{words[3]}:" in capsys.readouterr().out
    assert seen == set(backends.names())
    for name in backends.names():
        assert f"\n## {name}\n" in "\n".join(lines), f"docs/LAUNCH.md has no section {name}"
        options = getattr(backends.load(name), "Options", None)
        for field in options.model_fields if options else ():
            assert f"`{field}`" in "\n".join(lines), f"docs/LAUNCH.md: {name} has {field} too"
