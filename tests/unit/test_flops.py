"""Operations of a training step: by hand, and as torch counts a real one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pretrain import config as configs
from pretrain import flops
from pretrain.data.tokenizer import Tokenizer
from pretrain.run_config import RunConfig
from pretrain.train import build_task
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 1536


def counter() -> FlopCounterMode:
    """torch's counter, which does not know attention on a CPU by itself."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        return 2 * int(sdpa_flop_count(query, key, value))

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {attention: forward, attention_backward: backward}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def load(*overrides: str) -> RunConfig:
    return configs.load(RunConfig, "configs/debug.yaml", list(overrides))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_linear_layer_by_hand() -> None:
    with counter() as counted:
        torch.nn.Linear(5, 7)(torch.zeros(3, 5))
    assert counted.get_total_flops() == 2 * 3 * 5 * 7


def test_what_a_module_computes_itself() -> None:
    assert flops.own({"": 10, "a": 7, "a.b.c": 3, "d": 2}) == {"": 1, "a": 4, "a.b.c": 3, "d": 2}


def test_the_sum_is_what_torch_counts_in_a_real_step() -> None:
    config = load()
    tokenizer = Tokenizer(config.data.tokenizer)
    planned = flops.sample_flops(config, tokenizer.vocab_size)
    task = build_task(config, tokenizer)
    n, length = config.engine.micro_batch, config.model.text_encoder.length
    batch = tiny.batch(n)
    tokens = torch.nn.functional.pad(batch.tokens_BL, (0, length - batch.tokens_BL.shape[1]))
    batch = dataclasses.replace(batch, tokens_BL=tokens, mask_BL=tokens != 0)
    with counter() as forward:
        output = task(batch)
    with counter() as backward:
        output.loss.backward()
    real = forward.get_total_flops() + backward.get_total_flops()
    print(f"planned {sum(planned.values()) * n:.4g}, real {real:.4g}")
    # The rest: gradients of the first layers' inputs, which nobody needs.
    assert real == pytest.approx(sum(planned.values()) * n, rel=0.03)
    assert all(
        planned[part] > 0 for part in ("text encoder", "image encoder", "decoder", "text stream")
    )


def test_components_follow_the_configuration() -> None:
    whole = flops.sample_flops(load(), VOCABULARY)
    generation = flops.sample_flops(load("objectives.align=null"), VOCABULARY)
    assert generation["head"] == 0 and generation["decoder"] == whole["decoder"]
    assert generation["image encoder"] == pytest.approx(whole["image encoder"] / 2)
    head = flops.sample_flops(load("model.text_stream.head_layers=2"), VOCABULARY)
    assert whole["head"] < head["head"] < 2 * whole["head"]


def test_recomputation_is_not_counted() -> None:
    whole = flops.sample_flops(load(), VOCABULARY)
    assert flops.sample_flops(load("engine.activation_checkpointing=true"), VOCABULARY) == whole


def test_what_is_frozen_costs_less() -> None:
    whole = flops.sample_flops(load(), VOCABULARY)
    text = flops.sample_flops(load("optimizer.freeze=[model.text_encoder]"), VOCABULARY)
    assert text["text encoder"] == pytest.approx(whole["text encoder"] / 3)
    unet = flops.sample_flops(load("optimizer.freeze=[model.trunk.unet]"), VOCABULARY)
    assert whole["decoder"] / 3 < unet["decoder"] < whole["decoder"]


def test_a_model_of_stable_diffusions_size() -> None:
    """SD 1.5's U-Net takes about 0.8 TFLOP (0.4 TMAC) for one 64 x 64 latent and 77 tokens."""
    config = load(
        "model.image_size=512",
        "data.size=512",
        "model.autoencoder={kind: diffusers, path: /nowhere}",
        "model.unet={channels: [320, 640, 1280, 1280], attention: [true, true, true, false], "
        "layers: 2, head_dim: 40, norm_groups: 32}",
        "model.text_encoder={width: 768, query_dim: 768, layers: 12, heads: 12, length: 77}",
        "data.tokens=77",
        "objectives.align=null",
        "engine.micro_batch=1",
        "training.global_batch=16",
    )
    counted = flops.sample_flops(config, 49408)
    forward = (counted["image encoder"] + counted["decoder"]) / 3
    assert forward == pytest.approx(0.8e12, rel=0.1)


def test_utilisation() -> None:
    assert flops.mfu(1e12, 200, 2, 1e15) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Unheard-of 9000", "bf16", None),
    ],
)
def test_peaks_by_name(name: str, precision: str, peak: float | None) -> None:
    assert flops.peak_flops(name, precision) == peak


def test_a_cpu_has_no_data_sheet_but_can_be_measured() -> None:
    assert flops.peak_flops(torch.device("cpu"), "fp32") is None
    assert 1e8 < flops.measured_peak("fp32", side=256, seconds=0.05) < 1e14
