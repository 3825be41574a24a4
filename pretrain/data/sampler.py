"""The order of samples, as a pure function of (seed, epoch, position): nothing to save, nothing to
lose.

Global sample number n is position n % N of epoch n // N. In each epoch the shards are permuted,
joined into windows of a few shards, and samples are permuted inside a window; so a reader keeps one
window in memory.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from pretrain.errors import ConfigError
from pretrain.rng import derive_seed


class EpochOrder:
    """Which sample is where in each epoch.

    Args:
        sizes: samples of each shard; empty shards are allowed.
        seed: of the run.
        window: shards that are shuffled together.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int) -> None:
        self.sizes = tuple(sizes)
        self.seed = seed
        self.window = window
        self.num_samples = sum(self.sizes)
        # Caches of pure functions: they bound work, and hold no state of the run.
        self._epoch = lru_cache(maxsize=2)(self._layout)
        self._window = lru_cache(maxsize=4)(self._permutation)

    def __reduce__(self) -> tuple[type["EpochOrder"], tuple[tuple[int, ...], int, int]]:
        return EpochOrder, (self.sizes, self.seed, self.window)  # caches stay behind

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, index in shard) of global sample number ``number`` >= 0."""
        epoch, position = divmod(number, self.num_samples)
        _, starts = self._epoch(epoch)
        window = bisect_right(starts, position) - 1
        shard, index = self._window(epoch, window)[position - starts[window]]
        return int(shard), int(index)

    def window_of(self, number: int) -> tuple[int, int]:
        """The range of global sample numbers [start, end) that are shuffled together with
        ``number``."""
        epoch, position = divmod(number, self.num_samples)
        _, starts = self._epoch(epoch)
        window = bisect_right(starts, position) - 1
        base = epoch * self.num_samples
        return base + starts[window], base + starts[window + 1]

    def _layout(self, epoch: int) -> tuple[tuple[tuple[int, ...], ...], list[int]]:
        """The windows of an epoch (shard numbers), and where each starts, with the epoch's end
        last."""
        rng = np.random.Generator(np.random.Philox(derive_seed(self.seed, epoch, "shards")))
        filled = np.array([i for i, n in enumerate(self.sizes) if n])
        shards = rng.permutation(filled).tolist()
        windows = tuple(
            tuple(shards[i : i + self.window]) for i in range(0, len(shards), self.window)
        )
        lengths = [sum(self.sizes[s] for s in w) for w in windows]
        return windows, [0, *accumulate(lengths)]

    def _permutation(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        """(shard, index) of each position of a window."""
        shards = self._epoch(epoch)[0][window]
        pairs = np.concatenate(
            [np.stack([np.full(self.sizes[s], s), np.arange(self.sizes[s])], 1) for s in shards]
        )
        rng = np.random.Generator(
            np.random.Philox(derive_seed(self.seed, epoch, window, "samples"))
        )
        return pairs[rng.permutation(len(pairs))]


def rank_slice(start: int, global_batch: int, rank: int, world: int) -> range:
    """Sample numbers of ``rank`` in the global batch that begins at ``start``: disjoint and
    complete over ranks.

    Raises:
        ConfigError: the batch does not divide.
    """
    size, rest = divmod(global_batch, world)
    if rest:
        raise ConfigError(
            f"training.global_batch={global_batch} is not a multiple of {world} ranks; "
            f"try {global_batch - rest or world} or {global_batch - rest + world}"
        )
    return range(start + rank * size, start + (rank + 1) * size)
