"""Pictures drawn from an energy: the embedded corpus at 32 px in colour, a small convolutional
energy E(x, level) learnt at rising noise, annealed Langevin to draw, KID against held-out pictures.

The baseline, CD-k, is given the same levels: at level i data are noised alike, and its k Langevin
steps descend E(., i). Same network, batch, rate, updates, levels and sampler for all; nothing was
tuned for any but the choice between two sampler rates, of which both are shown.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._images.corpus import Book, Judge, Row, load, spread
from pretrain.diffusion import energy as dcd
from pretrain.diffusion.energy import Contrast, Levels
from pretrain.diffusion.langevin import Slope, annealed_langevin, langevin, slope_of
from pretrain.model.energy_net import EnergyConv
from pretrain.rng import derive_seed, generator

SIZE, BATCH, WIDTH, RATE = 32, 32, 12, 1e-3
LEVELS = Levels.geometric(0.1, 2.0, 8)
DRAWS = 4  # M of the finite-time estimator
IMAGES, STEPS, RATES = 132, 8, (0.05, 0.2)
ENERGY_L2 = 1e-3  # CD's, as in the other parts
# (energy at a level, x, generator, sigma of the level's steps, spread to the next level) -> loss
Loss = Callable[[dcd.Energy, Tensor, torch.Generator, float, float], Contrast]


@dataclass(frozen=True)
class Method:
    """Attributes:
    evaluations: rows through the network forward, and passes back to the picture, for each
        picture and step.
    """

    loss: Loss
    evaluations: str
    energy_l2: float = 0.0


def cd(k: int) -> Method:
    def loss(e: dcd.Energy, x: Tensor, g: torch.Generator, sigma: float, _: float) -> Contrast:
        noises = torch.randn(k, *x.shape, generator=g)
        return dcd.contrastive(e, x, langevin(slope_of(e), x, noises, 0.05 * sigma**2))

    return Method(loss, f"{k + 2} + {k}", ENERGY_L2)


def finite(e: dcd.Energy, x: Tensor, g: torch.Generator, _: float, step: float) -> Contrast:
    noise, back = torch.randn(x.shape, generator=g), torch.randn(DRAWS, *x.shape, generator=g)
    return dcd.discrepancy(e, x, noise, back, step)


def one_step(e: dcd.Energy, x: Tensor, g: torch.Generator, _: float, step: float) -> Contrast:
    noise, probe = (torch.randn(x.shape, generator=g) for _ in range(2))
    found = dcd.one_step(e, x, noise, probe.sign(), 0.1 * step**2)
    # Scores are as large as 1 / sigma: levels weigh alike.
    return Contrast(found.loss_B * step**2, found.data_B, found.other_KB)


METHODS = {
    "CD-1": cd(1),
    "CD-10": cd(10),
    "DCD one step, VE": Method(one_step, "2 + 2, through each other"),
    f"DCD finite time (ED estimator, M={DRAWS})": Method(finite, f"{DRAWS + 1} + 0"),
}


def at_level(net: EnergyConv, level: int) -> dcd.Energy:
    """E(., level)."""

    def energy(x: Tensor) -> Tensor:
        found: Tensor = net(x, torch.full((len(x),), level))
        return found

    return energy


def fit(method: Method, net: EnergyConv, data: Tensor, seed: int, updates: int) -> bool:
    """Adam, one level a batch; False where a loss was not finite, and training ended."""
    g = torch.Generator().manual_seed(derive_seed("dcd images", seed))
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    for _ in range(updates):
        level = int(torch.randint(len(LEVELS), (1,), generator=g))
        low, high = LEVELS.sigmas[level], LEVELS.sigmas[level + 1]
        x = data[torch.randint(len(data), (BATCH,), generator=g)]
        x = x + low * torch.randn(x.shape, generator=g)
        step = (high**2 - low**2) ** 0.5
        contrast = method.loss(at_level(net, level), x, g, low or high, step)
        loss = contrast.loss_B.mean()
        if method.energy_l2:
            squares = contrast.data_B.square().mean() + contrast.other_KB.square().mean()
            loss = loss + method.energy_l2 * squares
        if not torch.isfinite(loss):
            return False
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
    return True


def draw(net: EnergyConv, mean: Tensor, rate: float) -> Tensor:
    """Pictures by annealed Langevin, from noise about the corpus's mean colour."""
    g = generator(0, "dcd images")
    top = LEVELS.sigmas[len(LEVELS) - 1]
    x = mean + top * torch.randn(IMAGES, 3, SIZE, SIZE, generator=g)

    def slope(level: int) -> Slope:
        return slope_of(at_level(net, level))

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=g)

    return annealed_langevin(slope, x, LEVELS.sigmas[:-1], STEPS, rate, noise)


