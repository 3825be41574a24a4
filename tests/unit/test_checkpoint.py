"""Which checkpoints exist, which are damaged, which are kept: with files of a stand-in engine."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import (
    MARKER,
    TAG,
    CheckpointConfig,
    Checkpointer,
    damage,
    list_committed,
)
from pretrain.errors import CheckpointError


class Files:
    """Writes and reads files as an engine does; ``state`` is all that it holds."""

    def __init__(self, state: str = "") -> None:
        self.state = state

    def save(self, folder: str, tag: str) -> None:
        path = Path(folder) / tag
        path.mkdir()
        (path / "rank0.bin").write_text(self.state)
        (path / "rank1.bin").write_text("the other rank's part")

    def load(self, folder: str, tag: str) -> None:
        self.state = (Path(folder) / tag / "rank0.bin").read_text()


@pytest.fixture
def checkpointer(tmp_path: Path) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep=2))


def save(checkpointer: Checkpointer, *samples: int) -> list[Path]:
    return [checkpointer.save(Files(f"state {n}"), n, {"name": "run"}) for n in samples]  # type: ignore[arg-type]


def restore(checkpointer: Checkpointer) -> tuple[Any, str]:
    engine = Files()
    return checkpointer.restore(engine), engine.state  # type: ignore[arg-type]


def test_what_was_saved_last_is_restored(checkpointer: Checkpointer) -> None:
    save(checkpointer, 16, 8, 900)
    found, state = restore(checkpointer)
    assert state == "state 900" and found.samples == 900
    assert found.run == {"name": "run", "samples": 900, "world_size": 1}


def test_nothing_to_restore(checkpointer: Checkpointer) -> None:
    assert restore(checkpointer) == (None, "")
    assert checkpointer.committed() == []


def test_the_newest_are_kept_by_samples_not_by_name_length(checkpointer: Checkpointer) -> None:
    save(checkpointer, 8, 16, 1_000_000, 24)
    assert [c.samples for c in checkpointer.committed()] == [24, 1_000_000]
    left = sorted(p.name for p in checkpointer.folder.iterdir())
    assert left == ["samples-000000000024", "samples-000001000000"]


def test_a_folder_without_its_marker_is_never_read_and_is_replaced(
    checkpointer: Checkpointer,
) -> None:
    old, new = save(checkpointer, 8, 16)
    (new / MARKER).unlink()
    (new / TAG / "rank0.bin").write_text("half")
    assert [c.samples for c in list_committed(checkpointer.folder)] == [8]
    assert restore(checkpointer)[1] == "state 8"
    save(checkpointer, 16)
    assert restore(checkpointer)[1] == "state 16" and damage(new) is None
    assert old.exists()


def test_what_a_killed_save_left_is_replaced(checkpointer: Checkpointer) -> None:
    aside = checkpointer.folder / ".samples-000000000008.tmp"
    aside.mkdir(parents=True)
    (aside / "rubbish").write_text("x")
    (folder,) = save(checkpointer, 8)
    assert not aside.exists() and not (folder / "rubbish").exists()


def test_an_engine_that_fails_commits_nothing(checkpointer: Checkpointer) -> None:
    class Failing(Files):
        def save(self, folder: str, tag: str) -> None:
            super().save(folder, tag)
            raise OSError(28, "disk full")

    save(checkpointer, 8)
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save(Failing(), 16, {})  # type: ignore[arg-type]
    assert [c.samples for c in checkpointer.committed()] == [8]


def test_a_second_save_at_the_same_count_changes_nothing(checkpointer: Checkpointer) -> None:
    (first,) = save(checkpointer, 8)
    assert checkpointer.save(Files("another state"), 8, {}) == first  # type: ignore[arg-type]
    assert restore(checkpointer)[1] == "state 8"


def test_the_marker_is_written_after_everything_else(
    checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain import storage

    written: list[str] = []
    real = storage.write_bytes

    def write(url: str, data: bytes) -> None:
        if Path(url).name == MARKER:
            assert damage(Path(url).parent) is None, "committed before it was whole"
        written.append(Path(url).name)
        real(url, data)

    monkeypatch.setattr(storage, "write_bytes", write)
    save(checkpointer, 8)
    assert written[-1] == MARKER and written.count(MARKER) == 1


def test_pruning_takes_the_marker_first(
    checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpointer, 8, 16)

    def killed(folder: Path) -> None:
        assert not (folder / MARKER).exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda f, ignore_errors=False: ignore_errors or killed(f))
        save(checkpointer, 24)
    assert [c.samples for c in checkpointer.committed()] == [16, 24]


DAMAGE = {
    "engine/rank1.bin is missing": lambda f: (f / "engine/rank1.bin").unlink(),
    "engine/rank0.bin has 3 bytes, 7 were written": lambda f: os.truncate(
        f / "engine/rank0.bin", 3
    ),
    "engine/rank0.bin has changed": lambda f: (f / "engine/rank0.bin").write_text("state 9"),
    "run.json has changed": lambda f: (f / "run.json").write_text(
        (f / "run.json").read_text().replace('"run"', '"ran"')
    ),
    "manifest.json cannot be read": lambda f: (f / "manifest.json").unlink(),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_damage_names_the_file_and_nothing_is_loaded(checkpointer: Checkpointer, says: str) -> None:
    _, folder = save(checkpointer, 4, 8)
    assert damage(folder) is None
    DAMAGE[says](folder)
    assert says in str(damage(folder))
    engine = Files()
    with pytest.raises(CheckpointError) as caught:
        checkpointer.restore(engine)  # type: ignore[arg-type]
    message = str(caught.value)
    assert says in message and folder.name in message and "delete that folder" in message
    assert engine.state == ""
    shutil.rmtree(folder)  # the remedy that the message gives
    assert restore(checkpointer)[1] == "state 4"


@pytest.mark.parametrize("text", [None, '{"samples": '])
def test_a_run_json_that_cannot_be_read_is_damage_too(
    checkpointer: Checkpointer, text: str | None
) -> None:
    (folder,) = save(checkpointer, 8)
    (folder / "run.json").unlink()
    if text is not None:
        (folder / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        restore(checkpointer)


def test_another_number_of_ranks_is_refused_with_both(checkpointer: Checkpointer) -> None:
    (folder,) = save(checkpointer, 8)
    run = json.loads((folder / "run.json").read_text()) | {"world_size": 4}
    (folder / "run.json").write_text(json.dumps(run))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["run.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"written by 4 ranks and this run has 1; start it"):
        restore(checkpointer)
