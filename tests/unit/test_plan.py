"""The dry run's figures against models that are really built."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import abstract, plan
from pretrain import config as configs
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.model.recompute import set_recompute
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask
from pretrain.train import build_task
from pretrain.types import Batch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    return configs.load(RunConfig, "configs/debug.yaml")


@pytest.mark.parametrize(
    "overrides",
    [[], ["objectives.align=null"], ["model.autoencoder.factor=4", "model.unet.layers=2"]],
)
def test_parameters_are_those_of_a_model_that_is_built(
    debug: RunConfig, overrides: list[str]
) -> None:
    config = configs.load(RunConfig, "configs/debug.yaml", overrides)
    tokenizer = Tokenizer(config.data.tokenizer)
    counted = plan.count_parameters(config, tokenizer.vocab_size)
    task = build_task(config, tokenizer)
    assert counted.total == sum(p.numel() for p in task.parameters())
    encoder = sum(p.numel() for p in task.model.text_encoder.parameters())
    assert counted.by_part["text encoder"] == encoder


def test_counting_allocates_nothing(debug: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[torch.nn.Module] = []

    def spy(*arguments: Any) -> PretrainTask:
        built.append(PretrainTask(*arguments))
        return built[-1]  # type: ignore[return-value]

    monkeypatch.setattr(abstract, "PretrainTask", spy)
    plan.count_parameters(debug, 1536)
    assert all(p.is_meta for task in built for p in task.parameters()) and built
    assert torch.empty(0).device.type == "cpu"  # the default device is given back


def test_a_model_of_stable_diffusions_size_is_counted_in_moments(debug: RunConfig) -> None:
    overrides = [
        "model.unet.channels=[320, 640, 1280, 1280]",
        "model.unet.attention=[true, true, true, false]",
        "model.unet.layers=2",
        "model.unet.head_dim=64",
        "model.unet.norm_groups=32",
    ]
    config = configs.load(RunConfig, "configs/debug.yaml", overrides)
    counted = plan.count_parameters(config, 1536)
    assert 8e8 < counted.by_part["image stream"] < 9e8


def test_an_autoencoder_is_planned_without_its_files(debug: RunConfig) -> None:
    tree = debug.model_dump()
    tree["model"]["autoencoder"] = {"kind": "diffusers", "path": "/nowhere/vae"}
    config = configs.build(RunConfig, tree)
    assert plan.count_parameters(config, 1536).total > 0


P, R = 1_000_000, 8


@pytest.mark.parametrize(
    ("precision", "stage", "bytes_per_parameter"),
    [
        # weights + gradients + masters and moments, each divided by R where its stage splits it
        ("fp32", 0, 4 + 4 + 8),  # plain AdamW: the weights are the masters
        ("fp32", 1, 4 + 4 + 12 / R),
        ("fp32", 2, 4 + (4 + 12) / R),
        ("fp32", 3, 20 / R),
        ("bf16", 0, 2 + 2 + 12),
        ("bf16", 1, 2 + 2 + 12 / R),
        ("bf16", 2, 2 + (2 + 12) / R),
        ("bf16", 3, 16 / R),
    ],
)
def test_state_follows_the_closed_form(
    precision: str, stage: int, bytes_per_parameter: float
) -> None:
    assert plan.state_bytes_per_rank(P, R, precision, stage).total == bytes_per_parameter * P


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_on_one_rank_nothing_is_divided(stage: int) -> None:
    expected = 20 if stage else 16
    assert plan.state_bytes_per_rank(P, 1, "fp32", stage, persistent=P).total == expected * P


def test_a_rest_is_padded_up() -> None:
    assert plan.state_bytes_per_rank(3, 2, "fp32", 3).total == 6 + 6 + 18
    assert plan.state_bytes_per_rank(1, 3, "fp32", 3).total == 2 + 2 + 4


def test_moving_averages_lie_on_the_optimizers_partitions() -> None:
    for stage, divided in ((0, 1), (1, R), (3, R)):
        state = plan.state_bytes_per_rank(P, R, "bf16", stage, ema_copies=2)
        assert state.ema == 2 * 4 * P / divided


def test_frozen_parameters_have_no_gradient_and_no_moments(debug: RunConfig) -> None:
    config = configs.load(
        RunConfig, "configs/debug.yaml", ["optimizer.freeze=[model.trunk.unet, model.text_encoder]"]
    )
    whole, counted = (plan.count_parameters(c, 1536) for c in (debug, config))
    assert counted.by_part["image stream"] == counted.by_part["text encoder"] == 0
    assert counted.frozen + counted.total == whole.total and counted.outside == 0
    state = plan.state_bytes_per_rank(
        counted.total, 1, "fp32", 3, frozen=counted.frozen, persistent=0
    )
    assert state.parameters == 4 * whole.total and state.gradients == 4 * counted.total


def test_small_parameters_are_counted_whole(debug: RunConfig) -> None:
    kept = [
        plan.count_parameters(
            configs.load(RunConfig, "configs/debug.yaml", [f"engine.persist_parameters={n}"]), 1536
        ).persistent
        for n in (0, 100, 10**9)
    ]
    assert kept[0] == 0 < kept[1] < kept[2] == plan.count_parameters(debug, 1536).total


def real_pass(config: RunConfig) -> tuple[int, int]:
    """What one real micro-batch holds on the CPU: bytes kept for the backward pass, and the peak of
    torch's CPU allocator, as its profiler records it."""
    tokenizer = Tokenizer(config.data.tokenizer)
    task = build_task(config, tokenizer)
    set_recompute(task, config.engine.activation_checkpointing)
    for parameter in task.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    n, length = config.engine.micro_batch, config.model.text_encoder.length
    batch = Batch(
        torch.zeros(n, 3, config.data.size, config.data.size, dtype=torch.uint8),
        torch.ones(n, length, dtype=torch.long),
        torch.ones(n, length, dtype=torch.bool),
        torch.arange(n),
    )
    task(batch).loss.backward()  # once before: kernels allocate workspaces of their own
    weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = task(batch)
    total = sum(kept.values())
    output.loss.backward()
    del output
    kept.clear()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as run:
        output = task(batch)
        output.loss.backward()
    now = peak = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return total, peak


