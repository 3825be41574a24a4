"""The simulated reads are those that locating every sample gives."""

import argparse
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.commands._data import plan as command
from pretrain.data import simulate
from pretrain.data.order import EpochOrder
from pretrain.errors import ConfigError


class Brute:
    """What `simulate.plan` says, found by visiting every sample of an epoch."""

    def __init__(self, order: EpochOrder, nbytes: np.ndarray, ranks: int, epoch: int) -> None:
        start = epoch * order.num_samples
        numbers = np.arange(start, start + order.num_samples)
        self.order, self.nbytes = order, nbytes
        self.shards, _ = order.locate(numbers)
        self.lanes = (numbers - start) % order.lanes
        self.slots = (numbers - start) // order.lanes
        self.ranks = numbers % ranks
        lane, begin, end = order.windows(epoch)
        self.windows = {
            number: [(b, e) for w, b, e in zip(lane, begin, end, strict=True) if w == number]
            for number in set(lane.tolist())
        }

    def own(self, of: list[int]) -> float:
        shards = self.shards[np.isin(self.ranks, of)]
        return float((self.nbytes[shards] / self.order.sizes[shards]).sum())

    def fetched(self, of: list[int]) -> float:
        mine = np.isin(self.ranks, of)
        pairs = set(zip(self.lanes[mine].tolist(), self.shards[mine].tolist(), strict=True))
        return float(sum(self.nbytes[shard] for _, shard in pairs))

    def peaks(self, of: list[int]) -> tuple[int, float]:
        """At every slot: the shards of the windows that the readers' lanes are in."""
        lanes = set(self.lanes[np.isin(self.ranks, of)].tolist())
        held = {}
        for lane in lanes:
            for begin, end in self.windows[lane]:
                inside = (self.lanes == lane) & (self.slots >= begin) & (self.slots < end)
                held[lane, begin] = set(self.shards[inside].tolist()), end
        most, heaviest = 0, 0.0
        for slot in range(int(self.slots.max()) + 1):
            now = [s for (_, begin), (s, end) in held.items() if begin <= slot < end]
            most = max(most, sum(map(len, now)))
            heaviest = max(heaviest, float(sum(self.nbytes[list(s)].sum() for s in now)))
        return most, heaviest


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 2), (8, 4), (8, 8)]),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(1, 3),
    st.integers(0, 2),
)
@settings(max_examples=50, deadline=None)
def test_reads_are_those_of_every_sample_where_ranks_divide_lanes(
    sizes: list[int], lanes_ranks: tuple[int, int], window: int | None, per_node: int, epoch: int
) -> None:
    lanes, ranks = lanes_ranks
    order = EpochOrder(sizes, 3, lanes=lanes, window=window)
    nbytes = np.arange(len(sizes)) * 10.0 + 7
    found = simulate.plan(order, nbytes, ranks, per_node, epoch)
    brute = Brute(order, nbytes, ranks, epoch)
    groups = {"per_rank": 1, "per_node": per_node}
    for name, size in groups.items():
        readers = getattr(found, name)
        members = [list(range(r, min(r + size, ranks))) for r in range(0, ranks, size)]
        assert readers.own_bytes == pytest.approx([brute.own(m) for m in members])
        assert readers.fetched_bytes == pytest.approx([brute.fetched(m) for m in members])
        peaks = [brute.peaks(m) for m in members]
        assert readers.queue_shards.tolist() == [shards for shards, _ in peaks]
        assert readers.cache_bytes == pytest.approx([heaviest for _, heaviest in peaks])


@pytest.mark.parametrize(("lanes", "ranks"), [(8, 6), (8, 5), (4, 12)])
def test_shared_lanes_are_foretold_on_average(lanes: int, ranks: int) -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 40, 80)
    order = EpochOrder(sizes, 3, lanes=lanes, window=60)
    nbytes = rng.uniform(1, 2, 80) * sizes
    found = simulate.plan(order, nbytes, ranks, 2)
    brute = Brute(order, nbytes, ranks, 0)
    for r in range(ranks):
        assert found.per_rank.own_bytes[r] == pytest.approx(brute.own([r]), rel=0.12)
        assert found.per_rank.fetched_bytes[r] == pytest.approx(brute.fetched([r]), rel=0.12)
    total = sum(brute.fetched([r]) for r in range(ranks))
    assert found.amplification(found.per_rank) == pytest.approx(total / nbytes.sum(), rel=0.02)
    nodes = [[r, r + 1] if r + 1 < ranks else [r] for r in range(0, ranks, 2)]
    total = sum(brute.fetched(n) for n in nodes)
    assert found.amplification(found.per_node) == pytest.approx(total / nbytes.sum(), rel=0.02)
    most = [brute.peaks([r])[0] for r in range(ranks)]
    # A reader of a shared lane may find no sample of its own in a shard of the window.
    assert all(found.per_rank.queue_shards >= np.array(most))


