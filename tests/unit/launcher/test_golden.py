"""Every backend's plan of every preset, word for word."""

import pytest

from launcher import backends
from tests.golden.__main__ import FOLDER, ROOT, plans, text


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
