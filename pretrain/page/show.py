"""Strangers' text made harmless, numbers for people, and small charts as inline SVG, whose colours
come from the page's style sheet."""

import html
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 340, 196
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 28, 40
BINS = 28
Format = Callable[[float], str]
Values = npt.NDArray[np.int64] | npt.NDArray[np.floating[Any]]


def escape(text: object) -> str:
    """``text`` as HTML that shows it and nothing else: tags, quotes, control characters and halves
    of characters from a broken JSON escape included."""
    whole = str(text).encode("utf-8", "replace").decode()
    plain = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in whole)
    return html.escape(plain, quote=True)


def plain(text: str) -> str:
    """``text`` on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def number(value: float) -> str:
    """``value`` with thousands separated; decimals only where it is small."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in the unit that keeps the number short."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1000 or unit == "TiB":
            return f"{number(round(count, 1))} {unit}" if count < 10 else f"{count:,.0f} {unit}"
        count /= 1024
    raise AssertionError


def histogram(
    values: Values, what: str, unit: str, shown: Format = number, grain: float = 0.0
) -> str:
    """How ``values`` are spread.

    Args:
        values: at least one; equal ones give a statement in place of a chart.
        what: that is counted, plural, for the axis: "captions".
        unit: of the values, for the axis: "words".
        shown: writes a value on the axis.
        grain: of which the values are multiples, and so the bars; 1 for integers.
    """
    low, high = (float(x) for x in np.quantile(values, (0.002, 0.998), method="inverted_cdf"))
    if values.min() == values.max():
        return (
            f'<p class="only"><b>{escape(shown(low))}</b> {escape(unit)}, '
            f"all {number(len(values))} {escape(what)} alike</p>"
        )
    low, high = (low, high) if high > low else (float(values.min()), float(values.max()))
    grain = max(grain, 1.0) if values.dtype.kind == "i" else grain
    edges, ticks = _edges(values, low, high, grain)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    cut = (values.min() < edges[0], values.max() > edges[-1])
    names = []
    for i, (start, end) in enumerate(pairwise(edges)):
        name = shown(start) if end - start == grain else f"{shown(start)} to {shown(end)}"
        name = f"{name} and fewer" if i == 0 and cut[0] else name
        names.append(f"{name} and more" if i == len(counts) - 1 and cut[1] else name)
    scaled = (
        np.log(edges) if edges[0] > 0 and _is_log(values, low, high, grain) else np.asarray(edges)
    )
    places = (scaled - scaled[0]) / (scaled[-1] - scaled[0])
    at = {t: float(np.interp(t, edges, places)) for t in ticks if edges[0] <= t <= edges[-1]}
    middle = float(np.median(values))
    # A bar of one value has its number under its middle.
    half = float(places[1] - places[0]) / 2 if edges[1] - edges[0] == grain else 0.0
    labels = [(x + half, shown(t)) for t, x in at.items() if x + half <= 1]
    mark = (min(1.0, float(np.interp(middle, edges, places)) + half), f"median {shown(middle)}")
    return _bars(counts, places, labels, names, what, unit, mark)


def categories(counts: Sequence[int], names: Sequence[str], what: str, unit: str) -> str:
    """Bars of equal width, each with its name under it."""
    places = np.linspace(0, 1, len(counts) + 1)
    labels = [((places[i] + places[i + 1]) / 2, name) for i, name in enumerate(names)]
    return _bars(np.asarray(counts), places, labels, list(names), what, unit, None)


def ranking(rows: Sequence[tuple[str, int]], what: str) -> str:
    """Texts with their counts, as a list with bars behind the numbers."""
    most = max((n for _, n in rows), default=1)
    items = "".join(
        f'<li><bdi title="{escape(text)}">{escape(text)}</bdi>'
        f'<span class="bar"><i style="width:{100 * n / most:.1f}%"></i></span>'
        f"<b>{number(n)}</b></li>"
        for text, n in rows
    )
    return f'<ol class="ranking" aria-label="{escape(what)}">{items}</ol>'


def _bars(
    counts: npt.NDArray[np.int64],
    places: npt.NDArray[np.floating[Any]],
    labels: Sequence[tuple[float, str]],
    names: Sequence[str],
    what: str,
    unit: str,
    mark: tuple[float, str] | None,
) -> str:
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    floor = HEIGHT - BOTTOM
    most = int(counts.max())
    step = nice(most / 3)
    top = max(step * math.ceil(most / step), 1)
    total = max(1, int(counts.sum()))
    parts = []
    for i in range(round(top / step) + 1):
        y = floor - tall * i * step / top
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{_short(i * step)}</text>')
    for count, start, end, name in zip(counts, places, places[1:], names, strict=False):
        if not count:
            continue
        height = max(1.0, tall * count / top)
        x, width = LEFT + start * wide, max(1.0, (end - start) * wide - 1)
        told = f"{name} {unit}: {number(count)} {what} ({100 * count / total:.1f} %)"
        parts.append(
            f'<rect x="{x:.1f}" y="{floor - height:.1f}" width="{width:.1f}" height="{height:.1f}">'
            f"<title>{escape(told)}</title></rect>"
        )
    for place, text in labels:
        parts.append(
            f'<text class="x" x="{LEFT + place * wide:.1f}" y="{floor + 14}">{escape(text)}</text>'
        )
    if mark is not None:
        x = LEFT + mark[0] * wide
        side = "end" if mark[0] > 0.7 else "start"
        near = x + (-4 if side == "end" else 4)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 9}" y2="{floor}"/>')
        parts.append(
            f'<text class="mark" text-anchor="{side}" x="{near:.1f}" y="{TOP - 12}">'
            f"{escape(mark[1])}</text>"
        )
    parts.append(f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}">{escape(unit)}</text>')
    parts.append(f'<text class="what" x="{LEFT - 6}" y="{TOP - 12}">{escape(what)}</text>')
    spoken = f"Histogram of {number(total)} {what} by {unit}"
    spoken += f", {mark[1]}." if mark else "."
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">'
        f"{''.join(parts)}</svg>"
    )


def _is_log(values: Values, low: float, high: float, grain: float) -> bool:
    # Not where bars would be narrower than the grain: every other one would be empty.
    return low > 8 * grain and high / low > 30 and values.min() > 0


def _edges(
    values: Values, low: float, high: float, grain: float
) -> tuple[npt.NDArray[np.floating[Any]], list[float]]:
    """Bounds of the bars, and where numbers stand under them."""
    if _is_log(values, low, high, grain):
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        bars = (last - first) * max(1, BINS // (last - first))
        edges = np.exp2(np.linspace(first, last, bars + 1))
        every = max(1, round((last - first) / 5))
        return edges, [2.0**p for p in range(first, last + 1, every)]
    step = nice((high - low) / BINS)
    if grain and high - low <= BINS * grain:
        step = grain
    elif grain:
        step = math.ceil(step / grain) * grain
    # One bar more than reaches ``high``: bars hold their lower bound, not their upper.
    edges = np.arange(math.floor(low / step), math.floor(high / step) + 2) * step
    wide = max(nice((edges[-1] - edges[0]) / 6), grain)
    ticks = range(math.ceil(edges[0] / wide), math.floor(edges[-1] / wide) + 1)
    return edges, [i * wide for i in ticks]


def nice(step: float) -> float:
    """The next of 1, 2, 5 × 10^n that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return (
        f"{value / 1e3:g} k" if value >= 10_000 else f"{value:,.0f}" if value >= 1 else f"{value:g}"
    )
