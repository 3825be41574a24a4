"""A page that needs nothing else: no script, no network, pictures inlined.

Much of what stands on it comes from strangers: all of it passes through `show.escape`, and the
page's content policy lets nothing load or run.
"""

from collections.abc import Sequence
from importlib import resources
from string import Template

from pretrain.page.show import escape


def document(
    over: str, title: str, lead: str, figures: str, body: str, footer: str, style: str = ""
) -> str:
    """A page of the house's looks.

    Args:
        over, title: plain text; escaped here.
        lead, figures, body, footer: HTML.
        style: CSS of the caller's own, after the house's.
    """
    template = resources.files("pretrain.page").joinpath("document.html").read_text("utf-8")
    return Template(template).substitute(
        over=escape(over),
        title=escape(title),
        lead=lead,
        figures=f'<dl class="figures">{figures}</dl>' if figures else "",
        body=body,
        footer=footer,
        style=style,
    )


def figures(entries: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: (name, value, note) each, as HTML."""
    return "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in entries
    )


def card(title: str, chart: str, note: str = "", wide: bool = False) -> str:
    """A titled box round ``chart`` (HTML), with a plain note under it."""
    kind = "card wide" if wide else "card"
    below = f"<p>{escape(note)}</p>" if note else ""
    return f'<section class="{kind}"><h3>{escape(title)}</h3>{chart}{below}</section>'
