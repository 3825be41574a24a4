"""Many strings in little memory: no Python object for each."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt


class Strings(Sequence[str]):
    """Strings one after another in one buffer: what all of them begin with is kept once, and
    lower-case hexadecimal digits two in a byte."""

    def __init__(self, values: Sequence[str]) -> None:
        self._hex = all(len(v) % 2 == 0 and not v.strip("0123456789abcdef") for v in values)
        self._prefix = "" if self._hex else _alike(min(values), max(values))
        skipped = len(self._prefix)
        coded = [bytes.fromhex(v) if self._hex else v[skipped:].encode() for v in values]
        lengths = np.fromiter(map(len, coded), np.int64, len(coded))
        self._data = b"".join(coded)
        self._count = len(coded)
        # Where all are of one length, their places need no table.
        self._width = int(lengths[0]) if self._count and (lengths == lengths[0]).all() else -1
        self._starts: npt.NDArray[np.unsignedinteger] | None = None
        if self._width < 0:
            starts = np.concatenate([[0], np.cumsum(lengths)])
            self._starts = starts.astype(np.min_scalar_type(len(self._data)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int | slice) -> str | list[str]:  # type: ignore[override]
        if isinstance(number, slice):
            return [self.at(i) for i in range(*number.indices(self._count))]
        return self.at(number)

    def __iter__(self) -> Iterator[str]:
        return map(self.at, range(self._count))

    def at(self, number: int) -> str:
        """String ``number``; below zero, from the end."""
        number = range(self._count)[number]
        if self._starts is None:
            start, end = number * self._width, (number + 1) * self._width
        else:
            start, end = int(self._starts[number]), int(self._starts[number + 1])
        part = self._data[start:end]
        return part.hex() if self._hex else self._prefix + part.decode()


def _alike(one: str, other: str) -> str:
    """What both begin with: of the least and the greatest of many, what all begin with."""
    pairs = zip(one, other, strict=False)
    return one[: next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]
