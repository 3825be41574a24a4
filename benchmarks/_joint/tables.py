"""The study's lines as Markdown tables and a plot."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._joint import results, stats
from benchmarks._joint.cells import BY_NAME, VARIANTS
from benchmarks._joint.corpus import SETS

Lines = dict[str, dict[int, dict[str, Any]]]  # variant, seed -> line

PERCENT, PLAIN, MILLIONS = ("%", 100.0, 1), ("", 1.0, 4), (" M", 1e-6, 2)
COLUMNS = (
    ("vendor top-1", "zero_shot/vendor/top1", PERCENT),
    ("vendor top-5", "zero_shot/vendor/top5", PERCENT),
    ("concepts top-1", "zero_shot/concepts/top1", PERCENT),
    ("concepts top-5", "zero_shot/concepts/top5", PERCENT),
    ("KID", "generation/concepts/kid", PLAIN),
    ("L_IG, concepts", "held_out/concepts/generate/loss", PLAIN),
    ("L_ITA, concepts", "held_out/concepts/align/loss", PLAIN),
)
RETRIEVAL = tuple(
    (f"{name} {shown} R@{k}", f"retrieval/{name}/{way}_r{k}", PERCENT)
    for name in SETS
    for shown, way in (("image→text", "image_to_text"), ("text→image", "text_to_image"))
    for k in (1, 10)
)
COSTS = (
    ("parameters it needs", "parameters", MILLIONS),
    ("minutes of training", "minutes", ("", 1.0, 1)),
    ("images/s of training", "images_per_second", ("", 1.0, 1)),
)
PAIRS = (
    ("joint", "align", "zero_shot/vendor/top1"),
    ("joint", "align", "zero_shot/concepts/top1"),
    ("joint", "two_tower", "zero_shot/vendor/top1"),
    ("joint", "two_tower", "zero_shot/concepts/top1"),
    ("joint", "generate", "generation/concepts/kid"),
    ("joint", "generate", "held_out/concepts/generate/loss"),
    ("joint", "plain_unet", "generation/concepts/kid"),
)
_GRID = re.compile(r"zero_shot/vendor/top1\[steps=(\d+),noises=(\d+),guidance=([\d.]+)\]")


def render(path: Path) -> str:
    """Every table there are lines for."""
    lines = results.by_variant(results.read(path).values())
    parts = []
    main = [v.name for v in VARIANTS if v.group == "main" and v.name in lines]
    ablations = [v.name for v in VARIANTS if v.group == "ablations" and v.name in lines]
    if main:
        parts += [table("Main", main, lines, COLUMNS), table("Retrieval", main, lines, RETRIEVAL)]
        parts += [table("Cost", main, lines, COSTS), compared(lines, PAIRS)]
    if ablations:
        parts.append(table("Ablations", ablations, lines, COLUMNS))
        measured = (
            *(f"zero_shot/{name}/top1" for name in SETS),
            *(f"held_out/concepts/{name}/loss" for name in ("align", "generate")),
        )
        others = [name for name in ablations if name != "half"]
        against = [(name, "half", metric) for metric in measured for name in others]
        parts.append(compared(lines, against))
    parts += [grid(name, lines[name]) for name in ("chains", "guided") if name in lines]
    return "\n\n".join(part for part in parts if part) or "No result yet."


def table(
    title: str, names: Iterable[str], lines: Lines, columns: Sequence[tuple[str, str, Any]]
) -> str:
    """Mean ± standard deviation over seeds, a row a variant; no column without a value."""
    names = list(names)
    shown = [c for c in columns if any(_values(lines[n], c[1]) for n in names)]
    if not shown:
        return ""
    rows = [[title, "seeds", "samples", *(c[0] for c in shown)]]
    for name in names:
        cells = [
            f"{name}: {BY_NAME[name].what}",
            str(len(lines[name])),
            ", ".join(f"{s:,}" for s in sorted({x["samples"] for x in lines[name].values()})),
        ]
        rows.append([*cells, *(_shown(_values(lines[name], key), how) for _, key, how in shown)])
    chances = [_chance(c[1], names, lines) for c in shown]
    if any(chances):
        rows.append(["chance", "", "", *chances])
    return _markdown(rows)


def compared(lines: Lines, pairs: Iterable[tuple[str, str, str]]) -> str:
    """Differences over the seeds that both have, with tests."""
    rows = [
        [
            "difference",
            "seeds",
            "mean ± sd",
            "paired t, p",
            "95% over pictures",
            "McNemar p, by seed",
        ]
    ]
    for ours, other, metric in pairs:
        if ours not in lines or other not in lines:
            continue
        seeds = sorted(lines[ours].keys() & lines[other].keys())
        a, b = ([_value(lines[n][s], metric) for s in seeds] for n in (ours, other))
        both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        if not both:
            continue
        top1 = metric.startswith("zero_shot/")
        how = (" points", 100.0, 2) if top1 else PLAIN
        t, p = stats.paired_t([x for x, _ in both], [y for _, y in both])
        row = [f"{ours} − {other}, {metric}", str(len(both)), _shown([x - y for x, y in both], how)]
        row.append("-" if math.isnan(t) else f"t = {t:.2f}, p = {p:.3f}")
        rows.append([*row, *(_pictures(lines, ours, other, seeds, metric) if top1 else ("", ""))])
    return _markdown(rows) if len(rows) > 1 else ""


def grid(name: str, seeds: dict[int, dict[str, Any]]) -> str:
    """Top-1 on the held-out vendor by steps, noises and guidance, and what it costs."""
    rows = [
        ["chain on the " + BY_NAME[name].of + " model", "passes an image", "vendor top-1", "top-5"]
    ]
    some = next(iter(seeds.values()))["metrics"]
    for metric in some:
        found = _GRID.fullmatch(metric)
        if not found:
            continue
        steps, noises, w = found[1], found[2], float(found[3])
        passes = int(steps) * int(noises) * (2 if w else 1)
        top5 = metric.replace("/top1[", "/top5[")
        label = f"{steps} steps × {noises} noises" + (
            f", guidance {w:g}" if name == "guided" else ""
        )
        values = (_shown(_values(seeds, m), PERCENT) for m in (metric, top5))
        rows.append([label, str(passes), *values])
    return _markdown(rows)


def plot(path: Path, out: Path) -> bool:
    """Zero-shot accuracy against KID (or held-out L_IG where there is none), a point a cell; False
    without matplotlib or results."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    lines = results.by_variant(results.read(path).values())
    main = [v.name for v in VARIANTS if v.group == "main" and v.name in lines]
    y = "generation/concepts/kid"
    if not any(_values(lines[n], y) for n in main):
        y = "held_out/concepts/generate/loss"
    if not main:
        return False
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for number, name in enumerate(main):
        points = [(_value(x, "zero_shot/vendor/top1"), _value(x, y)) for x in lines[name].values()]
        color = f"C{number}"
        for i, (across, up) in enumerate(points):
            label = name if i == 0 else None
            if across is not None and up is not None:
                axes.scatter([100 * across], [up], color=color, s=45, label=label)
            elif across is not None:  # a network for one task is a line
                axes.axvline(100 * across, ls=":", color=color, label=label)
            elif up is not None:
                axes.axhline(up, ls="--", lw=1, color=color, label=label)
    axes.set_xlabel("zero-shot top-1 on the held-out vendor, %")
    axes.set_ylabel("KID on held-out concepts" if "kid" in y else "held-out L_IG, concepts")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
    return True


