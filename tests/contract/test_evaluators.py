"""What every file in pretrain/evaluators must keep, on a small model and a slice of the corpus."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pretrain import config as configs
from pretrain import plugins
from pretrain.data import index
from pretrain.data.emoji import write_shard
from pretrain.data.evalset import open_set, read_all
from pretrain.data.reader import ReadConfig
from pretrain.data.setconfig import SetConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError, DataError
from pretrain.evaluators.base import EvaluatorConfig, Kept, Result, Subject, share
from pretrain.inference import Heads
from pretrain.run_config import EVALUATORS, RunConfig, check_evaluators
from pretrain.train import build_task
from tests.support import weights

ROOT = Path(__file__).resolve().parents[2]
NAMES = plugins.names(EVALUATORS)
PICTURES = 12
WEIGHTS = "squeezenet.safetensors"  # beside the set
# Settings that a file cannot do without; an evaluator that is not listed runs on its defaults.
NEEDED: dict[str, dict[str, Any]] = {
    "validation": {"manifest": "SET", "global_batch": 8, "repeats": 1},
    "zero_shot": {"sets": {"small": "SET"}, "steps": 1, "noises": 1},
    "zero_shot_energy": {"sets": {"small": "SET"}, "noises": 1},
    "retrieval": {"sets": {"small": "SET"}, "steps": 1, "noises": 1},
    "generation": {
        "sets": {"small": "SET"},
        "images": 6,
        "steps": 2,
        "chunk": 4,
        "features": {"path": "WEIGHTS"},
    },
    "samples": {"prompts": ["red apple", "blue car", "owl"], "steps": 2, "columns": 2},
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest of a dozen pictures of the committed corpus."""
    folder = tmp_path_factory.mktemp("labelled")
    everything = read_all(str(ROOT / "data/emoji/heldout-concepts.json"), ReadConfig())
    raw = [r for r, _ in zip(everything, range(PICTURES), strict=False)]
    write_shard(folder / "0.tar.gz", [{"__key__": r.key, **r.files} for r in raw])
    url = str(folder / "small.json")
    index.build([str(folder / "0.tar.gz")], url)
    weights.write_safetensors(folder / WEIGHTS)
    return url


@pytest.fixture(scope="module")
def base() -> Subject:
    tree = configs.read_yaml(ROOT / "configs/debug.yaml")
    tree["data"]["tokenizer"] = str(ROOT / tree["data"]["tokenizer"])
    # for `zero_shot_energy`
    tree["objectives"] = {"generate": {}, "align": {}, "dcd": {"weight": 1.0}}
    config = configs.build(RunConfig, tree)
    tokenizer = Tokenizer(config.data.tokenizer)
    task = build_task(config, tokenizer).eval()
    heads = Heads(task.model, config.inference)
    return Subject(task, heads, tokenizer, config.data, Path("unset"), samples=160)


@pytest.fixture
def subject(base: Subject, tmp_path: Path) -> Subject:
    return dataclasses.replace(base, folder=tmp_path / "samples", kept=Kept())


def settings(name: str, labelled: str) -> EvaluatorConfig:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: filled(v) for k, v in value.items()}
        if value == "WEIGHTS":
            return str(Path(labelled).with_name(WEIGHTS))
        return labelled if value == "SET" else value

    return check_evaluators({name: filled(NEEDED.get(name, {}))})[name]


def run(name: str, labelled: str, subject: Subject) -> Result:
    module = plugins.load(EVALUATORS, name, "evaluators")
    result: Result = module.build(settings(name, labelled)).run(subject)
    return result


def scores_of(result: Result) -> dict[str, float]:
    """Its metrics but for what it cost."""
    return {k: v for k, v in result.metrics.items() if not k.startswith("cost/")}


@pytest.mark.parametrize("name", NAMES)
def test_it_declares_settings(name: str) -> None:
    module = plugins.load(EVALUATORS, name, "evaluators")
    assert issubclass(module.Settings, EvaluatorConfig) and module.__doc__
    assert module.Settings().every_samples is None and not module.Settings().at_start


@pytest.mark.parametrize("name", NAMES)
def test_it_returns_finite_numbers_under_its_name_and_files_that_exist(
    name: str, labelled: str, subject: Subject
) -> None:
    result = run(name, labelled, subject)
    assert result.metrics or result.files
    for key, value in result.metrics.items():
        assert key.startswith((f"{name}/", "cost/")), key
        assert type(value) is float and math.isfinite(value), key
    json.dumps(result.details)  # for a report
    for path in result.files:
        assert path.is_file() and path.is_relative_to(subject.folder)
        assert f"{subject.samples:09d}" in path.name, "a later run would overwrite it"


