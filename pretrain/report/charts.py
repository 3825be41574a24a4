"""Charts of a report as inline SVG: lines, points, matrices. Colours come from the style sheet, as
classes c0 to c5."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pretrain.page.show import escape, nice, number

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 26, 38
COLOURS = 6
MOST_POINTS = 150  # of a line; of more, each drawn one is the mean of its neighbours
Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """Points joined in the order of x.

    Attributes:
        name: told at each point.
        colour: number of the run.
        dashed: with a dot at each point: values measured seldom.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A point of a scatter.

    Attributes:
        letter: written in it; empty makes it small.
    """

    x: float
    y: float
    colour: int
    told: str
    letter: str = ""


@dataclass(frozen=True)
class Axis:
    """What is on an axis, and how its numbers are written."""

    what: str
    shown: Format = number


@dataclass(frozen=True)
class Frame:
    """Where values lie in the picture.

    Attributes:
        x, y: (low, high) of each axis.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = field(default=LEFT)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        wide, tall = self.width - self.left - RIGHT, self.height - TOP - BOTTOM
        share_x = (x - self.x[0]) / (self.x[1] - self.x[0])
        share_y = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + wide * share_x, self.height - BOTTOM - tall * share_y


def lines(found: Sequence[Line], x: Axis, y: Axis, spoken: str) -> str:
    """A chart of lines; at least one point in all. Values that are not finite are gaps."""
    drawn = [(line, _finite(line.points)) for line in found]
    flat = [p for _, points in drawn for p in points]
    frame = Frame(_around([p[0] for p in flat], True), _around([p[1] for p in flat]))
    parts = _axes(frame, x, y)
    for line, points in drawn:
        thin = _thin(points)
        colour = f"c{line.colour % COLOURS}"
        placed = " ".join(f"{a:.1f},{b:.1f}" for a, b in (frame.at(*p) for p in thin))
        kind = "line dashed" if line.dashed else "line"
        parts.append(f'<polyline class="{kind} {colour}" points="{placed}"/>')
        for px, py in thin:
            a, b = frame.at(px, py)
            told = f"{line.name}: {y.shown(py)} at {x.shown(px)} {x.what}"
            mark = f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>'
            parts.append(
                f"<g>{mark if line.dashed or len(thin) == 1 else ''}"
                f'<circle class="touch" cx="{a:.1f}" cy="{b:.1f}" r="7"/>'
                f"<title>{escape(told)}</title></g>"
            )
    return _svg(frame, parts, spoken)


def scatter(
    dots: Sequence[Dot],
    joined: Sequence[tuple[int, Sequence[tuple[float, float]]]],
    front: Sequence[tuple[float, float]],
    x: Axis,
    y: Axis,
    spoken: str,
) -> str:
    """Points; ``joined`` thin lines in the colour of a run, ``front`` a dashed staircase."""
    frame = Frame(
        _around([d.x for d in dots], margin=0.12), _around([d.y for d in dots], margin=0.12)
    )
    parts = _axes(frame, x, y)
    steps: list[tuple[float, float]] = []
    for point in sorted(front):
        if steps:
            steps.append((steps[-1][0], point[1]))
        steps.append(point)
    for kind, points in [("front", steps), *((f"thread c{c % COLOURS}", p) for c, p in joined)]:
        if len(points) > 1:
            placed = " ".join(f"{a:.1f},{b:.1f}" for a, b in (frame.at(*p) for p in points))
            parts.append(f'<polyline class="{kind}" points="{placed}"/>')
    for dot in sorted(dots, key=lambda d: bool(d.letter)):
        a, b = frame.at(dot.x, dot.y)
        radius = 8 if dot.letter else 3.6
        letter = (
            f'<text class="letter" x="{a:.1f}" y="{b + 3.8:.1f}">{escape(dot.letter)}</text>'
            if dot.letter
            else ""
        )
        parts.append(
            f'<g><circle class="dot c{dot.colour % COLOURS}" cx="{a:.1f}" cy="{b:.1f}" '
            f'r="{radius}"/>{letter}<circle class="touch" cx="{a:.1f}" cy="{b:.1f}" r="9"/>'
            f"<title>{escape(dot.told)}</title></g>"
        )
    return _svg(frame, parts, spoken)


