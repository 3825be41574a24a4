"""Time, traffic and price of a run on a cluster: closed forms, and what ranks must not change."""

from pathlib import Path

import pytest

from pretrain import communication, forecast, hardware, roofline
from pretrain import config as configs
from pretrain.__main__ import main
from pretrain.communication import Collective, Sizes, step_collectives
from pretrain.engine_config import EngineConfig
from pretrain.errors import ConfigError
from pretrain.forecast import Workload
from pretrain.opcost import Op
from pretrain.roofline import Machine
from pretrain.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
H100 = hardware.accelerator("h100")
P = 1_000_000
SIZES = Sizes(trained=P, frozen=0, persistent=0, modules=10, queries=0)


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def work() -> Workload:
    path = ROOT / "configs/debug.yaml"
    return Workload(configs.load(RunConfig, path, ["training.global_batch=64"]), 1536)


# --- the roofline --------------------------------------------------------------------------------


def machine(**changes) -> Machine:
    fields = {"rates": {"matmul": ((1, 100.0),)}, "bandwidth": ((1, 10.0),), "call_seconds": 0.5}
    return Machine(**(fields | changes))


def test_an_operation_takes_the_longest_of_its_three_bounds() -> None:
    assert machine().seconds(Op("matmul", 1000, 10)) == 10  # arithmetic
    assert machine().seconds(Op("matmul", 100, 70)) == 7  # memory
    assert machine().seconds(Op("matmul", 1, 1)) == 0.5  # the call
    assert machine().total({Op("matmul", 1, 1): 3, Op("matmul", 100, 70): 2}) == 15.5


def test_a_rate_between_sizes_is_between_theirs() -> None:
    rates = machine(rates={"matmul": ((10, 1.0), (1000, 100.0))})
    assert rates.seconds(Op("matmul", 5, 0)) == 5  # below: the first
    assert rates.seconds(Op("matmul", 100, 0)) == pytest.approx(10)  # the middle of both logarithms
    assert rates.seconds(Op("matmul", 10_000, 0)) == 100  # above: the last


def test_a_gpu_is_its_data_sheet_and_the_stated_shares() -> None:
    gpu = roofline.of_gpu(H100, "bf16")
    assert gpu.seconds(Op("matmul", 10**12, 0)) == pytest.approx(1 / 989 / roofline.MATRIX_SHARE)
    assert any("989" in text and "70%" in text for text in gpu.assumptions)
    assert roofline.of_gpu(H100, "fp32").rates["matmul"][0][1] < gpu.rates["matmul"][0][1] / 10
    with pytest.raises(ConfigError, match=r"--gpu='h1000'.*a100, .*h200"):
        hardware.accelerator("h1000")


# --- collectives ---------------------------------------------------------------------------------


def total(stage: int, micro_steps: int = 1, ranks: int = 8, **changes) -> float:
    config = EngineConfig(zero_stage=stage, precision="bf16", **changes)  # type: ignore[arg-type]
    found = step_collectives(SIZES, config, ranks, micro_steps)
    return sum(c.nbytes * c.rings for c in found if c.what != "agree") / (2 * P)


@pytest.mark.parametrize(
    ("stage", "micro_steps", "changes", "times"),
    [
        # Rajbhandari et al. 2020, section 7: 2 parameters' worth, in stage 3 half as much again
        # where weights do not stay from the forward to the backward pass.
        (0, 1, {}, 2),
        (1, 1, {}, 2),
        (2, 1, {}, 2),
        (3, 1, {}, 2),
        (3, 1, {"live_parameters": 0}, 3),
        (3, 1, {"live_parameters": 0, "activation_checkpointing": True}, 4),
        (1, 4, {}, 2),
        (2, 4, {}, 5),
        (3, 4, {}, 8),
    ],
)
def test_traffic_by_stage(stage: int, micro_steps: int, changes: dict, times: float) -> None:
    assert total(stage, micro_steps, **changes) == times


def test_one_rank_sends_nothing_and_payload_does_not_grow_with_ranks() -> None:
    assert step_collectives(SIZES, EngineConfig(), 1, 1) == ()
    assert total(3, ranks=8) == total(3, ranks=1024)
    gather = Collective("", 800, 1)
    assert gather.sent(8) == 700 and Collective("", 800, 1, rings=2).sent(8) == 1400