def insert(document: Path, text: str) -> None:
    """Put ``text`` between the marks of ``document``.

    Raises:
        ValueError: it has no marks.
    """
    begin, end = "<!-- joint: begin -->", "<!-- joint: end -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, also, after = rest.partition(end)
    if not found or not also:
        raise ValueError(f"{document} has no {begin} … {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _pictures(
    lines: Lines, ours: str, other: str, seeds: list[int], metric: str
) -> tuple[str, str]:
    name = metric.split("/")[1]

    def hits(variant: str) -> list[np.ndarray]:
        found = [lines[variant][s]["hits"][name] for s in seeds]
        return [stats.unpack(h["top1"], h["n"]) for h in found]

    a, b = hits(ours), hits(other)
    low, high = stats.bootstrap(np.stack(a), np.stack(b))
    tests = ", ".join(f"{stats.mcnemar(x, y):.3g}" for x, y in zip(a, b, strict=True))
    return f"[{100 * low:+.2f}, {100 * high:+.2f}] points", tests


def _value(line: dict[str, Any], key: str) -> float | None:
    if key == "minutes":
        return float(line["seconds"]) / 60
    value = line["metrics"].get(key, line.get(key))
    return None if value is None else float(value)


def _values(seeds: dict[int, dict[str, Any]], key: str) -> list[float]:
    found = (_value(line, key) for line in seeds.values())
    return [value for value in found if value is not None]


def _chance(key: str, names: list[str], lines: Lines) -> str:
    if not key.startswith("zero_shot/"):
        return ""
    times = 5 if key.endswith("top5") else 1
    values = [v for n in names for v in _values(lines[n], f"{key.rsplit('/', 1)[0]}/chance")]
    return _shown([times * values[0]], PERCENT) if values else ""


def _shown(values: list[float], how: tuple[str, float, int]) -> str:
    if not values:
        return "-"
    unit, scale, digits = how
    mean, deviation = stats.mean_sd([scale * v for v in values])
    spread = "" if math.isnan(deviation) else f" ± {deviation:.{digits}f}"
    return f"{mean:.{digits}f}{spread}{unit}"


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body]]
    return "\n".join(lines)
