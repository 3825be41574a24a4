"""State that no number of ranks owns: moving averages, checkpoints and rewinds on real ranks of
ZeRO, against plain arithmetic on whole parameters."""

import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import CheckpointConfig, Checkpointer, damage
from pretrain.ema import EmaConfig, decay
from pretrain.engine import Engine
from pretrain.engine_config import EngineConfig
from pretrain.guard import Refusal
from pretrain.optim import OptimizerConfig
from tests.support import ranks, tiny
from tests.support.collectives import traced

pytestmark = pytest.mark.distributed

LR, GLOBAL_BATCH = 1e-3, 8
EMA = EmaConfig(half_lives=(8, 40), ramp=0.5)
OPTIMIZER = OptimizerConfig(lr=LR, eps=1e-5)  # (see test_engine.py for eps)
OBJECTIVES = {"generate": {}, "align": {}}


def engine_of(stage: int = 3, micro: int | None = None, seed: int = 0) -> Engine:
    from pretrain import comm
    from pretrain.engine import init_distributed

    init_distributed()
    torch.manual_seed(seed)
    config = EngineConfig(
        zero_stage=stage,
        micro_batch=micro or GLOBAL_BATCH // comm.world_size(),
        persist_parameters=1000,
        live_parameters=0,
    )
    return Engine(tiny.task(OBJECTIVES, unet=tiny.ONE_LEVEL), config, OPTIMIZER, GLOBAL_BATCH, EMA)


def step(engine: Engine, number: int) -> float:
    """The step of that number, whatever the number of ranks; the mean loss."""
    from pretrain import comm

    mine = GLOBAL_BATCH // comm.world_size()
    batch = tiny.batch(mine, start=number * GLOBAL_BATCH + comm.rank() * mine)
    output = engine.step(batch, LR, number * GLOBAL_BATCH)
    assert not isinstance(output, Refusal)
    return comm.mean(output.loss)


def checkpoints(folder: str) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig(every_samples=1, keep=9))


