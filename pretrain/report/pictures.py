"""Pictures of a report: what the models draw, and what they find."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.page.show import escape
from pretrain.report.charts import COLOURS
from pretrain.report.pieces import chip, evaluate, image, key, missing, section
from pretrain.report.read import Details, Run, details
from pretrain.results import Finished

PROMPTS = 32  # of one set that are shown
EXAMPLES = 10  # of retrieval, of each kind and run
GRID_PIXELS = 1100  # on the longer side of a grid that is shown whole


def samples(runs: Sequence[Run]) -> str:
    """The same prompts and seeds, drawn by every run and entry."""
    drawn: dict[tuple[str, str, str], dict[int, object]] = {}
    columns: list[tuple[Run, Finished]] = []
    for d in details(runs, "generation"):
        for sample in d.fields.get("samples", ()):
            if (d.run, d.entry) not in columns:
                columns.append((d.run, d.entry))
            at = (d.set, str(sample["prompt"]), str(sample.get("seed", "")))
            drawn.setdefault(at, {})[columns.index((d.run, d.entry))] = sample.get("png")
    parts = []
    if drawn:
        shared = [at for at in drawn if len(drawn[at]) == len(columns)] or list(drawn)
        figures = "".join(_drawn(at, drawn[at], columns) for at in shared[:PROMPTS])
        legend = "".join(
            f"<li>{_mark(i, run)} {escape(run.name)} · {escape(entry.name)}</li>"
            for i, (run, entry) in enumerate(columns)
        )
        width = min(4, len(columns))
        parts.append(
            f'<ol class="key">{legend}</ol>'
            f'<div class="drawn" style="--across:{width}">{figures}</div>'
        )
    grids = [grid for run in runs for grid in _grids(run)]
    if grids:
        parts.append(f'<div class="grids">{"".join(grids)}</div>')
    for run in runs:
        if not any(r is run for r, _ in columns):
            parts.append(
                missing(
                    f"{run.name} has no pictures of a generation entry.",
                    evaluate(run, "evaluator: generation"),
                )
            )
    note = (
        "Each card is one prompt and one seed; its numbered pictures are those of the list."
        if drawn
        else "Grids that the runs left."
    )
    return section("Samples", note, "".join(parts))


def _mark(i: int, run: Run) -> str:
    return f'<b class="chip c{run.number % COLOURS}">{run.letter}{i + 1}</b>'


def _drawn(
    at: tuple[str, str, str], pngs: dict[int, object], columns: Sequence[tuple[Run, Finished]]
) -> str:
    name, prompt, seed = at
    tiles = []
    for i, (run, entry) in enumerate(columns):
        told = f"{run.name}, {entry.name}: {prompt}, seed {seed}"
        shown = image(pngs[i], told) if i in pngs else '<span class="none">not drawn</span>'
        tiles.append(
            f'<span class="tile">{shown}{_mark(i, run) if len(columns) > 1 else ""}</span>'
        )
    where = f"{escape(name)}, " if name else ""
    return (
        f'<figure><div class="tiles">{"".join(tiles)}</div><figcaption><bdi>{escape(prompt)}</bdi> '
        f"<small>{where}seed {escape(seed)}</small></figcaption></figure>"
    )


def _grids(run: Run) -> list[str]:
    """Grids of `samples` entries of the scorecard; else the last one of training."""
    found = [
        (run.folder / file, entry.name)
        for entry in run.entries("samples")
        for file in entry.files
        if file.endswith(".png")
    ]
    if not found:
        last = sorted((run.output / "samples").glob("samples-*.png"))[-1:]
        found = [(path, f"training, {path.stem}") for path in last]
    return [
        f"<figure><figcaption>{chip(run)} {escape(run.name)} · {escape(name)}</figcaption>"
        f"{image(_shrunk(path), f'{run.name}, {name}')}</figure>"
        for path, name in found
        if path.exists()
    ]


def _shrunk(path: Path) -> str:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((GRID_PIXELS, GRID_PIXELS))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def retrieval(runs: Sequence[Run]) -> str:
    """Queries with what was found for them, right or wrong; the same queries run by run."""
    parts = [key(runs)]
    found = list(details(runs, "retrieval"))
    for run in runs:
        mine = [d for d in found if d.run is run and d.fields.get("examples")]
        if not mine:
            told = missing(
                f"{run.name} has no retrieval examples.", evaluate(run, "evaluator: retrieval")
            )
            parts.append(told)
        # One entry of each set: others find much the same.
        for d in {d.set: d for d in mine}.values():
            title = f"{chip(run)} {escape(d.set or 'set')} · {escape(d.entry.name)}"
            parts.append(f"<h3>{title}</h3>{_examples(d)}")
    note = "A query and what scored highest for it, best first: ✓ belongs to it, ✗ does not."
    return section("Retrieval", note, "".join(parts))


def _examples(d: Details) -> str:
    rows = []
    for kind, title in (("text", "Pictures for a text"), ("image", "Texts for a picture")):
        chosen = [e for e in d.fields["examples"] if e.get("kind") == kind][:EXAMPLES]
        if chosen:
            queries = "".join(_query(e, kind) for e in chosen)
            rows.append(f'<h4>{title}</h4><div class="queries {kind}">{queries}</div>')
    return "".join(rows)


def _query(e: dict[str, Any], kind: str) -> str:
    truth = ", ".join(map(str, e.get("truth", ())))
    asked = (
        f'<bdi class="asked" title="{escape(truth)}">{escape(e.get("query", ""))}</bdi>'
        if kind == "text"
        else f'<span class="asked">{image(e.get("query"), truth)}</span>'
    )
    return (
        f'<div class="query">{asked}<ol>{"".join(_hit(f) for f in e.get("found", ()))}</ol></div>'
    )


def _hit(f: dict[str, Any]) -> str:
    right = bool(f.get("right"))
    score = f.get("score")
    told = str(f.get("caption", ""))
    if isinstance(score, (int, float)):
        told += f" ({score:.3f})"
    mark = f'<i class="{"good" if right else "bad"}">{"✓" if right else "✗"}</i>'
    if f.get("png"):
        return f'<li class="{"hit" if right else ""}">{image(f["png"], told)}{mark}</li>'
    return (
        f'<li class="{"hit" if right else ""}" title="{escape(told)}">{mark} '
        f"<bdi>{escape(f.get('caption', ''))}</bdi></li>"
    )