def matrix(
    shares: Sequence[Sequence[float]],
    rows: Sequence[str],
    told: Callable[[int, int], str],
    spoken: str,
) -> str:
    """A square of cells, darker for a greater share.

    Args:
        shares: [row][column] in [0, 1]; cells of 0 are left empty.
        rows: name of each row; columns bear the rows' numbers.
        told: text of the cell at (row, column).
    """
    n = len(shares)
    cell, left, top = 14, 132, 22
    width, height = left + n * cell + 4, top + n * cell + 4
    parts = [f'<rect class="back" x="{left}" y="{top}" width="{n * cell}" height="{n * cell}"/>']
    for i in range(n):
        y = top + i * cell
        parts.append(
            f'<text class="y" x="{left - 5}" y="{y + 10}">{escape(_cut(rows[i], 16))} '
            f'<tspan class="faint">{i + 1}</tspan><title>{escape(rows[i])}</title></text>'
        )
        if n <= 12 or i % 2 == 0:
            x = left + (i + 0.5) * cell
            parts.append(f'<text class="x" x="{x}" y="{top - 6}">{i + 1}</text>')
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if share <= 0:
                continue
            # A square root: one confusion in a hundred is still to be seen.
            strength = 0.12 + 0.88 * math.sqrt(min(share, 1.0))
            parts.append(
                f'<rect class="{"right" if i == j else "wrong"}" x="{left + j * cell}" '
                f'y="{top + i * cell}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{strength:.2f}"><title>{escape(told(i, j))}</title></rect>'
            )
    return (
        f'<svg class="matrix" viewBox="0 0 {width} {height}" style="max-width:{1.25 * width:.0f}px"'
        f' role="img" aria-label="{escape(spoken)}">{"".join(parts)}</svg>'
    )


def percent(value: float) -> str:
    """A share as a percentage, with as many figures as it bears."""
    return f"{100 * value:.3g} %"


def short(value: float) -> str:
    """A number of samples in little room."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


def _svg(frame: Frame, parts: Sequence[str], spoken: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(spoken)}">{"".join(parts)}</svg>'
    )


def _axes(frame: Frame, x: Axis, y: Axis) -> list[str]:
    floor, end = frame.height - BOTTOM, frame.width - RIGHT
    parts = []
    for value in _ticks(*frame.y, 4):
        b = frame.at(frame.x[0], value)[1]
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{end}" y1="{b:.1f}" y2="{b:.1f}"/>'
            f'<text class="y" x="{frame.left - 6}" y="{b + 3.5:.1f}">'
            f"{escape(y.shown(value))}</text>"
        )
    for value in _ticks(*frame.x, 5):
        a = frame.at(value, frame.y[0])[0]
        parts.append(
            f'<line class="grid" x1="{a:.1f}" x2="{a:.1f}" y1="{TOP}" y2="{floor + 4}"/>'
            f'<text class="x" x="{a:.1f}" y="{floor + 16}">{escape(x.shown(value))}</text>'
        )
    parts.append(f'<text class="unit" x="{end}" y="{frame.height - 6}">{escape(x.what)}</text>')
    parts.append(f'<text class="title" x="{4}" y="{TOP - 12}">{escape(y.what)}</text>')
    return parts


def _around(
    values: Sequence[float], from_zero: bool = False, margin: float = 0.06
) -> tuple[float, float]:
    """Bounds with room about the values; never of no extent."""
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    bottom = low - room
    if low >= 0:
        bottom = 0.0 if from_zero else max(0.0, bottom)
    return bottom, high if from_zero and high > bottom else high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    step = nice((high - low) / about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [p for p in points if math.isfinite(p[1])]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return list(points)
    bounds = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    groups = [points[a:b] for a, b in pairwise(bounds) if b > a]
    return [(g[-1][0], sum(v for _, v in g) / len(g)) for g in groups]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
