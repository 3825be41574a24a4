"""Diffusion contrastive divergence against contrastive divergence: `python benchmarks/dcd.py`.

Points in the plane with a known density (two rings; two modes of weights .2 and .8): KL(data |
model) on a grid. Grey pictures of 8 x 8 pixels: PSNR after denoising by the learned energy. Same
network, batch, rate and iterations for every method; each has one setting of its own, chosen among
four on a seed that is not counted. Three seeds or more.

Each training is a line of docs/results/dcd.jsonl as it ends, and is not run again: a benchmark
that was stopped goes on by the same command. `--table` prints what there is. `--images`, in place
of it: pictures of 32 px by annealed Langevin (benchmarks/_dcd/images.py), whose lines are in
docs/results/dcd-images.jsonl.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._dcd import methods, pictures, points  # noqa: E402
from pretrain.model.energy_net import EnergyMLP  # noqa: E402
from pretrain.rng import derive_seed  # noqa: E402

TUNING_SEED = 1000
PICTURES = "pictures 8x8"
TASKS = (*points.SETS, PICTURES)
Cell = dict[str, Any]


def main() -> int:
    """Run what is missing, then show all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help=default)
    add("--iterations", type=int, default=1500, help=f"on points {default}")
    add("--tuning", type=int, default=500, help=f"iterations of a choice, on points {default}")
    add("--picture-iterations", type=int, default=500, help=default)
    add("--picture-tuning", type=int, default=150, help=default)
    add("--images", action="store_true", help="draw pictures of 32 px instead, by KID")
    add("--image-updates", type=int, default=120, help=default)
    add("--results", type=Path, default=ROOT / "docs/results", help=f"of the lines {default}")
    add("--out", type=Path, default=ROOT / "runs/benchmarks", help=default)
    add("--table", action="store_true", help="only show what there is")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.images:
        from benchmarks._dcd import images

        if not args.table:
            images.run(args)
        print(images.table(args))
        images.plot(args, args.out / "dcd-images.png")
        return 0
    book = Book(args.results / "dcd.jsonl")
    if not args.table:
        for task in args.tasks:
            for name in args.methods:
                setting = chosen(book, args, task, name)
                for seed in args.seeds:
                    cell = book.cell(args, task, name, setting, seed, length(args, task))
                    print(json.dumps(cell), flush=True)
    print(table(book, args))
    plot(book, args, args.out / "dcd.png")
    return 0


class Book:
    """The trainings that ended, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.cells: list[Cell] = [json.loads(line) for line in lines]

    def find(self, **fields: Any) -> Cell | None:
        """The one with these fields."""
        return next((c for c in self.cells if fields.items() <= c.items()), None)

    def cell(
        self, args: argparse.Namespace, task: str, name: str, setting: float, seed: int, n: int
    ) -> Cell:
        """The training's result, made where it is missing."""
        fields = {"task": task, "method": name, "setting": setting, "seed": seed, "iterations": n}
        found = self.find(**fields)
        if found is None:
            found = fields | run(args, **fields)
            self.cells.append(found)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return found


def chosen(book: Book, args: argparse.Namespace, task: str, name: str) -> float:
    """The best of the method's four settings on the tuning seed."""
    values = methods.METHODS[name].values["pictures" if task == PICTURES else "points"]
    n = args.picture_tuning if task == PICTURES else args.tuning
    cells = [book.cell(args, task, name, v, TUNING_SEED, n) for v in values]
    best: float = min(cells, key=lambda c: c["score"])["setting"]
    return best


def run(
    args: argparse.Namespace, task: str, method: str, setting: float, seed: int, iterations: int
) -> Cell:
    """One training. ``score`` is less for better: KL in nats, or PSNR in dB negated; None (in the
    file 1e9) is never better than a number."""
    torch.manual_seed(derive_seed("dcd benchmark weights", seed))
    how = methods.METHODS[method]
    if task == PICTURES:
        data = pictures.load(args.out)
        net = EnergyMLP(pictures.SIDE**2, width=256, layers=3)

        def draw(n: int, g: torch.Generator) -> torch.Tensor:
            return data["train"][torch.randint(len(data["train"]), (n,), generator=g)]

        done = methods.train(how, net, draw, setting, seed, iterations)
        part = "validation" if seed == TUNING_SEED else "test"
        value = -pictures.score(net, data[part], seed)
        extra: Cell = {"diverged": not done.finite or value > -psnr_of_noise(data[part], seed)}
    else:
        of = points.SETS[task]()
        net = EnergyMLP(2, width=128, layers=3)
        done = methods.train(how, net, of.draw, setting, seed, iterations)
        log_q = points.log_probabilities(net)
        value = points.divergence(of, log_q)
        extra = {
            "diverged": not done.finite or value > points.DIVERGED,
            "left_share": points.left_share(log_q),
        }
        if seed == 0:
            grids(args).mkdir(parents=True, exist_ok=True)
            torch.save(log_q.float().view(points.SIDE, -1), grid_file(args, task, method))
    return {
        "score": min(value, 1e9) if not math.isnan(value) else 1e9,
        "cpu_seconds": round(done.seconds, 2),
        "ms_per_step": round(1000 * done.seconds / iterations, 3),
        "rows_per_sample": round(done.rows, 2),
        **extra,
    }


