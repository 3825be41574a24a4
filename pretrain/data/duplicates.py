"""Equal and nearly equal 64-bit hashes among billions, in bounded memory: what does not fit is put
on disk by its highest bits, so that equals meet in one file.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Hashes = npt.NDArray[np.uint64]
PAIR = np.dtype([("hash", "<u8"), ("number", "<u8")])
SIDE = 8  # a dHash has SIDE rows of SIDE comparisons
FLAT = 8  # grey levels; a picture within so few has no shape to compare
COMPARED = 4096  # hashes that share a block and are compared with one another


class Spool:
    """(hash, number) pairs, given back with equal leading bits together.

    Args:
        folder: for what does not fit.
        held: pairs kept in memory, 16 bytes each; each file of the 256 should fit likewise.
    """

    FILES = 256

    def __init__(self, folder: Path, held: int = 1 << 22) -> None:
        self.folder, self.held = folder, held
        self._waiting: list[npt.NDArray[np.void]] = []
        self._count = 0
        self._spilled = False

    def add(self, hashes: Hashes, numbers: Hashes) -> None:
        """Take pairs in."""
        pairs = np.empty(len(hashes), PAIR)
        pairs["hash"], pairs["number"] = hashes, numbers
        self._waiting.append(pairs)
        self._count += len(pairs)
        if self._count > self.held:
            self._spill()

    def parts(self) -> Iterator[npt.NDArray[np.void]]:
        """All pairs, sorted by hash and number, in parts that no 8 leading bits straddle."""
        if not self._spilled:
            yield np.sort(np.concatenate([np.empty(0, PAIR), *self._waiting]))
            return
        self._spill()
        for number in range(self.FILES):
            path = self.folder / f"{number:03d}"
            if path.exists():
                yield np.sort(np.fromfile(path, PAIR))

    def _spill(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._spilled = True
        pairs = np.concatenate([np.empty(0, PAIR), *self._waiting])
        pairs = pairs[np.argsort(pairs["hash"], kind="stable")]
        bounds = np.searchsorted(pairs["hash"] >> np.uint64(56), np.arange(self.FILES + 1))
        for number, (start, end) in enumerate(pairwise(bounds)):
            if start < end:
                with open(self.folder / f"{number:03d}", "ab") as stream:
                    pairs[start:end].tofile(stream)
        self._waiting, self._count = [], 0


def repeats(spool: Spool) -> Iterator[tuple[int, int]]:
    """(first number, later number) of pairs with equal hashes."""
    for part in spool.parts():
        same = np.flatnonzero(part["hash"][1:] == part["hash"][:-1]) + 1
        if not len(same):
            continue
        # The first of each run of equals, for each of the later ones.
        starts = np.flatnonzero(np.r_[True, part["hash"][1:] != part["hash"][:-1]])
        firsts = starts[np.searchsorted(starts, same, side="right") - 1]
        yield from zip(part["number"][firsts].tolist(), part["number"][same].tolist(), strict=True)


class NearSpool:
    """dHashes, given back as pairs that differ in at most ``bits`` bits.

    Two such hashes agree in at least one of ``bits`` + 1 blocks: only those that share a block are
    compared.
    """

    def __init__(self, folder: Path, bits: int, held: int = 1 << 22) -> None:
        self.bits = bits
        self._widths = [64 // (bits + 1) + (i < 64 % (bits + 1)) for i in range(bits + 1)]
        self._spools = [Spool(folder / str(i), max(1, held // (bits + 1))) for i in range(bits + 1)]
        self.skipped = 0

    def add(self, hashes: Hashes, numbers: Hashes) -> None:
        """Take hashes in."""
        turn = 0
        for width, spool in zip(self._widths, self._spools, strict=True):
            spool.add(_rotated(hashes, turn), numbers)
            turn += width

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """(number, number, differing bits); of equal hashes, each with the first of them. A pair
        comes once."""
        turn = 0
        for block, (width, spool) in enumerate(zip(self._widths, self._spools, strict=True)):
            for part in spool.parts():
                if not len(part):
                    continue
                if block == 0:
                    yield from _equal(part)
                hashes, first = np.unique(part["hash"], return_index=True)
                shared = hashes >> np.uint64(64 - width)
                starts = np.flatnonzero(np.r_[True, shared[1:] != shared[:-1]])
                for start, end in zip(starts, [*starts[1:], len(hashes)], strict=True):
                    if end - start > COMPARED:
                        self.skipped += int(end - start)
                        end = start + COMPARED
                    for a, b, distance in _within(hashes[start:end], self.bits):
                        # Both turned back, to see whether an earlier block gave this pair.
                        if self._earlier(_rotated(hashes[[start + a, start + b]], -turn), block):
                            continue
                        numbers = part["number"][first[[start + a, start + b]]]
                        yield int(numbers.min()), int(numbers.max()), distance
            turn += width

    def _earlier(self, two: Hashes, block: int) -> bool:
        """Whether two hashes share a block before number ``block``."""
        different, at = int(two[0]) ^ int(two[1]), 64
        for width in self._widths[:block]:
            at -= width
            if not (different >> at) & ((1 << width) - 1):
                return True
        return False


def dhash(image: Image.Image) -> int | None:
    """64 bits: whether each of 8 x 8 patches is brighter than the one to its right. Scaling,
    re-encoding and small changes of colour leave nearly all of them. None for a flat picture.
    """
    grey = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.int16)
    if levels.max() - levels.min() < FLAT:
        return None
    bits = (levels[:, :-1] > levels[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _equal(part: npt.NDArray[np.void]) -> Iterator[tuple[int, int, int]]:
    starts = np.flatnonzero(np.r_[True, part["hash"][1:] != part["hash"][:-1]])
    for start, end in zip(starts, [*starts[1:], len(part)], strict=True):
        for later in part["number"][start + 1 : end].tolist():
            yield int(part["number"][start]), later, 0


def _within(hashes: Hashes, bits: int) -> Iterator[tuple[int, int, int]]:
    """Places of hashes that differ in at most ``bits`` bits."""
    for a in range(len(hashes) - 1):
        distances = np.bitwise_count(hashes[a + 1 :] ^ hashes[a])
        for b in np.flatnonzero(distances <= bits).tolist():
            yield a, a + 1 + b, int(distances[b])


def _rotated(hashes: Hashes, turn: int) -> Hashes:
    """Turned left, so that the bits from ``turn`` on lead."""
    turn %= 64
    if not turn:
        return hashes
    return (hashes << np.uint64(turn)) | (hashes >> np.uint64(64 - turn))
