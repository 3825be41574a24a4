"""What is taken for what: the most confused pairs, a matrix that can be seen, the worst classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.page import show
from pretrain.page.document import card
from pretrain.page.show import escape, number
from pretrain.report import charts
from pretrain.report.pieces import chip, evaluate, image, key, missing, section
from pretrain.report.read import Details, Run, details

GROUPS = 24  # rows of a matrix at most
PAIRS = 14
WORST = 12
_MOST_SORTED = 1500  # classes beyond which an order by likeness takes too long
Counts = npt.NDArray[np.float64]


def confusions(runs: Sequence[Run]) -> str:
    """Matrix and pairs of each run's best zero-shot entry of each set, then its worst classes."""
    chosen = _best(runs)
    told = "".join(
        missing(f"{run.name} has no confusions.", evaluate(run, "evaluator: zero_shot"))
        for run in runs
        if not any(d.run is run for d in chosen)
    )
    pictured, worst = [], []
    for name in dict.fromkeys(d.set for d in chosen):
        of_set = [d for d in chosen if d.set == name]
        order = _order(of_set)
        pictured += [_matrix(d, order) + _pairs(d) for d in of_set]
        worst += [_worst(d) for d in of_set]
    note = (
        "Of each run's best zero-shot entry. A row is a true class, or a group of classes that are "
        "taken for each other; a cell the share of its pictures that went to the column; point at "
        "it for names. Green stays in its class or group, red does not."
    )
    first = section(
        "Confusions", note, key(runs) + f'<div class="pairs">{"".join(pictured)}</div>{told}'
    )
    if not worst:
        return first
    note = "Classes with the lowest accuracy that have a picture: what it was taken for."
    return first + section("Worst classes", note, key(runs) + "".join(worst))


def _best(runs: Sequence[Run]) -> list[Details]:
    """The details of each run's best zero-shot entry of each set."""
    best: dict[tuple[int, str], tuple[float, Details]] = {}
    for d in details(runs, "zero_shot"):
        top1 = d.entry.metrics.get(f"zero_shot/{d.set}/top1")
        value = -1.0 if top1 is None else top1
        at = (d.run.number, d.set)
        if d.fields.get("classes") and (at not in best or value > best[at][0]):
            best[at] = (value, d)
    return [d for _, d in best.values()]


def _counts(d: Details) -> Counts:
    n = len(d.fields["classes"])
    counts = np.zeros((n, n))
    for true, predicted, count in d.fields.get("confusion", ()):
        counts[true, predicted] = count
    return counts


def _order(found: Sequence[Details]) -> npt.NDArray[np.int64]:
    """Classes so that those taken for each other stand together: along the Fiedler vector of the
    confusions of all runs (Barnard et al. 1995). The same for all runs that share their classes."""
    classes = found[0].fields["classes"]
    n = len(classes)
    alike = [d for d in found if d.fields["classes"] == classes]
    if n <= GROUPS or n > _MOST_SORTED or len(alike) < len(found):
        return np.arange(n)
    counts = sum(_counts(d) for d in alike)
    weights = counts + np.transpose(counts) + 1e-3  # connected, whatever was confused
    np.fill_diagonal(weights, 0)
    laplacian = np.diag(weights.sum(1)) - weights
    vector = np.linalg.eigh(laplacian)[1][:, 1]
    return np.argsort(vector * np.sign(vector[np.argmax(np.abs(vector))]), kind="stable")


def _matrix(d: Details, order: npt.NDArray[np.int64]) -> str:
    classes: list[str] = d.fields["classes"]
    order = order if len(order) == len(classes) else np.arange(len(classes))
    groups = np.array_split(order, min(GROUPS, len(classes)))
    counts = _counts(d)
    sums = np.array([[counts[np.ix_(a, b)].sum() for b in groups] for a in groups])
    totals = sums.sum(1)
    names = [classes[g[0]] if len(g) == 1 else ", ".join(classes[i] for i in g[:3]) for g in groups]
    more = [
        n if len(g) <= 3 else f"{n} and {len(g) - 3} more"
        for n, g in zip(names, groups, strict=True)
    ]

    def told(i: int, j: int) -> str:
        return f"{more[i]} → {more[j]}: {number(sums[i, j])} of {number(totals[i])} pictures"

    shares = (sums / np.maximum(totals, 1)[:, None]).tolist()
    spoken = f"Confusions of {len(classes)} classes in {len(groups)} groups"
    right = np.trace(counts) / max(counts.sum(), 1)
    note = (
        f"{number(counts.sum())} pictures of {len(classes)} classes"
        f"{f' in {len(groups)} groups' if len(groups) < len(classes) else ''}; "
        f"{charts.percent(float(right))} right."
    )
    title = f"{d.run.letter} · {d.set or 'set'} · {d.entry.name}"
    return card(title, charts.matrix(shares, names, told, spoken), note)


