"""Which checkpoints exist, which are damaged, which are kept: real files of a plain engine, on one
rank."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint, storage
from pretrain.checkpoint import (
    MARKER,
    BestConfig,
    CheckpointConfig,
    Checkpointer,
    best,
    damage,
    list_committed,
    read_manifest,
)
from pretrain.errors import CheckpointError
from tests.support.plain import PlainEngine, same

WEIGHTS = "weights/rank-00000.safetensors"


def make(folder: Path, **settings: Any) -> Checkpointer:
    return Checkpointer(folder / "checkpoints", CheckpointConfig(**{"keep": 2, **settings}))


@pytest.fixture
def checkpointer(tmp_path: Path) -> Checkpointer:
    return make(tmp_path)


def save(checkpointer: Checkpointer, *samples: int, **facts: Any) -> list[PlainEngine]:
    """Saves a state of its own at each count; the engines that hold them."""
    engines = []
    for count in samples:
        engine = PlainEngine(seed=count)
        engine.step()
        checkpointer.save(engine, count, {"name": "run", **facts}, last=True)  # type: ignore[arg-type]
        engines.append(engine)
    return engines


def restore(checkpointer: Checkpointer) -> tuple[Any, PlainEngine]:
    engine = PlainEngine(seed=99)
    return checkpointer.restore(engine), engine  # type: ignore[arg-type]


def folder_of(checkpointer: Checkpointer, samples: int) -> Path:
    return checkpointer.folder / f"samples-{samples:012d}"


def test_what_was_saved_last_is_restored(checkpointer):
    *_, newest = save(checkpointer, 16, 8, 900)
    found, engine = restore(checkpointer)
    assert same(engine.state(), newest.state())
    assert found.samples == 900
    assert found.run == {"name": "run", "samples": 900, "world_size": 1}


def test_nothing_to_restore(checkpointer):
    assert restore(checkpointer)[0] is None and checkpointer.committed() == []


def test_the_newest_are_kept_by_samples_not_by_name_length(checkpointer):
    save(checkpointer, 8, 16, 1_000_000, 24)
    assert [c.samples for c in checkpointer.committed()] == [24, 1_000_000]
    assert sorted(p.name for p in checkpointer.folder.iterdir()) == [
        "samples-000000000024",
        "samples-000001000000",
    ]


def test_the_best_is_kept_however_old(tmp_path):
    checkpointer = make(tmp_path, keep=1, best={"metric": "top1"})
    for samples, top1 in [(8, 0.1), (16, 0.5), (24, 0.3), (32, 0.5)]:
        save(checkpointer, samples, metrics={"top1": top1})
    assert [c.samples for c in checkpointer.committed()] == [32]  # the newest of equals
    save(checkpointer, 40, metrics={"top1": 0.2})
    save(checkpointer, 48)
    assert [c.samples for c in checkpointer.committed()] == [32, 48]
    checkpointer.annotate(48, {"top1": 0.9})  # as the last evaluation of a run does
    found = checkpointer.committed()
    for mode, samples in (("max", 48), ("min", 32)):
        chosen = best(found, BestConfig(metric="top1", mode=mode))
        assert chosen is not None and chosen.samples == samples
    assert best(found, BestConfig(metric="novel")) is None and best(found, None) is None
    assert damage(folder_of(checkpointer, 48)) is None


def test_training_goes_on_while_a_checkpoint_is_written(checkpointer, monkeypatch):
    """`save` returns with its file half written; what is written is the state of that moment."""
    go, real = threading.Event(), checkpoint.write_part

    def slowly(*arguments: Any) -> Any:
        assert go.wait(10)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "write_part", slowly)
    engine = PlainEngine(seed=1)
    engine.step()
    before = engine.state()
    checkpointer.save(engine, 8, {})
    engine.step()
    assert not (folder_of(checkpointer, 8) / MARKER).exists()
    go.set()
    checkpointer.finish(last=True)
    assert same(restore(checkpointer)[1].state(), before)
    assert not same(before, engine.state())


def test_in_the_foreground_a_save_returns_with_the_marker(tmp_path):
    checkpointer = make(tmp_path, background=False)
    checkpointer.save(PlainEngine(), 8, {})
    assert (folder_of(checkpointer, 8) / MARKER).exists()


def test_going_back_in_memory_takes_the_last_saved_state(checkpointer):
    engine = PlainEngine(seed=1, half_lives=(16,))
    assert checkpointer.rewind(engine) is None
    engine.step()
    checkpointer.save(engine, 8, {"progress": 8}, last=True)
    before = engine.state()
    engine.step()
    shutil.rmtree(checkpointer.folder)  # memory alone can give it back
    assert checkpointer.rewind(engine) == {"progress": 8, "samples": 8, "world_size": 1}
    assert same(engine.state(), before)


def test_going_back_without_memory_reads_the_newest_checkpoint(tmp_path):
    checkpointer = make(tmp_path, rewind_in_memory=False)
    engine = PlainEngine(seed=1)
    engine.step()
    checkpointer.save(engine, 8, {"progress": 8})
    before = engine.state()
    engine.step()
    found = checkpointer.rewind(engine)
    assert found is not None and found["progress"] == 8 and same(engine.state(), before)


def test_a_folder_without_its_marker_is_never_read_and_is_replaced(checkpointer):
    old, _ = save(checkpointer, 8, 16)
    new = folder_of(checkpointer, 16)
    (new / MARKER).unlink()
    (new / WEIGHTS).write_text("half")
    (new / "rubbish").write_text("x")
    assert [c.samples for c in list_committed(checkpointer.folder)] == [8]
    assert same(restore(checkpointer)[1].state(), old.state())
    (again,) = save(checkpointer, 16)
    assert same(restore(checkpointer)[1].state(), again.state())
    assert damage(new) is None and not (new / "rubbish").exists()


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_in_mid_run_is_a_warning_and_the_next_save_succeeds(
    checkpointer, monkeypatch, capsys
):
    save(checkpointer, 8)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_part", full)
        checkpointer.save(PlainEngine(), 16, {})
        checkpointer.finish()
    assert "No space left on device" in capsys.readouterr().out
    assert [c.samples for c in checkpointer.committed()] == [8]
    assert not folder_of(checkpointer, 16).exists()  # a full disk needs the room
    assert checkpointer.failures == 1
    save(checkpointer, 24)
    assert [c.samples for c in checkpointer.committed()] == [8, 24]


@pytest.mark.parametrize(("last", "policy"), [(True, "warn"), (False, "stop")])
def test_a_full_disk_at_the_end_or_by_policy_stops(tmp_path, monkeypatch, last, policy):
    checkpointer = make(tmp_path, on_failure=policy)
    save(checkpointer, 8)
    monkeypatch.setattr(checkpoint, "write_part", full)
    with pytest.raises(CheckpointError, match=r"No space left.*the checkpoint before it is"):
        checkpointer.save(PlainEngine(), 16, {}, last=last)
        checkpointer.finish()
    assert [c.samples for c in checkpointer.committed()] == [8]


def test_a_second_save_at_the_same_count_changes_nothing(checkpointer):
    (first,) = save(checkpointer, 8)
    checkpointer.save(PlainEngine(seed=5), 8, {}, last=True)
    assert same(restore(checkpointer)[1].state(), first.state())


def test_the_marker_is_written_after_everything_else(checkpointer, monkeypatch):
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


def test_a_file_that_does_not_read_back_is_not_committed(checkpointer, monkeypatch, capsys):
    """A disk that loses bytes: what was written is compared with what is there."""
    real = checkpoint.write_part

    def lossy(folder: Path, *arguments: Any) -> Any:
        from pretrain import parts

        def write(path: Path, *rest: Any) -> Any:
            written = real_write(path, *rest)
            with path.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                last = stream.read(1)
                stream.seek(-1, os.SEEK_END)
                stream.write(bytes([last[0] ^ 1]))
            return written

        real_write = parts.write
        with monkeypatch.context() as patch:
            patch.setattr(parts, "write", write)
            return real(folder, *arguments)

    monkeypatch.setattr(checkpoint, "write_part", lossy)
    checkpointer.save(PlainEngine(), 8, {})
    checkpointer.finish()
    assert "does not read back as it was written" in capsys.readouterr().out
    assert checkpointer.committed() == []


def test_pruning_takes_the_marker_first(checkpointer, monkeypatch):
    save(checkpointer, 8, 16)

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if Path(folder).exists():
            assert not (Path(folder) / MARKER).exists()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        checkpointer.save(PlainEngine(), 24, {})
        checkpointer._save.thread.join()  # type: ignore[union-attr]
    assert folder_of(checkpointer, 8).exists()
    assert [c.samples for c in checkpointer.committed()] == [16, 24]


DAMAGE = {
    "exp_avg/rank-00000.safetensors is missing": lambda f: (
        f / "exp_avg/rank-00000.safetensors"
    ).unlink(),
    "rank-00000.safetensors has 3 bytes": lambda f: os.truncate(f / WEIGHTS, 3),
    "rank-00000.safetensors has changed": lambda f: flip(f / WEIGHTS),
    "run.json has changed": lambda f: (f / "run.json").write_text(
        (f / "run.json").read_text().replace('"run"', '"ran"')
    ),
    "manifest.json cannot be read": lambda f: (f / "manifest.json").unlink(),
    "manifest.json does not list state.json": lambda f: (f / "manifest.json").write_text("{}"),
}


def flip(path: Path) -> None:
    """One bit of the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("says", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(checkpointer, says, capsys):
    before, _ = save(checkpointer, 4, 8)
    folder = folder_of(checkpointer, 8)
    assert damage(folder) is None
    DAMAGE[says](folder)
    assert says in str(damage(folder))
    found, engine = restore(checkpointer)
    assert found.samples == 4 and same(engine.state(), before.state())
    said = capsys.readouterr().out
    assert says in said and folder.name in said
    assert not folder.exists() and (folder.parent / f"damaged-{folder.name}").exists()


def test_by_policy_damage_stops_and_nothing_is_loaded(tmp_path):
    checkpointer = make(tmp_path, on_damage="stop")
    save(checkpointer, 4, 8)
    flip(folder_of(checkpointer, 8) / WEIGHTS)
    engine = PlainEngine(seed=99)
    before = engine.state()
    with pytest.raises(CheckpointError, match="has changed since it was written; delete that"):
        checkpointer.restore(engine)  # type: ignore[arg-type]
    assert same(engine.state(), before)


def test_when_all_are_damaged_a_run_does_not_start_anew_in_silence(checkpointer):
    save(checkpointer, 4, 8)
    for samples in (4, 8):
        flip(folder_of(checkpointer, samples) / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        restore(checkpointer)


@pytest.mark.parametrize("text", [None, '{"samples": '])
def test_a_run_json_that_cannot_be_read_is_damage_too(checkpointer, text):
    save(checkpointer, 8)
    path = folder_of(checkpointer, 8) / "run.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert "run.json" in str(damage(path.parent))
    with pytest.raises(CheckpointError, match="every checkpoint"):
        restore(checkpointer)


def test_ranks_share_the_reading_and_together_read_everything(checkpointer):
    save(checkpointer, 8)
    folder = folder_of(checkpointer, 8)
    for name in json.loads((folder / "manifest.json").read_text()):
        kept = (folder / name).read_bytes()
        flip(folder / name)
        found = [damage(folder, rank, 3) for rank in range(3)]
        assert len([problem for problem in found if problem]) == 1, name
        (folder / name).write_bytes(kept)


def test_a_manifest_that_was_read_once_serves_every_rank(checkpointer):
    save(checkpointer, 8)
    folder = folder_of(checkpointer, 8)
    manifest = read_manifest(folder)
    assert isinstance(manifest, dict)
    name = next(n for n in manifest if n.endswith(".safetensors"))
    flip(folder / name)
    (folder / "manifest.json").unlink()  # nobody reads it again
    found = [damage(folder, rank, 3, manifest) for rank in range(3)]
    assert [problem for problem in found if problem] == [f"{name} has changed since it was written"]
    assert "manifest.json cannot be read" in str(damage(folder, 0, 3, read_manifest(folder)))
