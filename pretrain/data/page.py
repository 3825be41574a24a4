"""A `Survey` as one HTML page. Captions, keys and names come from strangers: all pass through
`show.escape`."""

from collections import Counter

import numpy as np

from pretrain.data.inspect import Numbers, Picture, ShardFacts, Survey
from pretrain.data.manifest import ASPECTS
from pretrain.page import show
from pretrain.page.document import card, document, figures
from pretrain.page.show import escape, number

CAPTION_CHARACTERS = 600  # of a caption that are shown
ASPECT_NAMES = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")
assert len(ASPECT_NAMES) == len(ASPECTS)


def render(s: Survey) -> str:
    """The page of a survey."""
    body = (
        f"<h2>Pictures and captions</h2><p>{_sheet_note(s)}</p>"
        f'<div class="sheet">{"".join(_figure(p) for p in s.pictures)}</div>'
        f"<h2>Captions</h2><p>{_captions_note(s)}</p>"
        f'<div class="charts">{_caption_charts(s)}</div>'
        f"<h2>Pictures</h2><p>{_pictures_note(s)}</p>"
        f'<div class="charts">{_picture_charts(s)}</div>'
        f"<h2>Refused samples</h2>{_rejects(s)}"
        f"<h2>Shards</h2>{_shards(s)}"
    )
    footer = f"Samples drawn with seed {s.seed}. Data set {escape(s.fingerprint)}."
    return document("Data set", s.url, _lead(s), _figures(s), body, footer)


def _whole(s: Survey) -> bool:
    return s.read == s.samples


def _lead(s: Survey) -> str:
    what = (
        f"<b>{number(s.samples)}</b> captioned pictures in <b>{number(s.shards)}</b> "
        f"{_plural('shard', s.shards)}, <b>{show.size(s.bytes)}</b> as stored. "
    )
    if _whole(s):
        return f"{what}Every sample was read for this page."
    return f"{what}<b>{number(s.read)}</b> samples drawn at random were read for this page."


def _figures(s: Survey) -> str:
    refused = _refused_samples(s)
    share = refused / max(1, s.read)
    entries = [
        ("samples", number(s.samples), f"in {number(s.shards)} {_plural('shard', s.shards)}"),
        ("stored", show.size(s.bytes), f"{show.size(s.bytes / max(1, s.samples))} a sample"),
    ]
    if len(s.sizes):
        width, height = (int(np.median(s.sizes[:, i])) for i in (0, 1))
        shorter = s.sizes.min(axis=1)
        spread = f"px, shorter side {number(shorter.min())} to {number(shorter.max())}"
        alike = (s.sizes == s.sizes[0]).all()
        told = "px, all alike" if alike else spread
        entries.append(("median picture", f"{width} × {height}", told))
    if len(s.caption_lengths):
        longest = f"longest {number(s.caption_lengths.max())}"
        middle = f"{number(np.median(s.caption_lengths))} {s.caption_unit}"
        entries.append(("median caption", middle, longest))
        few, many = int(s.captions_a_sample.min()), int(s.captions_a_sample.max())
        several = f"{few} to {many} each" if few < many else "each alike"
        entries.append(("captions a sample", number(s.captions_a_sample.mean()), several))
    colour = "bad" if refused else "good"
    told = f'<span class="{colour}">{100 * share:.3g} %</span>'
    entries.append(("refused", told, f"{number(refused)} of {number(s.read)} read"))
    return figures(entries)


def _sheet_note(s: Survey) -> str:
    shown = f"{number(len(s.pictures))} of {number(s.samples)}, drawn at random. "
    return (
        f"{shown}Under each stands one of its captions; point at it, or move to it with the tab "
        "key, to read all of them."
    )


def _figure(p: Picture) -> str:
    shown = escape(_cut(p.caption))
    every = "".join(f'<bdi dir="auto">{escape(_cut(text))}</bdi>' for text in p.captions)
    where = f"{p.width} × {p.height} px · {p.key} · {p.shard.rpartition('/')[2]}"
    return (
        f'<figure tabindex="0"><div class="frame"><img src="{escape(p.thumbnail)}" loading="lazy" '
        f'alt="{shown}"></div>'
        f'<figcaption><bdi dir="auto">{shown}</bdi>'
        f'<div class="more">{every}<small>{escape(where)}</small></div></figcaption></figure>'
    )


def _captions_note(s: Survey) -> str:
    note = f"{number(len(s.caption_lengths))} captions of the samples read."
    if s.limit is not None and len(s.caption_lengths):
        longer = float(np.mean(s.caption_lengths > s.limit))
        note += f" The trainer cuts at {s.limit} tokens: {100 * longer:.2g} % are longer."
    return note


def _caption_charts(s: Survey) -> str:
    if not len(s.caption_lengths):
        return '<p class="card bad">No sample that was read has a caption.</p>'
    short, long = _middle(s.caption_lengths)
    unit = s.caption_unit
    length = show.histogram(s.caption_lengths, "captions", unit)
    told = f"90 % have {number(short)} to {number(long)} {unit}."
    cards = [card("Length", length, told)]
    words = show.ranking(s.words, "words with their counts")
    cards.append(card("Most frequent words", words, "Without “a”, “of”, “the” and their like."))
    repeated = [(_cut(text), n) for text, n in s.repeated if n > 1]
    shown = (
        show.ranking(repeated, "captions with their counts")
        if repeated
        else '<p class="only"><b class="good">None</b> is said twice</p>'
    )
    different = f"{number(s.distinct)} of {number(len(s.caption_lengths))} are different."
    cards.append(card("Captions said most often", shown, different, wide=True))
    return "".join(cards)


