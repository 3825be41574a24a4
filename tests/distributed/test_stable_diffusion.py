"""From a Stable Diffusion folder under ZeRO-3 on two ranks: what each rank starts from, training,
the export, and diffusers' own pipeline on it."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.__main__ import main
from tests.support import ranks, stable_diffusion

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STEPS, BATCH = 20, 8
TOLERANCE = 1e-4  # of pixels in [-1, 1], fp32, after training


def overrides(folder: Path, output: Path, **text) -> list[str]:
    """Of configs/debug.yaml: the folder's own sections, and no evaluation."""
    tree = stable_diffusion.settings(folder)
    tree["model"]["text_encoder"].update(text)
    return [
        f"output={output}",
        *(f"{section}={json.dumps(fields)}" for section, fields in tree.items()),
        *(f"training.{name}" for name in (f"samples={STEPS * BATCH}", f"global_batch={BATCH}")),
        *("engine.micro_batch=4", "engine.persist_parameters=10_000", "optimizer.lr=1e-4"),
        *(
            "optimizer.rate_scales={model.trunk.unet: 1, model.text_encoder: 1}",
            "optimizer.warmup_samples=0",
        ),
        *("inference.sampler=ddim", "inference.last_noise=0", "data.jitter=0"),
        *(f"evaluators.{e}=null" for e in ("validation", "zero_shot", "retrieval", "samples")),
        f"checkpoint.every_samples={STEPS * BATCH}",
    ]


def train_here(settings: list[str]) -> int:
    from pretrain import config
    from pretrain.run_config import RunConfig
    from pretrain.train import train

    return train(config.load(RunConfig, "configs/debug.yaml", settings))


def start_here(settings: list[str], step: bool) -> dict[str, float]:
    """On each rank: the engine as a run makes it. How far its masters are from the files, how many
    elements it holds of how many, and a loss."""
    from pretrain import comm, config
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.engine import Engine, init_distributed
    from pretrain.pretrained import Pretrained
    from pretrain.run_config import RunConfig
    from pretrain.train import build_task
    from tests.support import tiny

    run = config.load(RunConfig, "configs/debug.yaml", settings)
    init_distributed()
    pretrained = Pretrained(run.model)
    task = build_task(run, Tokenizer(run.data.tokenizer), storage=False)
    assert all(p.is_meta for p in task.model.parameters())
    engine = Engine(
        task,
        run.engine,
        run.optimizer,
        BATCH,
        run.ema,
        pretrained=pretrained,
        seed=run.seed,
    )
    held = sum(flat.numel() for flat in engine.partitions.flats)
    state = engine.gather()
    far, read = 0.0, 0
    for name, value in state.items():
        assert value.isfinite().all(), name
        if pretrained.has(name):
            there = pretrained.read(name, 0, value.numel()).view_as(value)
            far, read = max(far, (value - there).abs().max().item()), read + 1
    fresh = state["model.trunk.blocks.0.fc_in.weight"].std().item()
    loss = 0.0
    if step:
        batch = tiny.batch(BATCH // comm.world_size(), comm.rank() * BATCH // comm.world_size())
        loss = float(engine.step(batch, 1e-3).loss)
    total = sum(value.numel() for value in state.values())
    return {
        **{"far": far, "read": read, "held": held, "total": total, "fresh": fresh, "loss": loss},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion.make(tmp_path_factory.mktemp("sd"), shard="100KB")


def test_each_rank_starts_from_its_part_of_the_files(folder, tmp_path):
    """In bf16, with the text encoder trained too: the masters are the files' own fp32 values."""
    settings = [
        *overrides(folder, tmp_path / "run", frozen=False),
        "engine.precision=bf16",
        "engine.persist_parameters=0",
    ]
    settings += ["data.tokens=12", "model.text_encoder.length=12"]
    first, second = ranks.run(f"{__name__}:start_here", 2, settings, True, timeout=600)
    for rank in (first, second):
        assert rank["far"] == 0
        assert rank["read"] > 100
        assert rank["held"] < 0.51 * rank["total"]
        assert 0 < rank["loss"] < 100
    assert first["fresh"] == second["fresh"] > 0


def test_training_from_stable_diffusion(folder, tmp_path, capsys):
    import diffusers

    from pretrain.inference import Predictor
    from pretrain.rng import generator

    run, model, pipeline = (tmp_path / name for name in ("run", "model", "pipeline"))
    assert ranks.run(f"{__name__}:train_here", 2, overrides(folder, run), timeout=600) == [0, 0]
    for source, to, form in (
        (["--output", run], model, "model"),
        (["--model", model], pipeline, "diffusers"),
    ):
        assert main(["export", *map(str, source), "--to", str(to), "--as", form]) == 0
    (progress,) = run.glob("checkpoints/*/run.json")
    assert json.loads(progress.read_text())["progress"]["samples"] == STEPS * BATCH

    # What they say of themselves: a plain StableDiffusionPipeline, and nothing of the first folder.
    index = json.loads((pipeline / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    folder = folder.rename(folder.with_name("gone"))
    prompts, seeds = ["red apple", "blue"], [3, 4]
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    theirs.set_progress_bar_config(disable=True)
    found = theirs(
        prompts,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[generator(seed, "generate") for seed in seeds],
        output_type="pt",
    ).images
    ours = Predictor.load(model)
    tokens, mask = ours.tokenizer.encode(prompts, ours.length)
    expected = ours.heads.generate_tokens(tokens, mask, seeds, 4, 2.0, "ddim")
    assert (found * 2 - 1 - expected).abs().max() < TOLERANCE
    assert ours.embed_text(prompts).shape == (2, 32)

    # It has learned something since it was Stable Diffusion.
    before = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    after = theirs.unet.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
