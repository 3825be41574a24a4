"""docs/ADDING_AN_OBJECTIVE.md, done as it stands there, with a copy of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/ADDING_AN_OBJECTIVE.md").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the page's commands need of it."""
    made = tmp_path / "checkout"
    clean = shutil.ignore_patterns("__pycache__")
    for name in ("pretrain", "launcher", "tests", "configs"):
        shutil.copytree(ROOT / name, made / name, ignore=clean)
    for name in ("pyproject.toml", "docs", "data"):
        (made / name).symlink_to(ROOT / name)
    return made


def commands() -> list[list[str]]:
    """The page's indented lines that run Python, in its order."""
    lines = re.findall(r"^    python (.*)$", PAGE, flags=re.MULTILINE)
    return [[sys.executable, *line.split()] for line in lines]


def run(checkout: Path, command: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_walk(checkout: Path, tmp_path: Path) -> None:
    (path,) = re.findall(r"`(pretrain/objectives/\w+\.py)`: ", PAGE)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (checkout / path).write_text(code, encoding="utf-8")

    contract, two_ranks, train = commands()
    passed = re.search(r"(\d+) passed", run(checkout, contract))
    assert passed and int(passed[1]) > 8
    # `-k` there starts every objective's ranks: here it is enough that the new one is among them.
    assert "[palette-0]" in run(checkout, [*two_ranks, "--collect-only"])

    short = "training.samples=32", "evaluators={}", f"output={tmp_path / 'run'}"
    run(checkout, [*train, *(part for text in short for part in ("--set", text))])
    (saved,) = (tmp_path / "run").glob("checkpoints/*/run.json")
    last = json.loads(saved.read_text())["progress"]["last"]
    assert last["palette/loss"] > 0 and last["palette/off"] > 0
