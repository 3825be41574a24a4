"""A report: runs side by side on one page that needs nothing else.

Captions, class names and prompts come from strangers: all pass through `show.escape`.
"""

from collections.abc import Sequence
from importlib import resources

from pretrain.page.document import document, figures
from pretrain.page.show import escape
from pretrain.report import heads, tables
from pretrain.report.charts import percent, short
from pretrain.report.confusion import confusions
from pretrain.report.pictures import retrieval, samples
from pretrain.report.read import Run


def render(runs: Sequence[Run]) -> str:
    """The page.

    Raises:
        DataError: a file that a scorecard names cannot be read.
    """
    body = (
        tables.who(runs)
        + heads.pareto(runs)
        + heads.curves(runs)
        + samples(runs)
        + confusions(runs)
        + retrieval(runs)
        + tables.metrics(runs)
        + tables.cost(runs)
        + tables.differences(runs)
    )
    title = " · ".join(run.name for run in runs)
    style = resources.files("pretrain.report").joinpath("report.css").read_text("utf-8")
    read = ", ".join(str(run.output) for run in runs)
    footer = f"Read from {escape(read)}."
    over = "Report of a run" if len(runs) == 1 else f"Report of {len(runs)} runs"
    return document(over, title, heads.lead(runs), _figures(runs), body, footer, style)


def _figures(runs: Sequence[Run]) -> str:
    """The best of each kind over all runs."""
    entries = []
    kinds = [
        ("best zero-shot top-1", "zero_shot/", "/top1", True),
        ("best KID", "generation/", "/kid", False),
        ("best image → text R@1", "retrieval/", "/image_to_text_r1", True),
    ]
    for title, start, end, higher in kinds:
        found = [
            (value, name.split("/")[1], run)
            for run in runs
            for entry in run.entries()
            for name, value in entry.metrics.items()
            if value is not None and name.startswith(start) and name.endswith(end)
        ]
        if found:
            best = (max if higher else min)(found, key=lambda f: f[0])
            value = percent(best[0]) if higher else f"{best[0]:.4g}"
            where = f"{best[2].letter} on {best[1]}" if len(runs) > 1 else f"on {best[1]}"
            entries.append((title, value, escape(where)))
    sizes = [run.parameters for run in runs if run.parameters]
    if sizes:
        told = (
            short(min(sizes))
            if min(sizes) == max(sizes)
            else f"{short(min(sizes))} to {short(max(sizes))}"
        )
        entries.append(("parameters", told, "of the whole model"))
    seen = [run.samples for run in runs if run.samples is not None]
    if seen:
        told = (
            short(min(seen))
            if min(seen) == max(seen)
            else f"{short(min(seen))} to {short(max(seen))}"
        )
        entries.append(("samples seen", told, "in training"))
    return figures(entries)
