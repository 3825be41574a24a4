"""Tables of a report: who the runs are, where their configurations differ, and every number."""

import json
from collections.abc import Callable, Mapping, Sequence

from pretrain.page.show import escape, number
from pretrain.report.charts import percent, short
from pretrain.report.pieces import chip, evaluate, missing, section, table
from pretrain.report.read import Run, details
from pretrain.results import Finished
from pretrain.tracking.journal import flatten

# Words in a metric's name that say what is good, and how it is written.
_HIGHER = ("top1", "top5", "mean_per_class", "precision", "recall", "agreement", "accuracy", "_r")
_LOWER = ("kid", "fid", "loss", "seconds", "passes_per_image")
_SHARES = ("top1", "top5", "mean_per_class", "chance", "precision", "recall", "accuracy", "_r")
# Of a run's configuration what says nothing about the model.
_IDLE = ("output", "name", "tracking.", "watchdog.", "data.read.", "data.workers", "checkpoint.")


def direction(metric: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where neither."""
    last = metric.rsplit("/", 1)[-1]
    if last.endswith("_std") or last in ("chance", "logit_scale"):
        return 0
    if last == "images_per_second" or any(w in last for w in _HIGHER):
        return 1
    return -1 if any(last.startswith(w) or last == w for w in _LOWER) else 0


def shown(metric: str, value: float | None) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "–"
    last = metric.rsplit("/", 1)[-1]
    if any(w in last for w in _SHARES) and 0 <= value <= 1:
        return f"{100 * value:.1f} %"
    return number(value) if abs(value) >= 1000 else f"{value:.4g}"


def who(runs: Sequence[Run]) -> str:
    """A row a run: its data, size, progress and what of it was scored."""
    head = [("Run", False), ("Parameters", True), ("Samples", True), ("Checkpoint", False)]
    head += [("Weights", False), ("Training data", False), ("Objectives", False), ("Suite", False)]
    rows = []
    for run in runs:
        model = run.scorecard.model if run.scorecard else None
        data = run.config.get("data", {}).get("train", "–")
        use = run.config.get("ema", {}).get("use")
        weights = model.weights if model else f"ema-{use}" if use else "weights"
        rows.append(
            [
                f"{chip(run)} {escape(run.name)}",
                f"{short(run.parameters)}" if run.parameters else "not known",
                number(run.samples) if run.samples is not None else "–",
                escape(model.checkpoint) if model else "not scored",
                escape(weights),
                escape(", ".join(map(str, data)) if isinstance(data, list) else data),
                escape(", ".join(run.config.get("objectives", {})) or "–"),
                escape(run.scorecard.suite) if run.scorecard else "none",
            ]
        )
    told = "".join(
        missing(
            f"{run.name} has no scorecard.",
            f"python -m pretrain evaluate --output {run.output} --suite SUITE.yaml",
        )
        for run in runs
        if not run.scorecard
    )
    told += "".join(
        missing(f"{run.name} left no configuration: there is no {run.output}/config.json.")
        for run in runs
        if not run.config
    )
    listed = f'<div class="tables">{table(head, rows)}</div>{told}'
    return section("Runs", "What was trained, and what of it was scored.", listed)


def differences(runs: Sequence[Run]) -> str:
    """Every field in which the configurations differ; what says nothing of the model left out."""
    if len(runs) < 2:
        note = "One run alone: give several, and what sets them apart stands here."
        return section("Configuration", note, "")
    flat = [flatten(run.config) for run in runs]
    names = sorted({n for f in flat for n in f if not n.startswith(_IDLE)})
    differing = [n for n in names if len({f.get(n) for f in flat}) > 1]
    head = [("Field", False), *((f"{run.letter} {run.name}", False) for run in runs)]
    rows = [
        [f"<code>{escape(n)}</code>", *(escape(f.get(n, "–")) for f in flat)] for n in differing
    ]
    note = f"{len(differing)} of {len(names)} fields differ; names, paths and clocks left out."
    return section("Configuration", note, table(head, rows) if rows else "")


def metrics(runs: Sequence[Run]) -> str:
    """Every number of every entry: a table for each evaluator and set, the best in bold."""
    groups: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for entry in run.entries():
            for metric in entry.metrics:
                if not metric.startswith("cost/"):
                    names = groups.setdefault(_group(metric, entry), [])
                    names += [] if metric in names else [metric]
    tables = []
    for (evaluator, name), names in groups.items():
        title = f"{evaluator.replace('_', ' ')}{f' on {name}' if name else ''}"
        prefix = f"{evaluator}/{name}/" if name else f"{evaluator}/"
        tables.append(f"<h3>{escape(title)}</h3>{_compared(runs, names, prefix)}")
        if evaluator == "generation":
            found = (n for d in details(runs, evaluator) for n in d.fields.get("notes", ()))
            told = dict.fromkeys(str(n) for n in found if str(n).startswith(f"{name}: "))
            tables += [f"<p>{escape(n)}</p>" for n in told]
    note = "The best value of a column is bold where one is better than another."
    body = "".join(tables) or _none(runs)
    return section("All numbers", note, f'<div class="tables">{body}</div>')


def cost(runs: Sequence[Run]) -> str:
    """What training and every entry took."""
    head = [("Run", False), ("Training", True), ("Images/s", True), ("MFU", True)]
    rows = []
    for run in runs:
        seconds = run.progress.get("seconds")
        speed, used = (_last(run, n) for n in ("images_per_second", "mfu"))
        rows.append(
            [
                f"{chip(run)} {escape(run.name)}",
                f"{seconds / 60:.1f} min" if seconds else "not finished",
                f"{speed:.4g}" if speed is not None else "–",
                percent(used) if used is not None else "–",
            ]
        )
    trained = f"<h3>Training</h3>{table(head, rows)}"
    names = list(
        dict.fromkeys(
            n for r in runs for e in r.entries() for n in e.metrics if n.startswith("cost/")
        )
    )
    extra: list[tuple[str, Callable[[Finished], float | None]]] = [
        ("seconds of wall clock", lambda e: e.seconds),
        ("ranks", lambda e: float(e.ranks)),
    ]
    scored = (
        _compared(runs, names, "cost/", extra) if any(r.entries() for r in runs) else _none(runs)
    )
    note = (
        "Training without evaluation and saving; images/s is the last logged, of all ranks. Of an "
        "entry: seconds, images a second and passes of the network an image, as its evaluator "
        "counted them."
    )
    return section("Cost", note, f'<div class="tables">{trained}<h3>Evaluation</h3>{scored}</div>')


def _compared(
    runs: Sequence[Run],
    names: Sequence[str],
    prefix: str,
    extra: Sequence[tuple[str, Callable[[Finished], float | None]]] = (),
) -> str:
    """A row for each entry that has one of the metrics, runs of one entry under each other."""
    picked = [
        (run, entry)
        for run in runs
        for entry in run.entries()
        if extra or any(n in entry.metrics for n in names)
    ]
    order = list(dict.fromkeys(entry.name for _, entry in picked))
    picked.sort(key=lambda pair: (order.index(pair[1].name), pair[0].number))
    best = _best([e.metrics for _, e in picked], names)
    heads = [n.removeprefix(prefix).replace("_", " ") for n in names]
    head = [("Entry", False), *((h, True) for h in heads)]
    head += [(title, True) for title, _ in extra]
    rows = []
    for run, entry in picked:
        label = f"{chip(run)} " if len(runs) > 1 else ""
        settings = escape(json.dumps(entry.settings, ensure_ascii=False))
        cells = [f'{label}<span title="{settings}">{escape(entry.name)}</span>']
        for name in names:
            value = entry.metrics.get(name)
            text = shown(name, value) if name in entry.metrics else ""
            is_best = value is not None and value == best.get(name)
            cells.append(f'<b class="best">{text}</b>' if is_best else text)
        cells += [f"{value:.4g}" for _, take in extra if (value := take(entry)) is not None]
        rows.append(cells)
    return table(head, rows)


def _best(entries: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> dict[str, float]:
    found = {}
    for name in names:
        values = [v for e in entries if (v := e.get(name)) is not None]
        if direction(name) and len(set(values)) > 1:
            found[name] = max(values) if direction(name) > 0 else min(values)
    return found


def _group(metric: str, entry: Finished) -> tuple[str, str]:
    """Evaluator and set of a metric; no set where the entry names none."""
    evaluator, _, rest = metric.partition("/")
    name = rest.partition("/")[0]
    return (evaluator, name if name in entry.settings.get("sets", {}) else "")


def _none(runs: Sequence[Run]) -> str:
    return missing("No run has a scorecard.", evaluate(runs[0], "entries of any evaluator"))


def _last(run: Run, name: str) -> float | None:
    points = run.series.get(name)
    return points[-1][1] if points else None