def gaussian(data: Tensor) -> Tensor:
    """Draws of the normal density with the pictures' mean and covariance: what any energy should
    beat."""
    flat = data.flatten(1)
    g, mean = generator(0, "gaussian"), flat.mean(0)
    mixed = torch.randn(IMAGES, len(flat), generator=g) @ (flat - mean) / len(flat) ** 0.5
    return (mean + mixed).view(-1, 3, SIZE, SIZE)


def run(args: argparse.Namespace) -> None:
    """What is missing."""
    book = Book(args.results / "dcd-images.jsonl")
    train, held = load(["train"], SIZE), load(["heldout-concepts", "heldout-renderings"], SIZE)
    judge, data = Judge(train, held, args.out), train.images_NCHW
    mean = data.mean((0, 2, 3), keepdim=True)

    def kid(made: Tensor) -> float | None:
        good = made.isfinite().flatten(1).all(1).all()
        return judge.kid(judge.features(made.clamp(-1, 1))) if good else None

    references = {
        "normal density": partial(gaussian, data),
        "training pictures": lambda: data[:IMAGES],
    }
    for name, make in references.items():
        if book.find(method=name) is None:
            book.add({"method": name, "kid": kid(make())})
    for seed in args.seeds:
        for name, method in METHODS.items():
            if book.find(method=name, seed=seed, updates=args.image_updates):
                continue
            torch.manual_seed(derive_seed("dcd images weights", seed))
            net, began = EnergyConv(3, WIDTH, len(LEVELS)), time.process_time()
            fine = fit(method, net, data, seed, args.image_updates)
            row: Row = {"method": name, "seed": seed, "updates": args.image_updates, "finite": fine}
            row["ms_per_step"] = 1000 * (time.process_time() - began) / args.image_updates
            began = time.process_time()
            for rate in RATES:
                made = draw(net, mean, rate)
                row[f"kid {rate}"] = kid(made)
                if seed == args.seeds[0]:
                    torch.save(made[:12], args.out / f"dcd-images {name} {rate}.pt")
            row["draw_cpu_seconds"] = (time.process_time() - began) / len(RATES)
            book.add(row)


def table(args: argparse.Namespace) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    book = Book(args.results / "dcd-images.jsonl")
    lines = [
        f"| | KID, sampler rate {RATES[0]:g} | {RATES[1]:g} | diverged | rows forward + back, a "
        "picture and step | CPU ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        rows = [
            r for r in book.rows if (r["method"], r.get("updates")) == (name, args.image_updates)
        ]
        if not rows:
            continue
        cells = []
        for rate in RATES:
            values = [r[f"kid {rate}"] for r in rows if r[f"kid {rate}"] is not None]
            lost = len(rows) - len(values)
            cells.append(
                (spread(values) if values else "") + (f" ({lost} not finite)" if lost else "")
            )
        cells += [f"{sum(not r['finite'] for r in rows)} of {len(rows)}", method.evaluations]
        cells.append(spread([r["ms_per_step"] for r in rows], 0))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in ("normal density", "training pictures"):
        row = book.find(method=name)
        if row:
            lines.append(f"| ({name}) | {row['kid']:.3f} | | | | |")
    return "\n".join(lines)


def plot(args: argparse.Namespace, path: Path) -> None:
    """Pictures of the first seed, a row for each method and rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = [(n, r, args.out / f"dcd-images {n} {r}.pt") for n in METHODS for r in RATES]
    files = [f for f in files if f[2].exists()]
    if not files:
        return
    figure, axes = pyplot.subplots(len(files), 1, figsize=(8, 0.95 * len(files)), squeeze=False)
    for axis, (name, rate, file) in zip(axes[:, 0], files, strict=True):
        row = torch.cat(list(torch.load(file, weights_only=True)), 2)
        axis.imshow(((row.nan_to_num() + 1) / 2).clamp(0, 1).permute(1, 2, 0))
        axis.set_title(f"{name}, rate {rate}", fontsize=7, pad=1)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