def test_a_rings_latency_is_linear_in_ranks_and_a_trees_logarithmic() -> None:
    def seconds(nodes: int, rings: int) -> float:
        return communication.seconds(Collective("", 8, 1, rings), H100, nodes, 8, 1.0)

    growth = [
        (seconds(128, r) - seconds(64, r)) / (seconds(64, r) - seconds(32, r)) for r in (1, 2)
    ]
    assert growth[0] == pytest.approx(2, rel=0.01) and growth[1] == pytest.approx(1, rel=0.01)


def test_bandwidth_is_the_slower_of_links_and_adapters() -> None:
    big = Collective("", 10**12, 1)
    inside = communication.seconds(big, H100, 1, 8, 1.0)
    assert inside == pytest.approx(1e12 * 7 / 8 / 450e9, rel=0.01)
    between = communication.seconds(big, H100, 2, 8, 1.0)
    assert between == pytest.approx(1e12 * 15 / 16 / 400e9, rel=0.01)


# --- the whole -----------------------------------------------------------------------------------


def test_state_shrinks_with_ranks_and_the_rest_does_not(work: Workload) -> None:
    few, many = (forecast.forecast(work, H100, nodes, 4) for nodes in (1, 2))
    assert few.state.optimizer == pytest.approx(2 * many.state.optimizer, rel=1e-4)
    assert few.activations == many.activations
    assert many.micro_steps == 1 and few.micro_steps == 2
    assert few.passes == 2 * many.passes


def test_a_step_is_the_longer_of_passes_and_collectives_then_the_optimizer(work: Workload) -> None:
    found = forecast.forecast(work, H100, 1, 8)
    assert found.step == max(found.passes, found.communication) + found.optimizer
    assert found.images_per_second == 64 / found.step
    hours = found.days(3600 * found.images_per_second) * 24
    assert hours == pytest.approx(1)
    assert found.dollars(3600 * found.images_per_second, 2.5) == pytest.approx(8 * 2.5)


def test_an_offloaded_optimizer_frees_the_gpu_and_takes_longer(work: Workload) -> None:
    path = ROOT / "configs/debug.yaml"
    more = ["training.global_batch=64", "engine.offload_optimizer=cpu"]
    offloaded = Workload(configs.load(RunConfig, path, more), 1536)
    here, there = (forecast.forecast(w, H100, 1, 8) for w in (work, offloaded))
    assert here.device_bytes - there.device_bytes == here.state.optimizer == there.on_host
    assert there.optimizer > 10 * here.optimizer


def test_an_autoencoder_costs_time_and_memory_unless_latents_are_stored() -> None:
    overrides = [
        "model.autoencoder={kind: diffusers, path: /nowhere}",
        *("model.image_size=64", "data.size=64", "engine.micro_batch=2", "data.jitter=0"),
    ]
    path = ROOT / "configs/debug.yaml"
    online, stored = (
        Workload(configs.load(RunConfig, path, [*overrides, f"data.encoded={on}"]), 1536)
        for on in (False, True)
    )
    # By hand its 3 x 3 convolutions are 0.266 TFLOP at 256 px; a sixteenth at 64.
    assert online.flops["autoencoder"] == pytest.approx(0.266e12 / 16, rel=0.05)
    assert "autoencoder" not in stored.flops and stored.autoencoder is None
    found = [forecast.forecast(w, H100, 1, 8) for w in (online, stored)]
    assert found[0].encoding > 0 == found[1].encoding
    assert found[0].frozen - found[1].frozen == pytest.approx(83.7e6 * 4, rel=0.01)


def test_the_command_prints_every_part_and_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--config", "configs/debug.yaml", "--nodes", "1", "--gpus-per-node", "2"]
    assert main([*arguments, "--gpu", "a100", "--samples", "1e6", "--price", "2"]) == 0
    out = capsys.readouterr().out
    for part in ("optimizer", "activations", "decoder", "gather", "step", "images/s", "days", "$"):
        assert part in out
    assert out.count("\n  - ") >= 6
    assert main([*arguments, "--gpu", "tpu"]) == 2
    assert "--gpu='tpu'" in capsys.readouterr().err
    assert main(["plan", "--config", "configs/debug.yaml", "--nodes", "3", "--gpu", "h100"]) == 2
    assert "24 ranks" in capsys.readouterr().err
