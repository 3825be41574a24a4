"""What heartbeats, the watchdog, journals and logs cost on many ranks, by the real code."""

import pickle
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.rejects import Ledger
from pretrain.watchdog import Watchdog, WatchdogConfig, is_lookout, read_heartbeats


@dataclass(frozen=True)
class Costs:
    """Of a run of so many ranks.

    Attributes:
        writes_per_second: heartbeat files, over all ranks.
        write_seconds: of one.
        look_seconds: one rank reads the heartbeats of all.
        lookouts: ranks that look, while a run stands still.
        reads_per_second: files that they read together then.
        reads_if_all_looked: what they would if every rank did.
        gather_bytes: what a rank receives at a log line, of refused samples' counts.
        merge_seconds: of counting them.
    """

    ranks: int
    writes_per_second: float
    write_seconds: float
    look_seconds: float
    lookouts: int
    reads_per_second: float
    reads_if_all_looked: float
    gather_bytes: int
    merge_seconds: float


def measure(ranks: int) -> Costs:
    """On this machine's disk."""
    config = WatchdogConfig()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "heartbeats")
        folder.mkdir()
        began = time.perf_counter()
        for rank in range(ranks):
            Watchdog(root, rank, ranks, config)._write()
        written = (time.perf_counter() - began) / ranks
        began = time.perf_counter()
        assert len(read_heartbeats(root)) == ranks
        looked = time.perf_counter() - began
        # A count for each reason and shard; a rank meets few in a hundred steps.
        counts = {"not an image\tshard-000012.tar": 3, "too small\tshard-000013.tar": 1}
        ledger = Ledger(root, 0.05, 0)
        began = time.perf_counter()
        ledger.merge([Counter(counts)] * ranks)
        merged = time.perf_counter() - began
    lookouts = sum(is_lookout(rank, ranks) for rank in range(ranks))
    every = config.timeout_seconds / 20
    return Costs(
        ranks,
        ranks / config.heartbeat_seconds,
        written,
        looked,
        lookouts,
        lookouts * ranks / every,
        ranks * ranks / every,
        len(pickle.dumps(counts)) * ranks,
        merged,
    )