@pytest.mark.parametrize("name", NAMES)
def test_it_says_the_same_twice_and_leaves_the_model_alone(
    name: str, labelled: str, subject: Subject
) -> None:
    before = {k: v.clone() for k, v in subject.task.state_dict().items()}
    torch.manual_seed(1)
    first = run(name, labelled, subject)
    pictures = [path.read_bytes() for path in first.files]
    torch.manual_seed(2)
    second = run(name, labelled, dataclasses.replace(subject, kept=Kept()))
    assert scores_of(first) == scores_of(second)
    assert first.details == second.details
    assert pictures == [path.read_bytes() for path in second.files]
    after = subject.task.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not subject.task.training and all(p.grad is None for p in subject.task.parameters())


@pytest.mark.parametrize("name", [n for n in NAMES if n in NEEDED and n != "samples"])
def test_what_it_cannot_do_without_is_named(name: str) -> None:
    module = plugins.load(EVALUATORS, name, "evaluators")
    with pytest.raises(ConfigError, match=rf"evaluators\.{name}\."):
        module.build(module.Settings())


@pytest.mark.parametrize("name", [n for n in NAMES if n in NEEDED and n != "samples"])
def test_a_file_that_is_not_there_is_told_before_training(
    name: str, labelled: str, subject: Subject
) -> None:
    module = plugins.load(EVALUATORS, name, "evaluators")
    module.build(settings(name, labelled)).check(subject.data, lambda: None)
    gone = settings(name, labelled.replace("small.json", "gone.json"))
    with pytest.raises(DataError, match=r"gone\.json"):
        module.build(gone).check(subject.data, lambda: None)


def test_zero_shot_has_chance_beside_it(labelled: str, subject: Subject) -> None:
    metrics = run("zero_shot", labelled, subject).metrics
    names = {metrics[f"zero_shot/small/{key}"] for key in ("top1", "top5", "chance")}
    assert all(0 <= value <= 1 for value in names)
    classes = len(set(labels_of(labelled, subject)))
    assert metrics["zero_shot/small/chance"] == 1 / classes
    assert metrics["zero_shot/small/top1"] <= metrics["zero_shot/small/top5"]


def labels_of(labelled: str, subject: Subject) -> tuple[str, ...]:
    data = open_set("small", SetConfig(manifest=labelled), subject.data)
    return tuple(name for (name,) in data.captions)


def test_the_true_queries_would_score_all(
    labelled: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings replaced by each picture's own class query: 100% both ways, shuffled near none."""
    from pretrain.evaluators import _embed, retrieval, zero_shot
    from pretrain.evaluators._embed import Embedded

    captions = labels_of(labelled, subject)
    truth = Embedded(_embed.embed_texts(subject, captions), 1.0, 1)
    for module in (zero_shot, retrieval):
        monkeypatch.setattr(module, "embed_images", lambda *_: truth)
    found = scores_of(run("zero_shot", labelled, subject))
    assert found["zero_shot/small/top1"] == found["zero_shot/small/mean_per_class"] == 1.0
    assert set(scores_of(run("retrieval", labelled, subject)).values()) == {1.0}
    wrong = dataclasses.replace(truth, rows_NE=truth.rows_NE.roll(1, 0))
    for module in (zero_shot, retrieval):
        monkeypatch.setattr(module, "embed_images", lambda *_: wrong)
    assert run("zero_shot", labelled, subject).metrics["zero_shot/small/top1"] < 0.4


def test_the_grid_holds_a_picture_for_each_prompt(labelled: str, subject: Subject) -> None:
    (path,) = run("samples", labelled, subject).files
    with Image.open(path) as image:
        tile, gap, label = 96, 4, 16
        assert image.size == (2 * (tile + gap) + gap, 2 * (tile + label + gap) + gap)


def test_validation_weighs_each_sample_alike(labelled: str, subject: Subject) -> None:
    """In batches of all samples, walked round once, the mean is that of one pass over the set."""
    module = plugins.load(EVALUATORS, "validation", "evaluators")
    one = module.Settings(manifest=labelled, global_batch=PICTURES, repeats=1)
    losses = module.build(one).run(subject).metrics
    assert "validation/generate/loss" in losses and "validation/align/loss" in losses
    more = module.Settings(manifest=labelled, global_batch=PICTURES, repeats=8)
    averaged = module.build(more).run(subject).metrics
    assert losses != averaged  # each repeat is noised anew
    assert averaged["validation/loss"] == pytest.approx(losses["validation/loss"], rel=0.5)


def test_ranks_share_the_work_once() -> None:
    for n, world in [(0, 2), (7, 3), (8, 4), (2, 5)]:
        parts = [share(n, rank, world) for rank in range(world)]
        assert sorted(i for part in parts for i in part) == list(range(n))
