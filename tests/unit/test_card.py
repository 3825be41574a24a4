"""The model card: of which weights the scores are, what is public, what is said of missing data."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain import card
from pretrain.ckpt_tools import choose
from pretrain.config import build
from pretrain.results import Finished, Folder, Model, Scorecard
from pretrain.run_config import RunConfig
from tests.support.scored import SAMPLES, make_run

SECRET = "http://user:hunter2@mlflow.internal:5000"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = make_run(
        tmp_path_factory.mktemp("card") / "run",
        tracking={"kind": "none", "uri": SECRET},
        ema={"half_lives": [500]},
    )
    lines = [
        {"samples": 80, "validation/align/loss": 9.0},
        {"samples": SAMPLES, "validation/align/loss": 1.5, "zero_shot/a/top1": 0.5},
        {"samples": SAMPLES, "zero_shot/a/chance": 0.1},
    ]
    (output / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = Model("diffdis-debug", str(output), "samples-160", SAMPLES, "ema-500")
    entry = {"settings": {}, "key": "k", "seconds": 1.0, "ranks": 1, "files": [], "details": None}
    entries = (
        Finished(name="kid", evaluator="generation", metrics={"kid": 0.2, "fid": None}, **entry),
        Finished(name="zs", evaluator="zero_shot", metrics={"top1": 0.6}, **entry),
    )
    (output / "scorecard").mkdir()
    Folder(output / "scorecard").write(Scorecard("s", scored, entries))
    return output


def made(run: Path, kind: str, **changes: Any) -> dict[str, Any]:
    checkpoint = choose(run)
    config = build(RunConfig, {**checkpoint.run["config"], **changes})
    return card.make(run, config, checkpoint, kind, 1000)


def test_scores_are_of_the_weights_that_are_exported(run: Path) -> None:
    trained = made(run, "weights")
    assert trained["metrics"] == {
        "validation/align/loss": 1.5,
        "zero_shot/a/top1": 0.5,
        "zero_shot/a/chance": 0.1,
    }
    assert trained["ema_half_life_samples"] is None
    assert trained["limits"][-1] == (
        "a: 50.0% of the first guesses are right, where guessing gets 10.0%."
    )
    averaged = made(run, "ema-500")
    assert averaged["ema_half_life_samples"] == 500
    assert averaged["metrics"] == {
        **{"scorecard/kid/kid": 0.2, "scorecard/kid/fid": None, "scorecard/zs/top1": 0.6}
    }
    assert averaged["heads"] == {
        "generation": {"scorecard/kid/kid": 0.2},
        "discrimination": {"scorecard/zs/top1": 0.6},
    }
    assert "half-life 500 samples" in card.readme(averaged)


def test_unscored_weights_say_so(run: Path) -> None:
    other = made(run, "ema-9")
    assert other["metrics"] == {} and "were not scored" in other["limits"][-1]
    assert card.readme(other).count("Not scored.") == 2


def test_no_password_is_in_it(run: Path) -> None:
    assert SECRET in json.dumps(choose(run).run)
    whole = made(run, "weights")
    text = json.dumps(whole) + card.readme(whole)
    assert "hunter2" not in text and "http://mlflow.internal:5000" in text


def test_data_that_is_out_of_reach_is_named_without_numbers(run: Path) -> None:
    data = {**choose(run).run["config"]["data"], "train": "/gone/train.json"}
    whole = made(run, "weights", data=data)
    (source,) = whole["data"]["train"]
    assert source == {
        **{"manifest": "/gone/train.json", "fingerprint": None, "samples": None, "shards": None}
    }
    assert whole["licence"]["data"] == {}
    assert "| trained on | /gone/train.json: not at hand at export |" in card.readme(whole)
