"""`generation` on a small real model: the same numbers on any ranks, and after any stop.

What it measures of the images is checked against what the same images give by hand.
"""

import base64
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain import comm, distances
from pretrain import config as configs
from pretrain.data import index
from pretrain.data.emoji import write_shard
from pretrain.data.evalset import open_set, read_all
from pretrain.data.reader import ReadConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError, DataError, NonFiniteError, PretrainError
from pretrain.evaluators import generation
from pretrain.evaluators.base import Kept, Result, Subject
from pretrain.evaluators.generation import Settings, agreement
from pretrain.features import squeezenet
from pretrain.features.base import FeaturesConfig
from pretrain.inference import Heads, InferenceConfig, from_pil, new_model
from pretrain.run_config import RunConfig
from pretrain.stop import Stopped
from pretrain.train import build_task
from tests.support import ranks, weights

ROOT = Path(__file__).resolve().parents[2]
REALS, IMAGES, CHUNK = 12, 14, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set, the extractor's weights, and an exported model to judge."""
    folder = tmp_path_factory.mktemp("generation")
    everything = read_all(str(ROOT / "data/emoji/heldout-concepts.json"), ReadConfig())
    raw = [r for r, _ in zip(everything, range(REALS), strict=False)]
    write_shard(folder / "0.tar.gz", [{"__key__": r.key, **r.files} for r in raw])
    index.build([str(folder / "0.tar.gz")], str(folder / "set.json"))
    weights.write_safetensors(folder / "squeezenet.safetensors")
    write_judge(folder / "judge")
    return folder


def run_config() -> RunConfig:
    tree = configs.read_yaml(ROOT / "configs/debug.yaml")
    tree["data"]["tokenizer"] = str(ROOT / tree["data"]["tokenizer"])
    tree["inference"] = tree["inference"] | {"last_noise": 0.0}  # no step is left out
    return configs.build(RunConfig, tree)


