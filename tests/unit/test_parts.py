"""Parts of a checkpoint, written by some ranks and read by others; the stream of safetensors."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain import storage
from pretrain.errors import CheckpointError
from pretrain.partitions import even_part
from pretrain.parts import Parts, file_name, state_facts, write_part
from pretrain.weights import Entry, write
from tests.support.plain import PlainEngine, same


def write_as(world: int, folder: Path, engine: PlainEngine) -> None:
    """The checkpoint that ``world`` ranks of stage 0 write of one state."""
    copy = engine.copy()
    for rank in range(world):
        mine = PlainEngine(rank=rank, world=world)
        mine.restore(copy)
        write_part(folder, mine.partitions, copy, rank)
    facts = state_facts(engine.partitions, copy, world)
    (folder / "state.json").write_text(json.dumps(facts))


@pytest.fixture
def trained() -> PlainEngine:
    engine = PlainEngine(seed=1, half_lives=(16,))
    for _ in range(3):
        engine.step()
    return engine


@pytest.mark.parametrize("world", [1, 2, 3, 4, 40])
def test_a_state_comes_back_whatever_number_of_ranks_wrote_it(tmp_path, trained, world):
    write_as(world, tmp_path, trained)
    other = PlainEngine(seed=2, half_lives=(16,))
    assert not same(other.state(), trained.state())
    other.load(Parts(tmp_path))
    assert same(other.state(), trained.state())
    for engine in (other, trained):
        engine.samples = 24
        engine.step()
    assert same(other.state(), trained.state())  # AdamW's own count of steps came back too


def test_every_element_is_written_once(tmp_path, trained):
    write_as(3, tmp_path, trained)
    counts = dict.fromkeys(trained.partitions.shapes, 0)
    for rank in range(3):
        with safe_open(tmp_path / file_name("weights", rank), "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                counts[name] += file.get_slice(name).get_shape()[0]
    assert counts == {"matrix": 35, "bias": 3, "scalar": 1, "frozen": 4}


def test_a_frozen_parameter_has_weights_no_moments_and_itself_for_an_average(tmp_path, trained):
    write_as(2, tmp_path, trained)
    parts = Parts(tmp_path)
    value = trained.module.frozen
    assert torch.equal(parts.whole("weights", "frozen"), value)
    assert torch.equal(parts.whole("ema-16", "frozen"), value)
    assert torch.equal(parts.whole("exp_avg", "frozen"), torch.zeros(4))


def test_before_the_first_step_there_are_no_moments(tmp_path):
    engine = PlainEngine(seed=3)
    write_as(2, tmp_path, engine)
    assert Parts(tmp_path).kinds == ["weights"]
    other = PlainEngine(seed=4)
    other.step()
    other.load(Parts(tmp_path))
    assert same(other.state(), engine.state())


def test_parts_that_say_where_they_start_are_read_by_that(tmp_path):
    """ZeRO stages 1 and 2 cut anywhere; a rank may hold nothing of a parameter."""
    full = torch.arange(10.0)
    (tmp_path / "weights").mkdir()
    for rank, (start, stop) in enumerate([(0, 7), (7, 10)]):
        entry = Entry("w", torch.float32, (stop - start,), lambda a=start, b=stop: full[a:b])
        other = Entry("v", torch.float32, (2,), lambda: torch.ones(2))
        entries = [entry, other] if rank else [entry]
        starts = {"w": start} | ({"v": 0} if rank else {})
        write(tmp_path / file_name("weights", rank), entries, {"starts": json.dumps(starts)})
    facts = {"format": 2, "world_size": 2, "steps": 0, "kinds": ["weights"]}
    facts["shapes"] = {"w": [2, 5], "v": [2]}
    (tmp_path / "state.json").write_text(json.dumps(facts))
    parts = Parts(tmp_path)
    assert torch.equal(parts.whole("weights", "w"), full.view(2, 5))
    assert torch.equal(parts.read("weights", "w", 6, 9), full[6:9])
    assert torch.equal(parts.whole("weights", "v"), torch.ones(2))


def test_what_is_missing_is_named(tmp_path, trained):
    write_as(2, tmp_path, trained)
    with pytest.raises(CheckpointError, match=r"has no weights of 'novel' \[0, 3\)"):
        Parts(tmp_path).read("weights", "novel", 0, 3)
    with pytest.raises(CheckpointError, match=r"has no weights of 'bias' \[0, 9\)"):
        Parts(tmp_path).read("weights", "bias", 0, 9)
    (tmp_path / file_name("weights", 1)).unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors cannot be read"):
        Parts(tmp_path).whole("weights", "matrix")


def test_another_format_is_refused(tmp_path):
    (tmp_path / "state.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="is of format 1, this version reads 2"):
        Parts(tmp_path)


@given(st.integers(0, 200), st.integers(1, 60))
def test_even_parts_cover_everything_once(numel, world):
    cuts = [even_part(numel, rank, world) for rank in range(world)]
    assert cuts[0][0] == 0 and cuts[-1][1] == numel
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3))))
def test_the_library_reads_what_the_stream_wrote(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    tensors = {
        f"t{i}": torch.randint(0, 100, shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    entries = [Entry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]
    written = write(path, entries, {"format": "pt"})
    assert written.bytes == path.stat().st_size
    assert written.sha256 == storage.sha256(str(path))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())


def test_a_tensor_that_is_not_what_its_entry_says_leaves_no_file(tmp_path):
    entry = Entry("w", torch.float32, (3,), lambda: torch.zeros(4))
    with pytest.raises(ValueError, match=r"w is torch.float32 \(4,\), not torch.float32 \(3,\)"):
        write(tmp_path / "x.safetensors", [entry], {})
    assert not list(tmp_path.iterdir())
