"""The exact samples of a step: what the loader gives for their numbers, told and shown."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pretrain import storage
from pretrain.data.source import Place, Source
from pretrain.page.document import document, figures
from pretrain.page.show import escape, number, plain

TILE = 128  # pixels of a picture on the sheet, at least
TASK = 64  # samples read at a time


@dataclass(frozen=True)
class Line:
    """One sample of a step.

    Attributes:
        number: global sample number.
        epoch: of its data set.
        rank: that reads it.
        dataset: URL of its manifest, without the .json.
        shard, index: where the order puts the sample; the URL, and the sample's place in it.
        key, caption: of what the model sees.
        picture_CHW: uint8, as the model sees it: cropped and augmented; empty for encoded data.
        refused: why the sample at its place cannot be used; empty as a rule.
        instead: shard and index of what replaced it; None where nothing did.
    """

    number: int
    epoch: int
    rank: int
    dataset: str
    shard: str
    index: int
    key: str
    caption: str
    picture_CHW: Tensor
    refused: str = ""
    instead: tuple[str, int] | None = None


def explain(source: Source, numbers: Sequence[int], global_batch: int, world: int) -> list[Line]:
    """What each number stands for, by the loader's own `Source`.

    Args:
        source: of the run's configuration and seed.
        numbers: global sample numbers.
        global_batch: samples of a step over all ranks; ``world`` divides it.
        world: ranks.

    Raises:
        DataError: a shard cannot be read, or nothing near a refused sample can be used.
    """
    epochs = _epochs(source, numbers)
    lines: list[Line] = []
    for start in range(0, len(numbers), TASK):
        for sample in source.samples(numbers[start : start + TASK]):
            place, used = sample.place, sample.used
            replaced = (used.dataset, used.shard, used.index) != (
                *(place.dataset, place.shard, place.index),
            )
            lines.append(
                Line(
                    sample.number,
                    epochs[len(lines)],
                    sample.number % global_batch % world,
                    source.manifests[place.dataset].members_url.removesuffix(".members"),
                    _shard(source, place),
                    place.index,
                    sample.key,
                    sample.caption,
                    sample.picture_CHW,
                    ", ".join(f"{r.reason} ({r.key})" for r in sample.rejects),
                    (_shard(source, used), used.index) if replaced else None,
                )
            )
    return lines


def _epochs(source: Source, numbers: Sequence[int]) -> list[int]:
    """Epoch of each number, counted by its own data set (or aspect bucket)."""
    order = source.mixture or source.buckets
    assert order is not None
    parts, inner = order.split(np.asarray(numbers, dtype=np.int64))
    return [
        number // order.orders[part].num_samples
        for part, number in zip(parts.tolist(), inner.tolist(), strict=True)
    ]


def _shard(source: Source, place: Place) -> str:
    return source.manifests[place.dataset].url(place.shard)


def table(lines: Sequence[Line], width: int | None = None) -> str:
    """A line a sample; captions are cut to ``width`` columns in all, if given."""
    several = len({line.dataset for line in lines}) > 1
    rows: list[tuple[str, ...]] = [("number", "epoch", "rank", "shard", "index", "key", "caption")]
    for line in lines:
        rows.append(
            (
                f"{line.number}",
                f"{line.epoch}",
                f"{line.rank}",
                _where(line, several),
                f"{line.index}",
                line.key,
                line.caption + _replaced(line),
            )
        )
    rows = [tuple(plain(cell) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in (3, 5, 6) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        whole = "  ".join(cells).rstrip()
        text.append(whole if width is None or len(whole) <= width else f"{whole[: width - 1]}…")
    return "\n".join(text)


def _where(line: Line, several: bool) -> str:
    """Name of the shard, and of its data set where there are several."""
    shard = line.shard.rpartition("/")[2]
    return f"{line.dataset.rpartition('/')[2]}: {shard}" if several else shard


def _replaced(line: Line) -> str:
    if line.instead is None:
        return f"  [{line.refused}]" if line.refused else ""
    shard, index = line.instead
    where = f"{shard.rpartition('/')[2]} index {index}"
    return f"  [refused: {line.refused}; in its place {where}]"


def sheet(lines: Sequence[Line], columns: int = 8) -> Image.Image:
    """The pictures as the model sees them, whole pixels enlarged, number and caption under each."""
    shown = [_enlarged(line.picture_CHW) for line in lines]
    wide = max(TILE, *(image.width for image in shown))
    tall = max(image.height for image in shown)
    label, gap = 32, 8
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    size = columns * (wide + gap) + gap, rows * (tall + label + gap) + gap
    whole = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(11)
    for place, (line, image) in enumerate(zip(lines, shown, strict=True)):
        x, y = gap + place % columns * (wide + gap), gap + place // columns * (tall + label + gap)
        whole.paste(image, (x, y))
        colour = "#b23c17" if line.refused else "#666a71"
        head = f"{line.number}  rank {line.rank}" + ("  replaced" if line.instead else "")
        for row, text, ink in ((0, head, colour), (1, plain(line.caption), "#1d1e20")):
            while len(text) > 2 and draw.textlength(text, font=font) > wide:
                text = f"{text[:-2]}…"
            draw.text((x, y + tall + 2 + 14 * row), text, fill=ink, font=font)
    return whole


def _enlarged(picture_CHW: Tensor) -> Image.Image:
    if not picture_CHW.numel():
        return Image.new("RGB", (TILE, TILE), "#e4e2dc")  # encoded data holds no pixels
    image = Image.fromarray(picture_CHW.permute(1, 2, 0).contiguous().numpy())
    times = -(-TILE // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def html(lines: Sequence[Line], title: str) -> str:
    """The pictures and the table as one self-contained page."""
    shards = {line.shard for line in lines}
    several = len({line.dataset for line in lines}) > 1
    replaced = sum(line.instead is not None for line in lines)
    entries = [
        ("samples", number(len(lines)), f"{lines[0].number} to {lines[-1].number}"),
        ("shards", number(len(shards)), "that they come from"),
        ("ranks", number(len({line.rank for line in lines})), "that read them"),
        ("replaced", number(replaced), "refused samples"),
    ]
    body = (
        "<h2>As the model sees them</h2><p>Cropped, scaled and augmented; under each the caption "
        "that the loader chose.</p>"
        f'<div class="sheet seen">{"".join(_figure(line) for line in lines)}</div>'
        '<h2>Where they come from</h2><p></p><div class="scroll"><table><thead><tr>'
        '<th class="n">Number</th><th class="n">Epoch</th><th class="n">Rank</th><th>Shard</th>'
        '<th class="n">Index</th><th>Key</th><th>Caption</th></tr></thead>'
        f"<tbody>{''.join(_row(line, several) for line in lines)}</tbody></table></div>"
    )
    lead = "What the loader gives for these sample numbers, on any rank and at any time."
    return document("Samples of a step", title, lead, figures(entries), body, "")


def _figure(line: Line) -> str:
    caption = escape(line.caption)
    if line.picture_CHW.numel():
        stream = io.BytesIO()
        Image.fromarray(line.picture_CHW.permute(1, 2, 0).contiguous().numpy()).save(stream, "PNG")
        data = base64.b64encode(stream.getvalue()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    else:
        image = '<span class="none">latents</span>'
    note = f'<small class="bad">{escape(line.refused)}</small>' if line.refused else ""
    where = f"number {line.number} · rank {line.rank} · {line.key}"
    return (
        f'<figure tabindex="0"><div class="frame">{image}</div><figcaption>'
        f'<bdi dir="auto">{caption}</bdi><div class="more"><bdi dir="auto">{caption}</bdi>'
        f"<small>{escape(where)}</small>{note}</div></figcaption></figure>"
    )


def _row(line: Line, several: bool) -> str:
    told = ""
    if line.instead is not None:
        where = f"{line.instead[0].rpartition('/')[2]}, index {line.instead[1]}"
        told = f"refused: {line.refused}; in its place {where}"
    elif line.refused:
        told = line.refused
    note = f'<br><small class="bad">{escape(told)}</small>' if told else ""
    cells = "".join(f'<td class="n">{n}</td>' for n in (line.number, line.epoch, line.rank))
    return (
        f'<tr>{cells}<td class="name">{escape(_where(line, several))}</td>'
        f'<td class="n">{line.index}</td><td class="name">{escape(line.key)}</td>'
        f'<td class="name"><bdi dir="auto">{escape(line.caption)}</bdi>{note}</td></tr>'
    )


def write(lines: Sequence[Line], out: str, title: str) -> None:
    """Write ``out``, a .html page or a .png sheet."""
    if out.lower().endswith((".html", ".htm")):
        storage.write_bytes(out, html(lines, title).encode())
        return
    stream = io.BytesIO()
    sheet(lines).save(stream, "PNG")
    storage.write_bytes(out, stream.getvalue())