def write_judge(folder: Path) -> None:
    """A model folder as `pretrain.export` writes it."""
    from safetensors.torch import save_file

    config = run_config()
    tokenizer = Tokenizer(config.data.tokenizer)
    torch.manual_seed(config.seed + 1)
    definition, state = new_model(config.model, tokenizer).portable()
    tree = {
        "model": definition.model_dump(mode="json"),
        "inference": config.inference.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer.sha256,
        "logit_scale": 100.0,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    shutil.copy(config.data.tokenizer, folder / "tokenizer.model")
    save_file(state, folder / "model.safetensors")


def new_subject(folder: Path, **changes: Any) -> Subject:
    config = run_config()
    tokenizer = Tokenizer(config.data.tokenizer)
    torch.manual_seed(0)
    task = build_task(config, tokenizer).eval()
    heads = Heads(task.model, config.inference)
    fields = {"folder": folder / "samples", "samples": 160} | changes
    return Subject(task, heads, tokenizer, config.data, **fields)


def settings(folder: Path, **changes: Any) -> Settings:
    fields = {
        "sets": {"small": {"manifest": str(folder / "set.json")}},
        "images": IMAGES,
        "chunk": CHUNK,
        "sampler": "heun",
        "steps": 2,
        "guidance": 2.0,
        "features": FeaturesConfig(path=str(folder / "squeezenet.safetensors")),
        "judge": str(folder / "judge"),
        "kid_subset_size": 6,
        "kid_subsets": 5,
    }
    return Settings(**(fields | changes))


def run(folder: Path, subject: Subject, **changes: Any) -> Result:
    return generation.build(settings(folder, **changes)).run(subject)


def timeless(result: Result) -> dict[str, float]:
    timed = ("/seconds", "/images_per_second")
    return {k: v for k, v in result.metrics.items() if not k.endswith(timed)}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Result:
    return run(folder, new_subject(folder))


def test_the_numbers_are_those_of_its_pictures(folder: Path, alone: Result) -> None:
    """From the PNGs of the report, all there are, by hand."""
    assert alone.details is not None
    samples = alone.details["samples"]
    assert [s["seed"] for s in samples] == list(range(IMAGES))
    subject = new_subject(folder)
    pictures = [Image.open(io.BytesIO(base64.b64decode(s["png"]))) for s in samples]
    images = torch.stack([from_pil(p, 16) for p in pictures])
    net = squeezenet.build(str(folder / "squeezenet.safetensors"))
    data = open_set("small", settings(folder).sets["small"], subject.data)
    reals = data.images(range(REALS))
    captions = [caption for (caption,) in data.captions]
    real, made = net(reals), net(images)
    found = {k.removeprefix("generation/small/"): v for k, v in alone.metrics.items()}
    # Other batches sum in another order: fp32 features differ in their last digits.
    close = pytest.approx
    assert found["fid"] == close(distances.fid(real, made), rel=1e-4)
    assert found["kid"] == close(distances.kid(real, made, 6, 5)[0], rel=1e-3)
    assert (found["precision"], found["recall"]) == distances.precision_recall(real, made)
    # Prompts are captions of the set's pictures, of each before any comes twice.
    prompts = [s["prompt"] for s in samples]
    assert sorted(prompts[:REALS]) == sorted(captions) and prompts[REALS:] == prompts[:2]
    for sample in samples:
        beside = from_pil(Image.open(io.BytesIO(base64.b64decode(sample["real"]))), 16)
        of_name = [i for i, c in enumerate(captions) if c == sample["prompt"]]
        assert min(float((beside - reals[i]).abs().max()) for i in of_name) < 1 / 127

    length = subject.heads.model.config.text_encoder.length
    e = subject.heads.embed_tokens(*subject.tokenizer.encode(prompts, length))
    cosines = (subject.heads.embed_images(images) * e).sum(1)
    assert found["agreement"] == close(float(cosines.mean()), abs=1e-5)
    assert found["agreement_independent"] != close(found["agreement"], abs=1e-3)
    # Heun's two steps are three evaluations, guidance doubles them.
    assert alone.metrics["cost/small/passes_per_image"] == 6.0
    seconds = alone.metrics["cost/small/seconds"]
    assert alone.metrics["cost/small/images_per_second"] == close(IMAGES / seconds)


def test_its_notes_say_what_fid_is_worth(folder: Path, alone: Result) -> None:
    assert alone.details is not None
    (note,) = alone.details["notes"]
    assert "14 generated and 12 real images, fewer than the 512 features" in note
    assert "prefer KID" in note


def on_rank(folder: str, scratch: str) -> tuple[bool, dict[str, int], dict[str, float]]:
    """Runs on each rank: whether it was stopped, what was kept then and when it was written, and
    the numbers after going on."""
    from pretrain.engine import init_distributed

    init_distributed()
    calls: list[int] = []

    def pulse() -> bool:
        calls.append(0)
        return comm.rank() == 0 and len(calls) > 1  # (the real pictures' features are kept)

    place = {"rank": comm.rank(), "world": comm.world_size(), "scratch": Path(scratch)}
    subject = new_subject(Path(folder), **place)
    stopped = False
    try:
        run(Path(folder), dataclasses.replace(subject, pulse=pulse))
    except Stopped:
        stopped = True
    kept = chunks(Path(scratch))
    comm.barrier()
    return stopped, kept, timeless(run(Path(folder), subject))


def chunks(scratch: Path) -> dict[str, int]:
    """When each was written."""
    return {str(p): p.stat().st_mtime_ns for p in sorted(scratch.rglob("*.safetensors"))}


@pytest.mark.distributed
def test_two_ranks_stopped_and_gone_on_say_what_one_says(
    folder: Path, alone: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit. They go on with what was done, and draw the rest alone."""
    found = ranks.run("tests.distributed.test_generation:on_rank", 2, str(folder), str(tmp_path))
    for stopped, kept, metrics in found:
        assert stopped and 0 < len(kept) < 4 and metrics == timeless(alone)
        assert kept.items() <= chunks(tmp_path).items()
    assert len(chunks(tmp_path)) == 4
    # One rank reads what two have drawn.
    monkeypatch.setattr(Heads, "generate_tokens", lambda *arguments: pytest.fail("drawn again"))
    assert timeless(run(folder, new_subject(folder, scratch=tmp_path))) == timeless(alone)


def test_what_other_weights_or_settings_drew_is_not_taken(
    folder: Path, alone: Result, tmp_path: Path
) -> None:
    subject = new_subject(folder, scratch=tmp_path)
    assert timeless(run(folder, subject)) == timeless(alone)
    with torch.no_grad():
        subject.task.model.trunk.unet.conv_out.bias += 0.1
    subject = dataclasses.replace(subject, kept=Kept())
    other = run(folder, subject)
    assert other.metrics["generation/small/fid"] != alone.metrics["generation/small/fid"]
    for changes in ({"steps": 1}, {"guidance": 0.0}, {"sampler": "ddim"}, {"seed": 5}):
        run(folder, subject, images=CHUNK, **({"kid_subset_size": 3} | changes))
    assert len(list(tmp_path.iterdir())) == 6
    for damaged in tmp_path.rglob("000000.safetensors"):
        damaged.write_bytes(damaged.read_bytes()[:100])
    assert timeless(run(folder, new_subject(folder, scratch=tmp_path))) == timeless(alone)


def test_samplers_and_guidance_cost_what_they_cost(folder: Path) -> None:
    subject = new_subject(folder)
    subject = dataclasses.replace(subject, heads=Heads(subject.task.model, InferenceConfig()))

    def passes(sampler: str, guidance: float) -> float:
        changes = {"sampler": sampler, "guidance": guidance, "steps": 3, "judge": None}
        result = run(folder, subject, images=6, **changes)
        assert not any("independent" in k for k in result.metrics)
        return result.metrics["cost/small/passes_per_image"]

    assert passes("ddim", 0.0) == passes("dpmpp_2m", 0.0) == 3
    assert passes("ddim", 1.0) == 6 and passes("heun", 0.0) == 5


def test_a_head_that_was_not_trained_is_not_asked(folder: Path) -> None:
    subject = new_subject(folder)
    subject.task.halves = frozenset({"generation"})
    metrics = run(folder, subject).metrics
    assert "generation/small/agreement" not in metrics
    assert "generation/small/agreement_independent" in metrics


def test_a_model_that_draws_nan_is_told(folder: Path) -> None:
    subject = new_subject(folder)
    with torch.no_grad():
        subject.task.model.trunk.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"image 0 \(seed 3, prompt '.*guidance=2"):
        run(folder, subject, seed=3)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"sets": {}}, ConfigError, r"generation.sets=\{\}: name at least one"),
        ({"images": 3}, ConfigError, r"images=3: .*need at least 4"),
        ({"kid_subset_size": 15}, ConfigError, r"kid_subset_size=15 is more than images=14"),
        ({"kid_subset_size": 13}, ConfigError, r"kid_subset_size=13 is more than the 12 real"),
        ({"neighbours": 12}, DataError, r"12 real pictures are too few for neighbours=12"),
        ({"judge": "/nowhere"}, ConfigError, r"judge='/nowhere' is not an exported model"),
        ({"features": FeaturesConfig(path="/x.h5")}, DataError, r"/x.h5.* is not there"),
        ({"features": FeaturesConfig(kind="vgg")}, ConfigError, r"kind='vgg' is unknown"),
        ({"features": FeaturesConfig(kind="inception")}, DataError, r"path=None: inception"),
    ],
)
def test_it_refuses_before_anything_is_drawn(
    folder: Path, changes: dict[str, Any], error: type[PretrainError], said: str
) -> None:
    subject = new_subject(folder)
    drawn: list[Any] = []
    subject.heads.generate_tokens = lambda *a: drawn.append(a)  # type: ignore[method-assign]
    with pytest.raises(error, match=said):
        run(folder, subject, **changes)
    assert not drawn


def test_agreement_by_hand() -> None:
    texts = torch.eye(3)
    images = torch.tensor([[2.0, 0, 0], [0, 3, 4], [1, 1, 0], [0, 0, 0]])
    mean, top1 = agreement(images, texts, torch.tensor([0, 2, 0, 1]))
    # right; right; tied, which counts against; nothing at all, tied too
    assert mean == pytest.approx((1 + 0.8 + 0.5**0.5 + 0) / 4) and top1 == 0.5
    assert agreement(torch.full((2, 3), np.nan), texts, torch.tensor([0, 1]))[1] == 0.0


def test_a_seed_is_an_image_whatever_the_number_of_images(folder: Path, alone: Result) -> None:
    few = run(folder, new_subject(folder), images=2 * CHUNK, examples=3, judge=None)
    assert few.details and alone.details
    assert few.details["samples"] == alone.details["samples"][:3]
    none = run(folder, new_subject(folder), images=2 * CHUNK, examples=0, judge=None)
    assert none.details and none.details["samples"] == []
    assert timeless(none) == timeless(few)
