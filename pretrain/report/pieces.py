"""Small pieces of HTML that every part of a report is made of."""

import re
from collections.abc import Iterable, Sequence

from pretrain.page.show import escape
from pretrain.report.charts import COLOURS
from pretrain.report.read import Run

_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def chip(run: Run) -> str:
    """A run's letter in its colour."""
    return f'<b class="chip c{run.number % COLOURS}" title="{escape(run.name)}">{run.letter}</b>'


def key(runs: Sequence[Run]) -> str:
    """Which letter is which run; nothing where there is one."""
    if len(runs) < 2:
        return ""
    named = "".join(f"<li>{chip(r)} {escape(r.name)}</li>" for r in runs)
    return f'<ul class="key">{named}</ul>'


def image(png: object, told: str) -> str:
    """A picture given as base64 PNG; a blank frame with a word where it is none."""
    text = str(png or "").removeprefix("data:image/png;base64,")
    if not (text.startswith("iVBORw0KGgo") and _BASE64.fullmatch(text)):
        return '<span class="none">no picture</span>'
    return f'<img src="data:image/png;base64,{text}" alt="{escape(told)}" title="{escape(told)}">'


def missing(what: str, command: str = "") -> str:
    """What is not there, and the command that makes it."""
    made = f" Make it with <code>{escape(command)}</code>." if command else ""
    return f'<p class="missing">{escape(what)}{made}</p>'


def evaluate(run: Run | None, entry: str) -> str:
    """The command that adds an entry such as ``entry`` to a run's scorecard."""
    output = str(run.output) if run else "RUN"
    return f"python -m pretrain evaluate --output {output} --suite SUITE.yaml  # {entry}"


def section(title: str, note: str, body: str) -> str:
    """A headed part of the page; ``note`` and ``body`` are HTML."""
    return f"<h2>{escape(title)}</h2><p>{note}</p>{body}"


def table(head: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        head: (title, whether the column holds numbers).
        rows: cells as HTML.
    """
    kinds = [' class="n"' if numbers else "" for _, numbers in head]
    top = "".join(f"<th{k}>{escape(t)}</th>" for (t, _), k in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
