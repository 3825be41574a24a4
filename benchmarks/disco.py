"""DisCo-Diff against a plain diffusion model on its 2-D toy, by one command: about 5 CPU minutes.

    python benchmarks/disco.py [--seeds 0 1 2] [--steps 4000]

Prints a table and writes runs/benchmarks/disco.json and disco.png. Every method has the same
denoiser, data, draws and steps; codes add an encoder in training. The distance W2 of two samples of
the data themselves (its floor) is printed beside: it is most of what W2 says here, so read
off-mode and loss first.

    python benchmarks/disco.py --images [--image-updates 250]

The same question on pictures (benchmarks/_disco/images.py): KID, held-out L_IG, curvature, use of
the codes. A line of docs/results/disco-images.jsonl for each model as it ends; the same command
goes on where it was stopped.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
COLUMNS = {
    "w2": "W2",
    "w2_floor": "W2 floor",
    "off_mode": "off-mode",
    "loss_2": "loss at sigma 2",
    "loss_large": "loss at sigma >= 2",
    "curvature": "curvature",
    "curvature_median": "its median",
    "perplexity": "perplexity",
    "used": "values used",
    "seconds": "CPU s",
}


def main() -> int:
    """Train and measure every method over the seeds."""
    import torch

    from benchmarks._disco.toy import Method, Setting, fit, measure

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Setting.steps, help="default: %(default)s")
    parser.add_argument("--images", action="store_true", help="the part on pictures")
    parser.add_argument("--image-updates", type=int, default=250, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="of --images: only show what there is")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.images:
        from benchmarks._disco import images

        if not args.table:
            images.run(args)
        print(images.table(args))
        images.plot(args, args.out / "disco-images.png")
        return 0
    methods = [
        Method("DM"),
        Method("DisCo k=8", 8),
        Method("DisCo k=16", 16),
        Method("DisCo k=16 + bonus 0.1 (ours)", 16, 0.1),
    ]
    rows, shown = [], {}
    for seed in args.seeds:
        for method in methods:
            toy, seconds = fit(method, seed, Setting(steps=args.steps))
            found, made = measure(toy, seed)
            shown.setdefault(method.name, made)
            rows.append({"method": method.name, "seed": seed, "seconds": seconds, **found})
            print(f"seed {seed} {method.name}: {_brief(found)}", file=sys.stderr, flush=True)
    names = [method.name for method in methods]
    print(table(rows, names))
    verdict = ratio(rows, "DM", names[-1], "off_mode")
    goal = "PASS" if verdict >= 10 else "FAIL"
    print(f"\noff-mode of DM over {names[-1]}: {verdict:.1f} times (goal: 10): {goal}")
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"steps": args.steps, "rows": rows, "off_mode_ratio": verdict}
    (args.out / "disco.json").write_text(json.dumps(report, indent=1))
    plot(shown, args.out / "disco.png")
    return 0 if verdict >= 10 else 1


def table(rows: list[dict], names: list[str]) -> str:
    """Mean over seeds and, in brackets, least and largest."""
    lines = [f"| method | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in names:
        own = [row for row in rows if row["method"] == name]
        cells = []
        for key in COLUMNS:
            values = [row[key] for row in own if key in row]
            cells.append(
                f"{statistics.mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"
                if values
                else "-"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(rows: list[dict], base: str, other: str, key: str) -> float:
    """Of the means over seeds."""
    means = [
        statistics.mean(row[key] for row in rows if row["method"] == name) for name in (base, other)
    ]
    return means[0] / max(means[1], 1e-9)


def plot(shown: dict, path: Path) -> None:
    """The first seed's samples of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 4), sharey=True)
    for axis, (name, made) in zip(axes, shown.items(), strict=True):
        axis.scatter(made[:, 0], made[:, 1], s=2)
        axis.set(title=name, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal")
    figure.tight_layout()
    figure.savefig(path, dpi=75, bbox_inches="tight")


def _brief(found: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in found.items())


if __name__ == "__main__":
    sys.exit(main())