def _pictures_note(s: Survey) -> str:
    some = "" if len(s.sizes) == s.samples else f" {number(len(s.sizes))} of"
    return f"From the member table, for{some} {number(s.samples)} samples; aspect ratios of all."


def _picture_charts(s: Survey) -> str:
    cards = []
    known = s.sizes[s.sizes.min(axis=1) > 0] if len(s.sizes) else s.sizes
    if len(known):
        shorter = show.histogram(known.min(axis=1), "pictures", "px, shorter side")
        cards.append(card("Size", shorter, _common_size(known)))
    if (s.aspects > 0).sum() == 1:
        name = ASPECT_NAMES[int(s.aspects.argmax())]
        aspects = f'<p class="only"><b>{name}</b> all {number(s.aspects.sum())} pictures alike</p>'
    else:
        aspects = show.categories(s.aspects.tolist(), ASPECT_NAMES, "pictures", "width : height")
    told = "By the nearest of the trainer's aspect buckets."
    cards.append(card("Aspect ratio", aspects, told))
    unit, divisor = ("MiB", 1 << 20) if np.median(s.sample_bytes) > 1 << 20 else ("KiB", 1 << 10)
    # A tar pads to blocks of 512 bytes.
    grain = 512 / divisor
    spread = show.histogram(s.sample_bytes / divisor, "samples", f"{unit} a sample", grain=grain)
    short, long = (show.size(q) for q in _middle(s.sample_bytes))
    cards.append(card("Bytes", spread, f"90 % take {short} to {long}, headers included."))
    return "".join(cards)


def _common_size(sizes: Numbers) -> str:
    pairs, counts = np.unique(sizes, axis=0, return_counts=True)
    width, height = pairs[counts.argmax()]
    share = 100 * counts.max() / len(sizes)
    return f"Most common: {width} × {height} px ({share:.3g} %)."


def _middle(values: Numbers) -> tuple[float, float]:
    """Bounds of the middle 90%, both values that occur."""
    low, high = np.quantile(values, (0.05, 0.95), method="inverted_cdf")
    return float(low), float(high)


def _rejects(s: Survey) -> str:
    if not s.rejects:
        sure = (
            "None: every sample of the data set was decoded."
            if _whole(s)
            # The rule of three: 95% confidence of a rate never seen in n draws.
            else f"None of {number(s.read)} samples read; with 95 % confidence fewer than "
            f"{300 / s.read:.2g} % of all are."
        )
        return f'<div class="card good">{sure}</div>'
    rows = []
    for reason, count in Counter(r.reason for r in s.rejects).most_common():
        of_reason = [r for r in s.rejects if r.reason == reason]
        worst = Counter(r.shard for r in of_reason).most_common(3)
        more = len({r.shard for r in of_reason}) - len(worst)
        shards = "<br>".join(
            f"{escape(url.rpartition('/')[2])} <small>({number(n)})</small>" for url, n in worst
        )
        shards += f"<br><small>and {number(more)} more</small>" if more > 0 else ""
        keys = "<br>".join(escape(_cut(r.key)) for r in of_reason[:3])
        rows.append(
            f'<tr><td class="bad">{escape(reason)}</td><td class="n">{number(count)}</td>'
            f'<td class="n">{100 * count / max(1, s.read):.3g} %</td>'
            f'<td class="name">{shards}</td><td class="name">{keys}</td></tr>'
        )
    return (
        "<p>What the trainer would refuse, of the samples read; the count of whole shards comes "
        'from <code>data verify</code>.</p><div class="scroll"><table><thead><tr><th>Reason</th>'
        '<th class="n">Count</th><th class="n">Of samples read</th><th>Shards (count)</th>'
        f"<th>Keys, for instance</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shards(s: Survey) -> str:
    note = (
        f"All {number(s.shards)}."
        if len(s.table) == s.shards
        else (
            f"{number(len(s.table))} of {number(s.shards)}: those with refusals, the smallest and "
            "the largest."
        )
    )
    largest = max((f.bytes for f in s.table), default=1) or 1
    rows = "".join(_shard_row(f, largest) for f in s.table)
    return (
        f'<p>{note}</p><div class="scroll"><table><thead><tr><th>Shard</th><th class="n">Samples'
        '</th><th class="n">Bytes</th><th aria-label="share of the largest"></th>'
        '<th class="n">A sample</th><th class="n">Refused, of those read</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _shard_row(f: ShardFacts, largest: int) -> str:
    colour = ' class="n bad"' if f.refused else ' class="n"'
    each = show.size(f.bytes / f.samples) if f.samples else "–"
    return (
        f'<tr><td class="name">{escape(f.url)}</td><td class="n">{number(f.samples)}</td>'
        f'<td class="n">{show.size(f.bytes)}</td>'
        f'<td><span class="bar"><i style="width:{100 * f.bytes / largest:.1f}%"></i></span></td>'
        f'<td class="n">{each}</td><td{colour}>{number(f.refused)}</td></tr>'
    )


def _refused_samples(s: Survey) -> int:
    return len({(r.shard, r.key) for r in s.rejects})


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _cut(text: str) -> str:
    if len(text) <= CAPTION_CHARACTERS:
        return text
    return (
        f"{text[:CAPTION_CHARACTERS]}… ({number(len(text) - CAPTION_CHARACTERS)} more characters)"
    )
