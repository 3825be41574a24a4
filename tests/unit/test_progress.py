"""Progress in samples: what is due when, and what a person sees."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.progress import Display, Progress


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 70))
def test_due_once_for_each_multiple_that_is_crossed(batches: list[int], every: int) -> None:
    """Batches may change in mid-run; a step that crosses several multiples is due once."""
    progress = Progress()
    for batch in batches:
        before = progress.samples
        progress.advance(batch, refused=False)
        crossed = any(n % every == 0 for n in range(before + 1, progress.samples + 1))
        assert progress.due(every) == crossed


def test_due_at_known_places() -> None:
    progress, due = Progress(), []
    for _ in range(8):
        progress.advance(16, refused=False)
        due.append(progress.samples if progress.due(40) else 0)
    assert [s for s in due if s] == [48, 80, 128]


def test_nothing_is_due_without_an_interval_or_a_step() -> None:
    progress = Progress()
    assert not progress.due(None) and not progress.due(10)
    progress.advance(10, refused=False)
    assert progress.due(10) and not progress.due(None)


def test_a_refused_step_counts_its_samples_but_is_no_step() -> None:
    progress = Progress()
    for refused in (False, True, False):
        progress.advance(8, refused)
    assert (progress.samples, progress.steps, progress.skipped) == (24, 2, 1)
    assert progress.global_batch == 8


def test_it_survives_a_checkpoint() -> None:
    progress = Progress(first={"loss": 2.0}, rejects={"no image": 3}, seconds=1.5)
    progress.advance(8, refused=False)
    stored = json.loads(json.dumps(dataclasses.asdict(progress)))
    again = Progress(**stored)
    assert again == progress and again.due(8)


def test_a_log_line_has_losses_speed_and_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = Display(total=1_000, done=0)
    display.line(400, {"loss": 1.25, "align/loss": 0.5, "lr": 1.0, "images_per_second": 10.0})
    display.say("said")
    display.step(400)
    display.close()
    out = capsys.readouterr().out
    assert "400/1,000 samples" in out and "align 0.500" in out and "lr" not in out
    assert "10.0 img/s" in out and "1:00 left" in out and out.endswith("said\n")


def test_only_rank_0_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    display = Display(total=10, done=0)
    display.line(4, {"images_per_second": 1.0})
    display.say("said")
    assert capsys.readouterr().out == ""