def test_activations_are_those_of_a_real_pass(debug: RunConfig) -> None:
    wide = [
        "model.image_size=32",
        "data.size=32",
        "model.unet={channels: [32, 64], attention: [true, true], layers: 2, norm_groups: 16}",
        "engine.micro_batch=4",
    ]
    for checkpointing in (False, True):
        config = configs.load(
            RunConfig,
            "configs/debug.yaml",
            [*wide, f"engine.activation_checkpointing={checkpointing}"],
        )
        planned = plan.activation_bytes(config, Tokenizer(config.data.tokenizer).vocab_size)
        kept, peak = real_pass(config)
        print(f"{checkpointing=}: planned {planned}, real {kept=} {peak=}")
        if not checkpointing:  # else the inputs of units are kept where these hooks do not look
            assert planned.kept == pytest.approx(kept, rel=0.1)
            without = peak
        assert planned.peak == pytest.approx(peak, rel=0.1)
    assert peak < without / 2


def test_the_plan_names_every_part_and_says_where_the_batch_does_not_divide(
    debug: RunConfig,
) -> None:
    text = plan.render(debug, None)
    for part in ("text encoder", "image stream", "text stream", "alignment head", "total"):
        assert part in text
    split = [line.split() for line in text.splitlines()]
    rows = {int(words[0]): " ".join(words) for words in split if words and words[0].isdigit()}
    assert rows[1].endswith("2") and rows[2].endswith("1")
    assert rows[4].endswith("does not divide")


def test_a_number_of_ranks_that_cannot_run_is_an_error(debug: RunConfig) -> None:
    assert "\n      2 " in plan.render(debug, 2)
    with pytest.raises(ConfigError, match=r"micro_batch=8 on 4 ranks.*try 1, 2, 4"):
        plan.render(debug, 4)