def _pairs(d: Details) -> str:
    classes: list[str] = d.fields["classes"]
    counts = _counts(d)
    totals = np.maximum(counts.sum(1), 1)
    wrong = [(int(n), t, p) for t, p, n in d.fields.get("confusion", ()) if t != p and n > 0]
    wrong.sort(key=lambda w: (-w[0], -w[0] / totals[w[1]], w[1], w[2]))
    if not wrong:
        return card("Most confused", missing("Nothing was confused."))
    pulled = counts.sum(0) - np.diag(counts)
    if wrong[0][0] == 1:
        # As many pairs as pictures: which are shown would be the alphabet's choice.
        drawn = [(classes[i], int(pulled[i])) for i in np.argsort(-pulled, kind="stable")[:PAIRS]]
        ranked = show.ranking([d for d in drawn if d[1]], "answers with their counts")
        note = "No pair was confused twice; these classes drew most pictures of others."
        return card(f"{d.run.letter} · answers given wrongly", ranked, note)
    most = wrong[0][0]
    items = "".join(
        f'<li><span><bdi>{escape(classes[t])}</bdi> <i class="to">→</i> '
        f'<bdi>{escape(classes[p])}</bdi></span><span class="bar"><i '
        f'style="width:{100 * n / most:.0f}%"></i></span>'
        f"<b>{n}<small> of {totals[t]:.0f}</small></b></li>"
        for n, t, p in wrong[:PAIRS]
    )
    magnet = int(pulled.argmax())
    note = (
        f"True class → answer, with the number of pictures. “{classes[magnet]}” is the answer most "
        f"often given wrongly: {number(float(pulled[magnet]))} times."
    )
    title = f"{d.run.letter} · most confused pairs"
    return card(title, f'<ol class="confused">{items}</ol>', note)


def _worst(d: Details) -> str:
    examples: list[dict[str, Any]] = d.fields.get("examples", [])
    if not examples:
        return missing(f"{d.entry.name} of {d.run.name} kept no examples.")
    classes: list[str] = d.fields["classes"]
    accuracy = dict(zip(classes, d.fields.get("per_class", ()), strict=False))
    by_class: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        by_class.setdefault(str(example.get("true")), []).append(example)

    def value(name: str) -> float:
        found = accuracy.get(name)
        return 0.0 if found is None else found

    figures, worst = [], sorted(by_class, key=value)[:WORST]
    across = min(3, max(len(by_class[name]) for name in worst))
    for name in worst:
        shown = "".join(_example(e) for e in by_class[name][:3])
        figures.append(
            f'<div class="worst"><h4><bdi>{escape(name)}</bdi> '
            f"<small>{charts.percent(value(name))} right</small></h4><div>{shown}</div></div>"
        )
    title = f"{d.set or 'set'} · {escape(d.entry.name)}"
    return (
        f'<h3>{chip(d.run)} {title}</h3><div class="worsts" style="--across:{across}">'
        f"{''.join(figures)}</div>"
    )


def _example(e: dict[str, Any]) -> str:
    answers = [str(p) for p in e.get("predicted", ())]
    scores = [f"{s:.3f}" for s in e.get("scores", ()) if isinstance(s, (int, float))]
    both = [f"{a} ({s})" for a, s in zip(answers, scores, strict=False)] or answers
    told = f"{e.get('key', '')}: {', '.join(both)}"
    first = escape(answers[0]) if answers else "–"
    return (
        f"<figure>{image(e.get('png'), told)}<figcaption><bdi>{first}</bdi></figcaption></figure>"
    )
