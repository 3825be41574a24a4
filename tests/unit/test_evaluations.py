"""Evaluators in training: what is wrong with them is told before the first step, and a model that
says NaN costs its metrics alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import config as configs
from pretrain import plugins, train
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError, NonFiniteError
from pretrain.inference import Heads
from pretrain.run_config import EVALUATORS, RunConfig, check_evaluators
from tests.support import ranks, scored
from tests.support.clipset import write_folder

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"steps": 1, "noises": 1, "every_samples": 16}


def config(output: Path, manifest: str, **evaluators: Any) -> RunConfig:
    tree = configs.read_yaml(ROOT / "configs/debug.yaml")
    tree["data"]["tokenizer"] = str(ROOT / tree["data"]["tokenizer"])
    tree["data"]["train"] = str(ROOT / tree["data"]["train"])
    tree["training"] = {"samples": 32, "global_batch": 16, "log_every_samples": 16}
    tree["optimizer"]["warmup_samples"] = 8
    tree["output"] = str(output)
    sets = {"small": manifest}
    tree["evaluators"] = {
        "validation": {"manifest": manifest, "global_batch": 8, "repeats": 1, "every_samples": 16},
        "zero_shot": {**QUICK, "sets": sets},
        "retrieval": {**QUICK, "sets": sets},
        **evaluators,
    }
    return configs.build(RunConfig, tree)


def test_a_set_that_does_not_fit_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("Engine", "build_task", "Loader"):
        monkeypatch.setattr(train, part, None)
    bad = write_folder(tmp_path / "wds", ["0", "0"], classes=["cat"])
    manifest = scored.make_set(tmp_path / "set")
    run = config(tmp_path / "run", manifest, zero_shot={"sets": {"x": bad}})
    beats: list[tuple[str, int]] = []
    watchdog: Any = SimpleNamespace(beat=lambda *phase: beats.append(phase))
    with pytest.raises(DataError, match="'x' has one class, 'cat'"):
        train.Run(run, None, watchdog, None)  # type: ignore[arg-type]
    assert beats and set(beats) == {("check", 0)}


def evaluated(folder: Path, lost: Any) -> dict[str, float]:
    run = config(folder / "run", scored.make_set(folder / "set"))
    tokenizer = Tokenizer(run.data.tokenizer)
    task = train.build_task(run, tokenizer).eval()
    built = {
        name: plugins.load(EVALUATORS, name, "evaluators").build(settings)
        for name, settings in check_evaluators(run.evaluators).items()
    }
    return train.evaluate(task, run, tokenizer, built, list(built), 0, lambda: False, lost)[0]


def test_a_model_that_says_nan_costs_an_evaluators_metrics_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Heads, "embed_images", lambda self, images, *_: torch.full((len(images), 32), torch.nan)
    )
    told: list[str] = []
    metrics = evaluated(tmp_path / "a", lambda name, error: told.append(f"{name}: {error}"))
    assert metrics and all(key.startswith("validation/") for key in metrics)
    assert [text.split(":")[0] for text in told] == ["zero_shot", "retrieval"]
    assert all("12 of 12 image embeddings are not finite" in text for text in told)
    with pytest.raises(NonFiniteError, match="12 of 12 image embeddings"):
        evaluated(tmp_path / "b", None)


@pytest.mark.distributed
def test_training_goes_on_over_an_evaluation_of_nan(tmp_path: Path) -> None:
    """On two ranks, to the end; a warning says what is missing."""
    manifest = scored.make_set(tmp_path / "set")
    found = ranks.run(f"{__name__}:trained", 2, str(tmp_path / "run"), manifest)
    assert [code for code, _ in found] == [0, 0]
    warned = [
        line for line in found[0][1].splitlines() if "WARNING: no metrics of zero_shot" in line
    ]
    assert len(warned) == 2 and "at 16: evaluation set" in warned[0], warned
    assert all("12 of 12 image embeddings are not finite" in line for line in warned)
    lines = (tmp_path / "run/evaluations.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [line["samples"] for line in told] == [16, 32]
    for line in told:
        assert "validation/generate/loss" in line and "retrieval" not in str(line)


def trained(output: str, manifest: str) -> tuple[int, str]:
    """Trains with a head that says NaN: the exit code, and what was said."""
    import io
    from contextlib import redirect_stdout

    inner = Heads.embed_images

    def nan(self: Heads, *arguments: Any) -> torch.Tensor:
        return inner(self, *arguments) * torch.nan

    Heads.embed_images = nan  # type: ignore[method-assign]
    with redirect_stdout(io.StringIO()) as said:
        code = train.train(config(Path(output), manifest))
    return code, said.getvalue()
