"""The study's table and plot."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._cdcd.toy import LENGTH
from pretrain.objectives import _cdcd_loss as loss

HEAD = f"{'':<18}{'NLL':>14}{'12 steps':>16}{'8':>16}{'5':>16}{'entropy, 12':>16}  fewest steps"


def line(name: str, rows: list[dict[str, Any]]) -> str:
    """A line of the table: mean ± standard deviation over seeds."""

    def cell(values: list[float], digits: int, width: int) -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}".rjust(width)

    accuracy = "".join(cell([r["accuracy"][s] for r in rows], 3, 16) for s in (12, 8, 5))
    fewest = ", ".join(str(r["fewest"] or "none") for r in rows)
    entropy = cell([r["entropy"][12] for r in rows], 2, 16)
    return f"{name:<18}{cell([r['nll'] for r in rows], 2, 14)}{accuracy}{entropy}  {fewest}"


def table(found: Mapping[str, Any]) -> str:
    """The whole result in text."""
    names = list(dict.fromkeys(r["variant"] for r in found["rows"]))
    by_name = {n: [r for r in found["rows"] if r["variant"] == n] for n in names}
    lines = [HEAD, *(line(n, rows) for n, rows in by_name.items())]
    data = {k: statistics.mean(d[k] for d in found["data"]) for k in ("nll", "accuracy", "entropy")}
    lines.append(
        f"{'the data':<18}{data['nll']:>14.2f}{data['accuracy']:>16.3f}{'':>32}"
        f"{data['entropy']:>16.2f}"
    )
    base = {r["seed"]: r["nll"] for r in by_name["w=0"]}
    for name, rows in by_name.items():
        saved = [100 * (1 - (r["fewest"] or LENGTH) / LENGTH) for r in rows]
        rings = (
            " (ALARM: likelihood)" if any(_rings(base[r["seed"]], r["nll"]) for r in rows) else ""
        )
        lines.append(f"{name}: {statistics.mean(saved):.0f}% fewer steps{rings}")
    return "\n".join(lines)


def _rings(base: float, nll: float) -> bool:
    """Whether likelihood fell too far below the same seed's baseline."""
    alarm = loss.LikelihoodAlarm()
    alarm.rings(base)
    return alarm.rings(nll)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy by steps, and entropy against it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = list(found["rows"][0]["accuracy"])
    for name in dict.fromkeys(r["variant"] for r in found["rows"]):
        rows = [r for r in found["rows"] if r["variant"] == name]
        mean = {
            key: [statistics.mean(r[key][s] for r in rows) for s in steps]
            for key in ("accuracy", "entropy")
        }
        style = "--" if name.startswith("temperature") else "-"
        left.plot(steps, mean["accuracy"], style, marker="o", markersize=3, label=name)
        right.plot(mean["entropy"], mean["accuracy"], style, marker="o", markersize=3, label=name)
    left.set(xlabel="sampling steps", ylabel="accuracy of the asked-for class (oracle)")
    right.set(xlabel="entropy of pairs of tokens (nats)", ylabel="accuracy")
    truth = {k: statistics.mean(d[k] for d in found["data"]) for k in ("accuracy", "entropy")}
    right.plot([truth["entropy"]], [truth["accuracy"]], "k*", label="the data")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)
