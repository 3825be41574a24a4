"""`ckpt` on real checkpoints of a plain engine, as a user types it."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pretrain import ckpt_tools
from pretrain.__main__ import main
from pretrain.checkpoint import CheckpointConfig, Checkpointer, list_committed
from pretrain.parts import Parts
from tests.support.plain import PlainEngine, same


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints; the first is the best by top1."""
    config = {"checkpoint": {"best": {"metric": "zero_shot/x/top1"}}}
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep=5))
    for samples, top1 in ((8, 0.5), (16, 0.25)):
        engine = PlainEngine(seed=samples, half_lives=(16,))
        engine.step()
        facts = {"config": config, "metrics": {"zero_shot/x/top1": top1}}
        checkpointer.save(engine, samples, facts, last=True)  # type: ignore[arg-type]
    return tmp_path


def newest(run: Path) -> Path:
    return run / "checkpoints" / "samples-000000000016"


def damage(run: Path) -> None:
    path = newest(run) / "exp_avg/rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_list_shows_each_with_its_metrics_and_marks_the_best(run, capsys):
    assert main(["ckpt", "list", str(run)]) == 0
    said = capsys.readouterr().out
    assert "8*" in said and "16*" not in said and "top1 0.25" in said
    assert "ema-16 exp_avg exp_avg_sq weights" in said
    assert main(["ckpt", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["samples"], r["ranks"], r["best"]) for r in rows] == [(8, 1, True), (16, 1, False)]


def test_verify_reads_every_byte(run, capsys):
    assert main(["ckpt", "verify", str(run)]) == 0
    damage(run)
    assert main(["ckpt", "verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert "exp_avg/rank-00000.safetensors has changed since it was written" in said
    assert main(["ckpt", "verify", str(run), "--checkpoint", "8"]) == 0
    assert main(["ckpt", "verify", str(run), "--checkpoint", "9"]) == 2
    assert "there are: 8, 16" in capsys.readouterr().err


def test_doctor_finds_and_mends(run, capsys):
    assert main(["ckpt", "doctor", str(run)]) == 0
    damage(run)
    for name in ("samples-000000000024", "samples-000000000032"):
        (run / "checkpoints" / name).mkdir()
    old = time.time() - 7200
    os.utime(run / "checkpoints" / "samples-000000000024", (old, old))
    assert main(["ckpt", "doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert "is damaged: exp_avg" in said and "killed 2 hours ago; --fix: would be deleted" in said
    assert "a resume takes 8 samples" in said
    assert newest(run).exists()  # without --fix nothing is touched
    assert main(["ckpt", "doctor", str(run), "--fix"]) == 1
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    # A save of this hour may be under way: it stays. What was damaged is aside, for another look.
    assert left == ["damaged-samples-000000000016", "samples-000000000008", "samples-000000000032"]
    assert main(["ckpt", "doctor", str(run), "--fix"]) == 1
    assert not (run / "checkpoints" / "damaged-samples-000000000016").exists()


def test_doctor_says_when_a_resume_would_start_anew(run, capsys):
    shutil.rmtree(run / "checkpoints" / "samples-000000000008")
    damage(run)
    assert main(["ckpt", "doctor", str(run)]) == 1
    assert "holds no checkpoint that a resume could take" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_convert_writes_is_a_checkpoint_with_the_same_state(run, tmp_path, ranks):
    to = tmp_path / "other" / "checkpoints" / "samples-000000000016"
    options = ["--to", str(to), "--ranks", str(ranks), "--checkpoint", "16"]
    assert main(["ckpt", "convert", str(run), *options]) == 0
    (found,) = list_committed(to.parent)
    assert found.metric("zero_shot/x/top1") == 0.25 and found.run["world_size"] == ranks
    assert len(list((to / "weights").iterdir())) == ranks
    states = []
    for folder in (to, newest(run)):
        engine = PlainEngine(seed=0, half_lives=(16,))
        engine.load(Parts(folder))
        states.append(engine.state())
    assert same(*states)
    assert next(iter(ckpt_tools.verify(tmp_path / "other")))[1] is None


def test_convert_refuses_a_folder_that_holds_something_and_a_damaged_source(run, tmp_path, capsys):
    assert main(["ckpt", "convert", str(run), "--to", str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err
    damage(run)
    assert main(["ckpt", "convert", str(run), "--to", str(tmp_path / "new")]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["ckpt", "list", str(tmp_path / "nowhere")]) == 2
    assert "has no folder checkpoints" in capsys.readouterr().err


def test_best_is_chosen_by_the_runs_own_metric(run):
    assert ckpt_tools.choose(run, "best").samples == 8 and ckpt_tools.choose(run).samples == 16
