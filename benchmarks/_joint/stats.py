"""Means, spreads and paired tests of the study, in closed form."""

import math
from collections.abc import Sequence

import numpy as np


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); NaN for the deviation of one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def student_p(t: float, dof: int) -> float:
    """Two-sided p of Student's t with ``dof`` >= 1 degrees of freedom (Abramowitz and Stegun,
    26.7.3 and 26.7.4: finite sums for whole degrees)."""
    if math.isnan(t):
        return math.nan
    theta = math.atan2(abs(t), math.sqrt(dof))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = dof % 2
    term = cosine if odd else 1.0
    total = 0.0 if dof == 1 else term
    for k in range(3 if odd else 2, dof - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1 - inside))


def paired_t(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(t, two-sided p) of the mean of a - b over pairs; NaN below two pairs or without spread."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return math.nan, math.nan
    mean, deviation = mean_sd(differences)
    if deviation == 0:
        return math.nan, math.nan
    t = mean / (deviation / math.sqrt(len(differences)))
    return t, student_p(t, len(differences) - 1)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p (binomial, on the pictures that one of the two got right) for hits a, b of
    the same pictures, bool (N,)."""
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    n, least = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def bootstrap(
    a_SN: np.ndarray, b_SN: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the mean of a - b when pictures are drawn anew (paired: both models see the
    same ones).

    Args:
        a_SN, b_SN: hits of S seeds on N pictures; averaged over seeds first.
    """
    difference_N = a_SN.astype(np.float64).mean(0) - b_SN.astype(np.float64).mean(0)
    n = len(difference_N)
    # The number of times each picture is drawn is all that a mean needs.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    low, high = np.quantile(counts @ difference_N / n, (0.025, 0.975))
    return float(low), float(high)


def pack(hits: Sequence[bool]) -> str:
    """Hits as hexadecimal text, eight pictures in two digits, for a line of results."""
    return np.packbits(np.asarray(hits, dtype=bool)).tobytes().hex()


def unpack(text: str, n: int) -> np.ndarray:
    """`pack`, back: bool (n,)."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n].astype(bool)