def length(args: argparse.Namespace, task: str) -> int:
    """Iterations of a training that counts."""
    n: int = args.picture_iterations if task == PICTURES else args.iterations
    return n


def grids(args: argparse.Namespace) -> Path:
    folder: Path = args.out / "dcd-grids"
    return folder


def grid_file(args: argparse.Namespace, task: str, method: str) -> Path:
    """Of a learned density; a task's name may hold a slash."""
    return grids(args) / f"{task.replace('/', '-')} {method}.pt"


def psnr_of_noise(clean: torch.Tensor, seed: int) -> float:
    return pictures.psnr(clean, pictures.noisy(clean, seed))


def rows(book: Book, args: argparse.Namespace, task: str) -> Iterator[tuple[str, list[Cell]]]:
    """Methods with the cells that count: the chosen setting, every seed."""
    for name in methods.METHODS:
        cells = [
            c
            for c in book.cells
            if (c["task"], c["method"], c["iterations"]) == (task, name, length(args, task))
            and c["seed"] != TUNING_SEED
        ]
        if cells:
            yield name, cells


def table(book: Book, args: argparse.Namespace) -> str:
    """Markdown, a table for each task."""
    parts = []
    for task in TASKS:
        better = (
            "PSNR, dB (range over seeds)" if task == PICTURES else "KL, nats (range over seeds)"
        )
        lines = [
            f"**{task}**\n",
            f"| method | setting | {better} | diverged | energies a sample and step | ms a step |"
            + (" left mode (.2) |" if "modes" in task else ""),
            "|---|---|---|---|---|---|" + ("---|" if "modes" in task else ""),
        ]
        for name, cells in rows(book, args, task):
            sign = -1 if task == PICTURES else 1
            values = sorted(sign * c["score"] for c in cells)
            how = methods.METHODS[name]
            line = (
                f"| {how.label} | {how.knob} {cells[0]['setting']:g} | "
                f"{statistics.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g}) | "
                f"{sum(c['diverged'] for c in cells)} of {len(cells)} | "
                f"{cells[0]['rows_per_sample']:g} | "
                f"{statistics.median(c['ms_per_step'] for c in cells):.2g} |"
            )
            if "modes" in task:
                line += f" {statistics.median(c['left_share'] for c in cells):.3f} |"
            lines.append(line)
        if task == PICTURES and (args.out / f"grey{pictures.SIDE}.pt").exists():
            data = pictures.load(args.out)
            clean = data["test"]
            y = pictures.noisy(clean, 0)
            linear = pictures.wiener(data["train"], y)
            lines.append(f"| (the noisy pictures) | | {pictures.psnr(clean, y):.3g} | | | |")
            lines.append(f"| (best linear filter) | | {pictures.psnr(clean, linear):.3g} | | | |")
        if len(lines) > 3:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(book: Book, args: argparse.Namespace, out: Path) -> None:
    """The learned densities of seed 0 beside the data's; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    names = [n for n in methods.METHODS if any(grids(args).glob(f"* {n}.pt"))]
    if not names:
        return
    figure, axes = pyplot.subplots(
        len(points.SETS), len(names) + 1, figsize=(2.2 * (len(names) + 1), 5.4), squeeze=False
    )
    for line, task in zip(axes, points.SETS, strict=True):
        right = points.SETS[task]().log_density(points.grid()).view(points.SIDE, -1)
        shown = {"data": right.flatten().log_softmax(0).view_as(right)}
        for name in names:
            path = grid_file(args, task, name)
            if path.exists():
                shown[name] = torch.load(path)
        top = shown["data"].exp().max().item()
        for axis, (name, log_q) in zip(line, shown.items(), strict=False):
            axis.imshow(
                log_q.exp().T, origin="lower", vmin=0, vmax=top, extent=[-6, 6, -6, 6], cmap="magma"
            )
            axis.set_xlim(-4, 4)
            axis.set_ylim(-4, 4)
            cell = book.find(task=task, method=name, seed=0, iterations=args.iterations)
            axis.set_title(name + (f"\nKL {cell['score']:.3g}" if cell else ""), fontsize=8)
        for axis in line:
            axis.set_axis_off()
    figure.tight_layout(h_pad=2)
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