def test_ranks_that_do_not_divide_lanes_are_costly_and_get_a_remedy() -> None:
    sizes, nbytes = simulate.synthetic(2_000, 2_000_000, 1 << 20, 0.2)
    order = EpochOrder(sizes, 0, lanes=64)
    good = simulate.plan(order, nbytes, 64)
    bad = simulate.plan(order, nbytes, 60)
    assert good.divides and not bad.divides
    assert good.amplification(good.per_rank) < 1 + 64 / 2_000 + 0.01
    assert bad.amplification(bad.per_rank) > 14  # gcd(64, 60) = 4: fifteen ranks read each lane
    assert simulate.better_lanes(order, 64) is None
    assert simulate.better_lanes(order, 60) == 60
    assert simulate.better_lanes(order, 25) == 75
    assert simulate.better_lanes(order, 5_000) is None
    better = simulate.plan(EpochOrder(sizes, 0, lanes=60), nbytes, 60)
    text = simulate.table(bad, better)
    assert "each lane is read by 15 ranks. With lanes=60: amplification 1.0" in text
    assert "pack more and smaller shards" in simulate.table(bad)
    assert "each lane has one reader" in simulate.table(good)


def test_a_small_plan_adds_up() -> None:
    sizes, nbytes = simulate.synthetic(100, 1_003, 1_000, 0.5, seed=2)
    assert sizes.sum() == 1_003 and np.ptp(sizes) == 1
    assert nbytes.min() >= 500 and nbytes.max() <= 1_500 and np.ptp(nbytes) > 800
    found = simulate.plan(EpochOrder(sizes, 0, lanes=4), nbytes, 4, 3)
    assert found.per_rank.own_bytes.sum() == pytest.approx(nbytes.sum())
    assert len(found.per_rank.own_bytes) == 4 and len(found.per_node.own_bytes) == 2
    assert found.per_node.own_bytes[0] == pytest.approx(found.per_rank.own_bytes[:3].sum())
    assert found.amplification(found.per_node) >= 1


def test_what_cannot_be_planned_is_refused() -> None:
    order = EpochOrder([5, 5], 0)
    with pytest.raises(ConfigError, match="ranks=0"):
        simulate.plan(order, [1, 1], 0)
    with pytest.raises(ConfigError, match="1 shards, but the order has 2"):
        simulate.plan(order, [1], 1)
    with pytest.raises(ConfigError, match=r"spread=1\.5"):
        simulate.synthetic(1, 1, 1, 1.5)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args(arguments)


def test_the_command_plans_a_manifest(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url = corpus([3, 5, 4, 6])
    assert command.run(parsed(url, "--ranks", "2", "--nodes-of", "1", "--lanes", "2")) == 0
    out = capsys.readouterr().out
    assert "4 shards, 18 samples" in out and "2 ranks, 1 a node; 2 lanes" in out
    assert "each lane has one reader" in out
    for wrong in (["--ranks", "2"], [url, "--ranks", "2", "--shards", "3", "--samples", "9"]):
        with pytest.raises(ConfigError, match="a manifest, or --shards and --samples"):
            command.run(parsed(*wrong))
    with pytest.raises(SystemExit):
        parsed("--ranks", "1.5")


def test_a_thousand_ranks_and_a_billion_samples_take_seconds(repo_root: Path) -> None:
    """1,024 ranks x 10**5 shards x 10**9 samples: under 10 s of CPU and 2 GiB, imports included."""
    script = (
        "import argparse, resource\n"
        "from pretrain.commands._data import plan\n"
        "parser = argparse.ArgumentParser()\n"
        "plan.configure(parser)\n"
        "arguments = '--ranks 1024 --shards 100000 --samples 1e9'.split()\n"
        "assert plan.run(parser.parse_args(arguments)) == 0\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('used', used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repo_root, capture_output=True, text=True, check=True
    )
    *lines, last = done.stdout.strip().splitlines()
    seconds, gib = (float(value) for value in last.split()[1:])
    assert seconds < 10
    assert gib < 2
    assert lines[0].startswith("100,000 shards, 1,000,000,000 samples, 97.6")
    imbalance = next(line for line in lines if line.startswith("read by a rank"))
    assert math.isclose(float(imbalance.split()[-1].rstrip("%")), 1.6, abs_tol=1.0)
