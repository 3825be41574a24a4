"""How costs grow with ranks, samples, shards and parameters, without the machines.

    python benchmarks/scaling.py [--out docs/scaling.png] [--json runs/benchmarks/scaling.json]

Simulated: which rank reads what; checkpoints, heartbeats and logs of up to 1,024 ranks, by the real
code on this machine's disk, with parameters of next to no size. Predicted: memory and step time, by
`plan`. Prints the tables of docs/SCALING.md and draws its picture.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RANKS = (1, 4, 16, 64, 256, 1024)
SHARDS = (1_000, 10_000, 100_000)
MIB = 1 << 20


def main() -> int:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", default="docs/scaling.png", help="default: %(default)s")
    parser.add_argument("--json", default="runs/benchmarks/scaling.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--shards", type=int, nargs="+", default=list(SHARDS))
    options = parser.parse_args()
    os.chdir(ROOT)
    found = collect(tuple(options.ranks), tuple(options.shards))
    print(tables(found))
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, default=_plain))
    if draw(found, Path(options.out)):
        print(f"\npicture: {options.out}")
    return 0


def collect(ranks: Sequence[int], shards: Sequence[int]) -> dict[str, list[Any]]:
    """Every point."""
    from benchmarks._scaling import checkpoints, data, liveness, predicted

    return {
        "data": data.reads(tuple(ranks)),
        "checkpoints": [checkpoints.measure(n) for n in ranks],
        "liveness": [liveness.measure(n) for n in ranks],
        "manifests": [data.held(n) for n in shards],
        "predicted": predicted.points(tuple(sorted({n for n in (*ranks, 8) if n % 8 == 0}))),
    }


def tables(found: dict[str, list[Any]]) -> str:
    """In Markdown."""
    return "\n\n".join(
        [
            "Data, an epoch of 10^9 samples in 10^5 shards of 1 GiB (simulated)\n\n"
            + _table(
                (
                    "ranks",
                    "bytes fetched / corpus",
                    "most / mean - 1",
                    "shards at once",
                    "order ms",
                ),
                (
                    (
                        f"{r.ranks:,}",
                        f"{r.amplification:.3f}",
                        f"{r.unevenness:.2%}",
                        f"{r.shards_at_once:,}",
                        f"{1000 * r.locate_seconds:.2f}",
                    )
                    for r in found["data"]
                ),
            ),
            "Checkpoints (real code, tiny parameters, this machine's disk)\n\n"
            + _table(
                (
                    *("ranks", "files", "manifest MiB", "commit s (rank 0)", "verify ms (a rank)"),
                    *("opened by a rank", "on half the ranks"),
                ),
                (
                    (
                        f"{c.ranks:,}",
                        f"{c.files:,}",
                        f"{c.manifest_bytes / MIB:.3f}",
                        f"{c.commit_seconds:.3f}",
                        f"{1000 * c.verify_seconds:.1f}",
                        f"{c.opened}",
                        f"{c.opened_resized}",
                    )
                    for c in found["checkpoints"]
                ),
            ),
            "Heartbeats, watchdog and logs (real code, this machine's disk)\n\n"
            + _table(
                (
                    *("ranks", "heartbeats/s", "one ms", "look ms", "lookouts"),
                    *("reads/s in a hang", "if all looked", "log line KiB to a rank", "merge ms"),
                ),
                (
                    (
                        f"{c.ranks:,}",
                        f"{c.writes_per_second:.1f}",
                        f"{1000 * c.write_seconds:.2f}",
                        f"{1000 * c.look_seconds:.1f}",
                        f"{c.lookouts}",
                        f"{c.reads_per_second:,.0f}",
                        f"{c.reads_if_all_looked:,.0f}",
                        f"{c.gather_bytes / 1024:.1f}",
                        f"{1000 * c.merge_seconds:.2f}",
                    )
                    for c in found["liveness"]
                ),
            ),
            "Manifests (real)\n\n"
            + _table(
                ("shards", "file MiB", "load s", "held MiB", "order ms of 2,048 samples"),
                (
                    (
                        f"{m.shards:,}",
                        f"{m.file_bytes / MIB:.1f}",
                        f"{m.load_seconds:.2f}",
                        f"{m.memory_bytes / MIB:.1f}",
                        f"{1000 * m.locate_seconds:.2f}",
                    )
                    for m in found["manifests"]
                ),
            ),
            "Presets on H100 (predicted)\n\n"
            + _table(
                (
                    *("preset", "stage", "ranks", "global batch", "GB on the GPU", "passes s"),
                    *("collectives s", "step s", "images/s", "of linear"),
                ),
                _predicted(found["predicted"]),
            ),
        ]
    )


def _predicted(points: Sequence[Any]) -> list[tuple[str, ...]]:
    rows = []
    for p in points:
        f = p.found
        first = next(q for q in points if (q.preset, q.stage) == (p.preset, p.stage))
        linear = first.found.images_per_second / first.ranks * p.ranks
        rows.append(
            (
                p.preset,
                p.stage,
                f"{p.ranks:,}",
                f"{p.batch:,}",
                f"{f.device_bytes / 1e9:.1f}",
                f"{f.passes:.2f}",
                f"{f.communication:.2f}",
                f"{f.step:.2f}",
                f"{f.images_per_second:,.0f}",
                f"{f.images_per_second / linear:.2f}",
            )
        )
    return rows


def draw(found: dict[str, list[Any]], out: Path) -> bool:
    """The picture; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, grid = pyplot.subplots(2, 3, figsize=(13, 7))

    def panel(place: tuple[int, int], title: str, across: str, up: str, log: bool = True) -> Any:
        axes = grid[place]
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.set_xscale("log", base=2 if across == "ranks" else 10)
        if log:
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    axes = panel((0, 0), "images/s of the presets on H100 (predicted)", "ranks", "images/s")
    memory = panel((0, 1), "bytes on a GPU (predicted)", "ranks", "GB")
    lines: dict[tuple[str, str], list[Any]] = {}
    for p in found["predicted"]:
        lines.setdefault((p.preset, p.stage), []).append(p)
    presets = list(dict.fromkeys(preset for preset, _ in lines))
    for (preset, stage), of_line in lines.items():
        of_line = sorted(of_line, key=lambda p: p.ranks)
        style = {"color": f"C{presets.index(preset)}", "ls": "-" if stage == "ZeRO-3" else ":"}
        x = [p.ranks for p in of_line]
        label = f"{preset}, {stage}"
        axes.plot(
            x, [p.found.images_per_second for p in of_line], marker="o", ms=3, label=label, **style
        )
        memory.plot(x, [p.found.device_bytes / 1e9 for p in of_line], marker="o", ms=3, **style)
    memory.axhline(80, color="grey", lw=0.8)
    if lines:
        axes.legend(frameon=False, fontsize=7)
    else:
        axes.set_visible(False), memory.set_visible(False)
    axes = panel((0, 2), "checkpoint (measured: real code)", "ranks", "")
    c = found["checkpoints"]
    x = [p.ranks for p in c]
    axes.plot(x, [p.files for p in c], "o-", ms=3, label="files")
    axes.plot(x, [p.manifest_bytes / 1024 for p in c], "o-", ms=3, label="manifest, KiB")
    axes.plot(x, [1000 * p.commit_seconds for p in c], "o-", ms=3, label="commit by rank 0, ms")
    axes.plot(x, [p.opened for p in c], "o-", ms=3, label="files a rank opens")
    axes.legend(frameon=False, fontsize=7)
    axes = panel((1, 0), "heartbeats and watchdog (measured, counted)", "ranks", "")
    c = found["liveness"]
    x = [p.ranks for p in c]
    axes.plot(x, [p.writes_per_second for p in c], "o-", ms=3, label="writes/s")
    axes.plot(x, [1000 * p.look_seconds for p in c], "o-", ms=3, label="a look at all, ms")
    axes.plot(x, [p.reads_per_second for p in c], "o-", ms=3, label="reads/s in a hang")
    axes.plot(
        x, [p.reads_if_all_looked for p in c], ":", color="grey", label="if every rank looked"
    )
    axes.legend(frameon=False, fontsize=7)
    axes = panel((1, 1), "10^9 samples, 10^5 shards (simulated)", "ranks", "")
    c = found["data"]
    x = [p.ranks for p in c]
    axes.plot(x, [p.amplification for p in c], "o-", ms=3, label="bytes fetched / corpus")
    axes.plot(x, [p.shards_at_once for p in c], "o-", ms=3, label="shards a rank needs at once")
    axes.plot(x, [1000 * p.locate_seconds for p in c], "o-", ms=3, label="order of a step, ms")
    axes.legend(frameon=False, fontsize=7)
    axes = panel((1, 2), "manifest (measured)", "shards", "")
    c = found["manifests"]
    x = [p.shards for p in c]
    axes.plot(x, [p.file_bytes / MIB for p in c], "o-", ms=3, label="file, MiB")
    axes.plot(x, [p.load_seconds for p in c], "o-", ms=3, label="load, s")
    axes.plot(x, [p.memory_bytes / MIB for p in c], "o-", ms=3, label="held, MiB")
    axes.plot(x, [1000 * p.locate_seconds for p in c], "o-", ms=3, label="order of 2,048, ms")
    axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return True


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


if __name__ == "__main__":
    sys.exit(main())
