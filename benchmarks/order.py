"""How well the order shuffles and what it costs: `python benchmarks/order.py`.

One table: distances from a uniform permutation of ours, for lanes and windows; of a true random
permutation; and of shuffle buffers as webdataset has them (shards permuted, then a buffer from
which each next sample is drawn at random), of one stream and of many read in turn, as ranks and
workers read them. The memory column is what must be at hand at one moment: samples of the open
windows for ours (on disk, at any rank that reads that lane), samples in buffers for the others.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator

import numpy as np

from pretrain.data.order import Buckets, EpochOrder, Mixture
from pretrain.data.quality import Quality, measure, quality


def sizes_of(shards: int, samples: int) -> np.ndarray:
    """Samples of each shard, varying by half."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.5, 1.5, shards)
    return rng.multinomial(samples, weights / weights.sum())


def buffered(sizes: np.ndarray, buffer: int, streams: int) -> np.ndarray:
    """The order of ``streams`` readers that take turns, each with its own shards and buffer."""
    rng = np.random.default_rng(0)
    starts = np.cumsum(sizes) - sizes
    shards = rng.permutation(len(sizes))

    def shuffle(origins: np.ndarray) -> Iterator[int]:
        held: list[int] = []
        for origin in origins.tolist():
            if len(held) < buffer:
                held.append(origin)
                continue
            at = int(picks[next(pick)] * buffer)
            yield held[at]
            held[at] = origin
        yield from rng.permutation(held).tolist()

    picks = rng.random(int(sizes.sum()))
    pick = iter(range(len(picks)))
    readers = [
        shuffle(np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in own]))
        for own in (shards[i::streams] for i in range(streams))
    ]
    found: list[int] = []
    while readers:
        alive = []
        for reader in readers:
            origin = next(reader, None)
            if origin is not None:
                found.append(origin)
                alive.append(reader)
        readers = alive
    return np.array(found)


def shuffling(shards: int, samples: int) -> None:
    """The table of distances."""
    sizes = sizes_of(shards, samples)
    rows: list[tuple[str, int, Callable[[], Quality]]] = [
        ("uniform (np.random)", samples,
         lambda: measure(np.random.default_rng(1).permutation(samples), sizes)),
        ("unshuffled", 1, lambda: measure(np.arange(samples), sizes)),
    ]  # fmt: skip
    for lanes in (1, 16, 64, 256):
        for window in (1_024, 16_384, None):
            label = f"ours, {lanes} lanes, window {window or 'a lane'}"
            order = EpochOrder(sizes, 0, lanes=lanes, window=window)
            held = min(samples, lanes * (window or samples))
            rows.append((label, held, lambda order=order: quality(order)))
    for streams in (1, 64):
        for buffer in (1_000, 10_000):
            label = f"shuffle buffer {buffer:,}, {streams} streams"
            held = min(samples, streams * buffer)
            rows.append(
                (label, held, lambda b=buffer, s=streams: measure(buffered(sizes, b, s), sizes))
            )
    print(f"\n{samples:,} samples in {shards:,} shards of {sizes.min():,} to {sizes.max():,}\n")
    print("| order | samples held | displacement | neighbours | shards in a batch of 256 | "
          "spread (KS) | worst | deciles |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for label, held, run in rows:
        q = run()
        print(
            f"| {label} | {held:,} | {q.displacement:.3f} | {q.neighbours:.2f} | "
            f"{q.batch_shards:.3f} | {q.spread:.3f} | {q.spread_worst:.3f} | {q.deciles:.1f} |",
            flush=True,
        )


def median_ms(run: Callable[[], object], repeats: int = 51) -> float:
    """Median milliseconds of CPU after one warm call."""
    run()
    found = []
    for _ in range(repeats):
        began = time.process_time_ns()
        run()
        found.append(time.process_time_ns() - began)
    return float(np.median(found)) / 1e6


def cost() -> None:
    """Times and memory at 100,000 shards of 10,000 samples."""
    sizes = np.full(100_000, 10_000)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = EpochOrder(sizes, 0)
    made = time.process_time() - began
    began = time.process_time()
    order.locate(range(1_024))
    first = time.process_time() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    numbers = np.arange(1_024)
    small = EpochOrder(sizes[:1_000], 1)
    mixture = Mixture([order, small, EpochOrder(sizes[:50], 2)], weights=[6, 3, 1])
    shares = np.random.default_rng(0).multinomial(10_000, [0.5, 0.2, 0.1, 0.1, 0.1], 100_000).T
    buckets = Buckets(shares, 0, 1_024)
    print("\n100,000 shards, 10**9 samples; CPU milliseconds\n")
    print("| what | ms |\n|---|---|")
    print(f"| constructor | {made * 1e3:.2f} |")
    print(f"| first locate(1,024) of an epoch (permutes its shards) | {first * 1e3:.2f} |")
    for start in (0, 10**9, 10**12):
        took = median_ms(lambda start=start: order.locate(start + numbers))
        print(f"| locate(1,024) at sample {start:,} | {took:.2f} |")
    for label, other in (("Mixture of 3", mixture), ("Buckets, 5 of them", buckets)):
        took = median_ms(lambda other=other: other.locate(10**9 + numbers))
        print(f"| {label}: locate(1,024) at sample 1,000,000,000 | {took:.2f} |")
    print(f"\nmemory of the order with one epoch's shards: {(after - before) / 1024:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    args = parser.parse_args()
    cost()
    shuffling(args.shards, args.samples)


if __name__ == "__main__":
    main()