def largest(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def first_half(folder: str, stage: int) -> dict:
    """Three steps with a reference of the averages on whole parameters; a save; two more steps; a
    rewind in memory; the same two steps again."""
    engine = engine_of(stage)
    reference = {h: engine.gather() for h in EMA.half_lives}
    for number in range(3):
        step(engine, number)
        weights = engine.gather()
        for half_life, average in reference.items():
            keep = decay(EMA, half_life, (number + 1) * GLOBAL_BATCH, GLOBAL_BATCH)
            for name, value in weights.items():
                average[name] = keep * average[name] + (1 - keep) * value
    averages = {half_life: engine.gather(half_life) for half_life in EMA.half_lives}
    wrong = {half_life: largest(averages[half_life], v) for half_life, v in reference.items()}
    moved = largest(averages[8], weights)
    kept = all(torch.equal(weights[n], v) for n, v in engine.gather().items())
    checkpointer = checkpoints(folder)
    checkpointer.save(engine, 3 * GLOBAL_BATCH, {"name": "first half"}, last=True)
    losses = [step(engine, number) for number in (3, 4)]
    end = {"weights": engine.gather(), 40: engine.gather(40)}
    checkpointer.rewind(engine)
    again = [step(engine, number) for number in (3, 4)]
    repeated = {"weights": engine.gather(), 40: engine.gather(40)}
    return {
        "wrong": wrong,
        "moved": moved,
        "kept": kept,
        "losses": losses,
        "again": again,
        "same": all(
            torch.equal(end[kind][name], repeated[kind][name]) for kind in end for name in end[kind]
        ),
        **end,
    }


def second_half(folder: str, stage: int) -> dict:
    """Takes the checkpoint up on this number of ranks, and takes two steps; saves at the end."""
    engine = engine_of(stage, seed=7)
    checkpointer = checkpoints(folder)
    found = checkpointer.restore(engine)
    assert found is not None and found.samples == 3 * GLOBAL_BATCH
    at_start = {"weights": engine.gather(), 40: engine.gather(40)}
    losses = [step(engine, number) for number in (3, 4)]
    checkpointer.save(engine, 5 * GLOBAL_BATCH, {}, last=True)
    return {"losses": losses, "start": at_start, "weights": engine.gather(), 40: engine.gather(40)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[str, dict]:
    folder = str(tmp_path_factory.mktemp("state"))
    first, other = ranks.run(f"{__name__}:first_half", 2, folder, 3)
    assert first["losses"] == other["losses"]
    return folder, first


def test_averages_equal_a_loop_over_whole_parameters(saved):
    """To rounding: lerp is a + w (b - a), the loop k a + (1 - k) b; weights are of size 1."""
    print(f"measured: {saved[1]['wrong']}, the average is {saved[1]['moved']:.1e} off the weights")
    assert max(saved[1]["wrong"].values()) < 3e-7
    assert saved[1]["moved"] > 1e-4  # it is not simply the weights
    assert saved[1]["kept"]  # gathering an average leaves them as they are


def test_a_rewind_in_memory_repeats_the_same_bits(saved):
    assert saved[1]["again"] == saved[1]["losses"] and saved[1]["same"]


def soak(*case: int) -> object:
    return pytest.param(*case, marks=pytest.mark.soak)


@pytest.mark.parametrize(
    ("world", "stage"), [(1, 0), soak(4, 3), soak(1, 3), soak(2, 3), soak(2, 2)]
)
def test_another_number_of_ranks_and_another_stage_go_on(saved, tmp_path, world, stage):
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    found = ranks.run(f"{__name__}:second_half", world, str(folder), stage)[0]
    first = saved[1]
    losses = max(abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True))
    weights, average = largest(found["weights"], first["weights"]), largest(found[40], first[40])
    print(f"measured: loss {losses:.1e}, weights {weights:.1e}, average {average:.1e}")
    if (world, stage) == (2, 3):
        assert losses == weights == average == 0
    # As in test_engine.py: another split of the batch is another order of sums.
    assert losses < 1e-5 and weights < 1e-4 and average < 1e-4
    assert damage(folder / "samples-000000000040") is None


@pytest.mark.soak
def test_a_checkpoint_of_another_stage_is_read_as_well(saved, tmp_path):
    """Stage 2 cuts anywhere: what it wrote is taken up by stage 3."""
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    two = ranks.run(f"{__name__}:second_half", 2, str(folder), 2)[0]
    shutil.rmtree(folder / "samples-000000000024")
    (folder / "samples-000000000040").rename(folder / "samples-000000000024")
    three = ranks.run(f"{__name__}:second_half", 1, str(folder), 3)[0]
    assert largest(three["start"]["weights"], two["weights"]) == 0
    assert largest(three["start"][40], two[40]) == 0


def refuse_in_mid_step() -> dict:
    """The second of two micro-batches is NaN on rank 1: the step leaves no trace."""
    import dataclasses

    from pretrain import comm

    engine = engine_of(micro=2)
    step(engine, 0)
    before, average = engine.gather(), engine.gather(40)
    good = tiny.batch(4, start=GLOBAL_BATCH + 4 * comm.rank())
    images = good.images_BCHW.clone()
    images[3 if comm.rank() else 0] *= float("nan") if comm.rank() else 1.0
    refused = engine.step(dataclasses.replace(good, images_BCHW=images), LR, GLOBAL_BATCH)
    after = engine.gather()
    kept = all(torch.equal(before[n], v) for n, v in after.items())
    kept_average = all(torch.equal(average[n], v) for n, v in engine.gather(40).items())
    step(engine, 1)
    return {
        "why": refused.why if isinstance(refused, Refusal) else None,
        "kept": kept and kept_average,
        "end": engine.gather(),
    }


def two_good_steps() -> dict:
    engine = engine_of(micro=2)
    with traced() as calls:
        for number in (0, 1):
            step(engine, number)
    return {"end": engine.gather(), "calls": calls}


@pytest.fixture(scope="module")
def undisturbed() -> list[dict]:
    return ranks.run(f"{__name__}:two_good_steps", 2)


def test_a_nan_in_the_second_micro_batch_leaves_no_trace(undisturbed):
    for result in ranks.run(f"{__name__}:refuse_in_mid_step", 2):
        assert result["why"] == "non-finite loss" and result["kept"]
        assert largest(result["end"], undisturbed[0]["end"]) == 0


def test_every_rank_makes_the_same_collectives_in_the_same_order(undisturbed):
    """Else one waits for ever. Each rank draws its own captions and drops; both tasks run."""
    one, two = (result["calls"] for result in undisturbed)
    assert one == two
    names = [name for name, _ in one]
    print({name: names.count(name) for name in set(names)})
    # The trace sees ZeRO's own: gathers of weights, and reductions of gradients.
    assert names.count("_allgather_base_") > 20 and names.count("allreduce_") >= 4


def refuse_another_model(folder: str) -> str:
    from pretrain.errors import CheckpointError

    engine = engine_of()
    engine.partitions.shapes["model.novel"] = (3,)
    try:
        checkpoints(folder).restore(engine)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_another_model_is_refused(saved):
    said = ranks.run(f"{__name__}:refuse_another_model", 1, saved[0])[0]
    assert "lacks 1 of" in said and "model.novel" in said
    assert Path(saved[0], "samples-000000000024", "COMMITTED").exists()
