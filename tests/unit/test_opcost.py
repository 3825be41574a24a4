"""Operations and bytes of a pass on the meta device: by hand, and against the other counter."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain import config as configs
from pretrain import flops, opcost, plan
from pretrain.abstract import AbstractRun
from pretrain.opcost import Op, recorded
from pretrain.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 1536


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def meta(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.empty(*shape, device="meta", requires_grad=grad)


def test_a_matrix_product_by_hand() -> None:
    a, b = meta(3, 5), meta(5, 7)
    with recorded() as ops:
        a @ b
    assert dict(ops) == {Op("matmul", 2 * 3 * 5 * 7, 4 * (3 * 5 + 5 * 7 + 3 * 7)): 1}


def test_a_convolution_and_its_backward_pass_by_hand() -> None:
    x, w = meta(2, 3, 8, 8, grad=True), meta(4, 3, 3, 3, grad=True)
    with recorded() as ops:
        F.conv2d(x, w, padding=1).sum().backward()
    forward = 2 * 2 * 4 * 3 * 9 * 64
    kinds = {op.kind: op.flops for op in ops if op.flops}
    assert kinds == {"convolution": forward, "convolution backward": 2 * forward}


def test_views_and_allocations_move_nothing_and_writes_in_place_do() -> None:
    x = meta(4, 6)
    with recorded() as ops:
        x.view(6, 4).t().unsqueeze(0)
        torch.empty_like(x)
        x.to(x.dtype)
    assert not ops
    with recorded() as ops:
        x.add_(1)
    assert dict(ops) == {Op("other", 0, 2 * x.nbytes): 1}


def test_fused_attention_moves_its_tensors_and_no_matrix() -> None:
    q, k, v = (meta(2, 4, 64, 16, grad=True) for _ in range(3))
    with recorded() as ops:
        F.scaled_dot_product_attention(q, k, v)
    forward = {op: n for op, n in ops.items() if op.kind == "attention"}
    assert forward == {Op("attention", 4 * 2 * 4 * 64 * 64 * 16, 4 * q.nbytes): 1}
    with recorded() as ops:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert opcost.flops(opcost.of_kinds(ops, ["attention"])) == 3.5 * opcost.flops(forward)


def load(*overrides: str) -> RunConfig:
    return configs.load(RunConfig, "configs/debug.yaml", list(overrides))


def training_ops(config: RunConfig) -> opcost.Ops:
    with recorded() as ops:
        plan.activations(AbstractRun(config, VOCABULARY))
    return ops


def test_a_training_step_has_the_operations_that_the_other_counter_finds() -> None:
    config = load()
    n = config.engine.micro_batch
    ops = training_ops(config)
    assert opcost.calls(ops) > 100 and opcost.nbytes(ops) > 1e6
    planned = sum(flops.sample_flops(config, VOCABULARY).values()) * n
    # The rest: the first layers' inputs need no gradient; attention computes its matrix again.
    assert opcost.flops(ops) == pytest.approx(planned, rel=0.04)


def test_recomputation_is_counted_as_often_as_it_runs() -> None:
    once, again = (
        opcost.flops(training_ops(load(f"engine.activation_checkpointing={on}"))) for on in (0, 1)
    )
    assert 1.2 * once < again < 1.4 * once  # a forward pass is a third
