"""A missing program skips a test on a laptop and fails it in CI."""

from collections.abc import Callable

import pytest


def test_present_programs_pass(require_programs: Callable[..., None]) -> None:
    require_programs("sh", "ls")


@pytest.mark.parametrize(
    ("ci", "raised"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_a_missing_program(
    require_programs: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    ci: str,
    raised: type[BaseException],
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(raised, match="no-such-program"):
        require_programs("sh", "no-such-program")
