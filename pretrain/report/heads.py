"""Both heads in charts: how they learned, and where they ended."""

from collections.abc import Sequence

from pretrain.page.document import card
from pretrain.page.show import escape
from pretrain.report import charts
from pretrain.report.charts import Axis, Dot, Line
from pretrain.report.pieces import evaluate, key, missing, section
from pretrain.report.read import Run
from pretrain.results import Finished

HEADS = {
    "generate": "Generation head: loss",
    "align": "Alignment head: loss",
    "denoise_text": "Text denoising: loss",
    "cdcd": "Contrast of captions (CDCD): loss",
    "disco": "Codes (DisCo-Diff): entropy bonus",
    "dcd": "Energy of the query (DCD): loss",
}
_SAMPLES = Axis("samples", charts.short)


def curves(runs: Sequence[Run]) -> str:
    """Losses of training and of validation, and what training measured of both heads, against
    samples."""
    known = {name for run in runs for name in run.series}
    losses = [n for n in known if n.endswith("/loss") and not n.startswith("validation/")]
    losses = [n for n in losses if n.count("/") == 1]
    cards = []
    for name in sorted(losses, key=lambda n: (n.split("/")[0] not in HEADS, n)):
        head = name.split("/")[0]
        cards.append(_card(runs, HEADS.get(head, f"{head}: loss"), name, f"validation/{name}"))
    if "align/accuracy" in known:
        cards.append(
            _card(
                runs,
                "Alignment head: accuracy in the batch",
                "align/accuracy",
                "validation/align/accuracy",
                Axis("accuracy", charts.percent),
            )
        )
    for name in sorted(n for n in known if n.startswith("zero_shot/") and n.endswith("/top1")):
        if any(len(run.series.get(name, ())) > 1 for run in runs):
            title = f"Zero-shot top-1 on {name.split('/')[1]}"
            cards.append(_card(runs, title, "", name, Axis("top-1", charts.percent)))
    told = [
        missing(f"{run.name} left no metrics of training: its folder has no journal.")
        for run in runs
        if not run.series
    ]
    told += [
        missing(
            f"{run.name} was not validated in training.",
            f"python -m pretrain evaluate --output {run.output} --only validation",
        )
        for run in runs
        if run.series and not any(n.startswith("validation/") for n in run.series)
    ]
    note = (
        "Lines are means between two logs of training; dashed lines with dots are evaluations on "
        "held-out data. Point at a line for its numbers."
    )
    body = f'{key(runs)}<div class="charts">{"".join(cards)}</div>{"".join(told)}'
    return section("Curves", note, body)


def _card(
    runs: Sequence[Run], title: str, trained: str, held_out: str, y: Axis | None = None
) -> str:
    y = y or Axis("loss")
    found = []
    for run in runs:
        for name, dashed in ((trained, False), (held_out, True)):
            points = run.series.get(name, [])
            if points:
                what = "held-out" if dashed else "training"
                found.append(Line(f"{run.letter} {run.name}, {what}", run.number, points, dashed))
    if not any(v == v and abs(v) < float("inf") for line in found for _, v in line.points):
        return card(title, missing("No finite value was logged."))
    ends = [
        f"{run.letter} {y.shown(run.series[n][-1][1])}"
        for run in runs
        for n in [held_out if run.series.get(held_out) else trained]
        if run.series.get(n)
    ]
    spoken = f"{title} against samples; last values: {', '.join(ends)}"
    return card(title, charts.lines(found, _SAMPLES, y, spoken), f"Last: {', '.join(ends)}.")


def pareto(runs: Sequence[Run]) -> str:
    """KID of every generation entry against top-1 of every zero-shot entry, a chart for each set
    that has both."""
    note = (
        "Right and down is better. A run's large point joins its best entries of both kinds: the "
        "settings of one head's inference leave the other's alone. Small points are its other "
        "entries, each at the run's best of the other kind; the dashed line is the Pareto front."
    )
    sets = {n.split("/")[1] for run in runs for n in _metrics(run) if n.count("/") == 2}
    cards = [c for c in (_pareto(runs, name) for name in sorted(sets)) if c]
    told = []
    for run in runs:
        if not any(n.endswith("/kid") for n in _metrics(run)):
            told.append(missing(f"{run.name} has no KID.", evaluate(run, "evaluator: generation")))
        if not any(n.startswith("zero_shot/") for n in _metrics(run)):
            told.append(
                missing(
                    f"{run.name} has no zero-shot accuracy.", evaluate(run, "evaluator: zero_shot")
                )
            )
    if not cards and not told:
        told.append(
            missing("No set has both a KID and a zero-shot accuracy: score one set by both.")
        )
    body = f'{key(runs)}<div class="charts roomy">{"".join(cards)}</div>' if cards else ""
    return section("Generation against alignment", note, body + "".join(told))


def _metrics(run: Run) -> list[str]:
    return [n for e in run.entries() for n, v in e.metrics.items() if v is not None]


def _pareto(runs: Sequence[Run], name: str) -> str:
    top1, kid = f"zero_shot/{name}/top1", f"generation/{name}/kid"
    dots: list[Dot] = []
    threads: list[tuple[int, list[tuple[float, float]]]] = []
    corners: list[tuple[float, float]] = []
    for run in runs:
        right, low = _by(run, top1), _by(run, kid)
        if not right or not low:
            continue
        (best_x, at_x), (best_y, at_y) = max(right, key=lambda p: p[0]), min(low, key=_value)
        corners.append((best_x, best_y))
        told = f"{run.letter} {run.name}: top-1 {charts.percent(best_x)} ({at_x.name}), "
        told += f"KID {best_y:.4g} ({at_y.name})"
        dots.append(Dot(best_x, best_y, run.number, told, run.letter))
        for x, entry in right:
            said = f"{run.letter} {entry.name}: top-1 {charts.percent(x)}"
            dots.append(Dot(x, best_y, run.number, said))
        for y, entry in low:
            dots.append(Dot(best_x, y, run.number, f"{run.letter} {entry.name}: KID {y:.4g}"))
        for ends in ([(x, best_y) for x, _ in right], [(best_x, y) for y, _ in low]):
            threads.append((run.number, sorted(ends)))
    if not corners:
        return ""
    front = [
        c for c in corners if not any(o != c and o[0] >= c[0] and o[1] <= c[1] for o in corners)
    ]
    across, up = Axis("zero-shot top-1", charts.percent), Axis("KID (lower is better)")
    spoken = f"KID against zero-shot top-1 on {name} of {len(corners)} runs"
    chart = charts.scatter(dots, threads, front, across, up, spoken)
    return card(f"Set {name}", chart)


def _by(run: Run, metric: str) -> list[tuple[float, Finished]]:
    values = [(e.metrics.get(metric), e) for e in run.entries()]
    return [(v, e) for v, e in values if v is not None]


def _value(pair: tuple[float, Finished]) -> float:
    return pair[0]


def lead(runs: Sequence[Run]) -> str:
    """One sentence about what stands on the page, as HTML."""
    named = [f"<b>{escape(run.name)}</b>" for run in runs]
    several = (
        f"{', '.join(named[:-1])} and {named[-1]}, side by side" if len(named) > 1 else named[0]
    )
    scored = sum(bool(run.scorecard) for run in runs)
    entries = sum(len(run.entries()) for run in runs)
    return f"{several}. {entries} scored entries of {scored} of {len(runs)} runs."
