"""DisCo-Diff on pictures: the embedded corpus at 16 px, without captions, by the trainer's own
task, objective, prior and sampler in a plain loop.

A plain diffusion model and models with codes have the same U-Net, initial weights of it, pictures,
times and noise. Codes for generated pictures come from a transformer prior, trained on the codes of
the training pictures; its training is counted beside.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._images.corpus import Book, Judge, Pictures, Row, load, spread
from pretrain.config import load as load_config
from pretrain.data.tokenizer import Tokenizer
from pretrain.inference import Heads
from pretrain.objectives import _disco_prior as stage2
from pretrain.objectives._disco_codes import entropy
from pretrain.objectives._disco_sampling import CodeGuidance, by_prior
from pretrain.objectives.disco import Disco
from pretrain.optim import parameter_groups
from pretrain.rng import derive_seed, generator
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask
from pretrain.train import build_task
from pretrain.types import Batch

SIZE, BATCH, IMAGES = 16, 32, 132
LARGE = 2.0  # noise-to-signal ratio above which L_IG is also quoted
CURVED = 0.5  # curvature is taken over noise levels above this
CODES = [
    "objectives.disco.weight=1",
    "objectives.disco.codes=4",
    "objectives.disco.values=16",
    "objectives.disco.encoder={width: 64, layers: 2}",
    "objectives.disco.tokens={width: 64, layers: 1}",
]
VARIANTS = {
    "plain diffusion": [],
    "DisCo, 4 codes of 16": CODES,
    "DisCo, with our entropy bonus of 0.1": [*CODES, "objectives.disco.entropy_bonus=0.1"],
}
PRIOR = stage2.PriorConfig(width=64, layers=2, conditioned=False)


class Data:
    """Batches of pictures in memory, in an order of the seed."""

    def __init__(self, pictures: Pictures, tokenizer: Tokenizer, length: int) -> None:
        self.images = ((pictures.images_NCHW + 1) * 127.5).round().to(torch.uint8)
        tokens, mask = tokenizer.encode([""], length)
        self.text = tokens, mask

    def batch(self, rows: Tensor, first: int) -> Batch:
        n = len(rows)
        tokens, mask = (x.expand(n, -1) for x in self.text)
        return Batch(self.images[rows], tokens, mask, torch.arange(first, first + n))

    def forever(self, seed: int, size: int) -> Iterator[Batch]:
        g, first = generator(seed, "order"), 0
        while True:
            rows = torch.randint(len(self.images), (size,), generator=g)
            yield self.batch(rows, first)
            first += size


def config_of(variant: str, seed: int) -> RunConfig:
    """Of images.yaml, with the variant's codes."""
    overrides = [*VARIANTS[variant], f"seed={seed}"]
    return load_config(RunConfig, Path(__file__).with_suffix(".yaml"), overrides)


def fit(task: PretrainTask, config: RunConfig, data: Data, seed: int, updates: int) -> None:
    """AdamW of the preset at a cosine."""
    o = config.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(task, o), lr=o.lr, betas=o.betas)
    batches = data.forever(seed, BATCH)
    for k in range(updates):
        loss = task(next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        ramp = min(1.0, (k + 1) / 30) * (1 - k / updates)
        for group in optimizer.param_groups:
            group["lr"] = o.lr * ramp * group["rate_scale"]
        optimizer.step()
    task.eval()


def disco_of(task: PretrainTask) -> Disco | None:
    return next((o for o in task.objectives.values() if isinstance(o, Disco)), None)


def fit_prior(
    task: PretrainTask, disco: Disco, data: Data, seed: int
) -> tuple[stage2.Fitted, stage2.Prior]:
    """Of the training pictures' codes, one in ten held out; the best weights by those."""
    z = task.model.autoencoder.encode(data.batch(torch.arange(len(data.images)), 0).pixels_BCHW)
    s, width = disco.settings, task.model.config.text_encoder.width
    torch.manual_seed(seed)
    prior = stage2.Prior(PRIOR, s.codes, s.values, width)
    heldout = torch.arange(len(z)) % 10 == 0

    def coded() -> Iterator[stage2.Coded]:
        g = generator(seed, "prior")
        while True:
            rows = torch.randint(len(z), (128,), generator=g)
            u = torch.rand(len(rows), s.codes, s.values, generator=g)
            with torch.no_grad():
                codes = disco.codes_of(z[rows], u)
            yield codes, torch.zeros(len(rows), width), heldout[rows]

    config = stage2.FitConfig(samples=25_000, lr=1e-3, judge_every=2_500)
    return stage2.fit(prior, coded(), config), prior.eval()


@torch.no_grad()
def held_losses(task: PretrainTask, data: Data, codes: bool) -> tuple[float, float]:
    """L_IG of held-out pictures, over the training distribution of noise and above LARGE."""
    model, disco = task.model, disco_of(task)
    batch = data.batch(torch.arange(len(data.images)), 1_000_000)
    noised = task.noise(batch)
    c = noised.null_c_BLD
    if disco is not None:
        tokens = disco.null_tokens(len(c))
        if codes:
            s = disco.settings
            u = torch.rand(len(c), s.codes, s.values, generator=generator(0, "held"))
            tokens = disco.tokens_of(disco.codes_of(noised.x0_z_BCHW, u))
        c = torch.cat([c, tokens], 1)
    path = model.image_path
    ratio = path.schedule.sigma(noised.t_z_B) / path.schedule.alpha(noised.t_z_B)
    weight = path.f_target(noised.x0_z_BCHW, noised.z_t_BCHW, noised.t_z_B)
    zero = path.f_target(torch.zeros_like(noised.x0_z_BCHW), noised.z_t_BCHW, noised.t_z_B)
    # L_IG is the error of x_0 times lambda(t): f_target is linear in x_0.
    scale = (weight - zero).flatten(1).norm(dim=1) / noised.x0_z_BCHW.flatten(1).norm(dim=1)
    x0 = model.denoise_image(noised.z_t_BCHW, noised.t_z_B, c)
    errors = scale.square() * (x0 - noised.x0_z_BCHW).square().flatten(1).mean(1)
    return float(errors.mean()), float(errors[ratio > LARGE].mean())


@torch.no_grad()
def bends(task: PretrainTask, conditions: Callable[[Tensor], Any], eps: Tensor) -> float:
    """Curvature |T_i - T_{i+1}| / |x_i - x_{i+1}| between neighbouring levels of a 24-step grid on
    Euler trajectories, mean over levels above CURVED and over pictures. (Differences over 1e-3, as
    on the toy, drown in fp32's rounding here.)"""
    path = task.model.image_path
    grid = path.schedule.grid(24)
    grid = grid[grid > CURVED]
    x, last, found = eps * grid[0], None, []
    for i, sigma in enumerate(grid):
        t = sigma.expand(len(x))
        slope = (x - task.model.denoise_image(x, t, conditions(t)[0])) / sigma
        unit = F.normalize(slope.flatten(1), dim=1)
        if last is not None:
            found.append((unit - last[0]).norm(dim=1) / (x - last[1]).flatten(1).norm(dim=1))
        last = (unit, x)
        if i + 1 < len(grid):
            x = x + (grid[i + 1] - sigma) * slope
    return float(torch.stack(found).mean())


def score(
    task: PretrainTask, config: RunConfig, judge: Judge, held: Data, prior: stage2.Prior | None
) -> tuple[Row, Tensor]:
    """What the table shows, and generated pictures."""
    model, disco, found = task.model, disco_of(task), {}
    found["l_ig"], found["l_ig_large"] = held_losses(task, held, codes=True)
    condition = task.conditions
    kinds: dict[str, Any] = {"kid": condition}
    if disco is not None and prior is not None:
        found["l_ig_null"], found["l_ig_large_null"] = held_losses(task, held, codes=False)
        draw = by_prior(prior)
        kinds = {
            "kid": CodeGuidance(disco, model, draw),
            "kid_guided": CodeGuidance(disco, model, draw, 1.0),
            "kid_null": condition,
        }
        batch = held.batch(torch.arange(len(held.images)), 0)
        with torch.no_grad():
            z = model.autoencoder.encode(batch.pixels_BCHW)
            u = torch.rand(len(z), disco.settings.codes, 16, generator=generator(0, "use"))
            codes = disco.codes_of(z, u)
        shares = F.one_hot(codes, disco.settings.values).float().mean(0)
        found["perplexity"] = float(entropy(shares).exp().mean())
        found["used"] = float((shares > 0.01).sum(1).float().mean())
    tokens, mask = (x.expand(IMAGES, -1) for x in held.text)
    shown = None
    for name, how in kinds.items():
        made = Heads(model, config.inference, how).generate_tokens(
            tokens, mask, list(range(IMAGES)), guidance=0.0
        )
        shown = made if shown is None else shown
        found[name] = judge.kid(judge.features(made))
    with torch.no_grad():
        null_c = model.encode_text(tokens[:64], mask[:64])[1].expand(64, -1, -1)
        conditions = kinds["kid"](null_c, null_c, 0.0, list(range(64)))
        eps = torch.randn(64, *model.latent_shape, generator=generator(0, "bends"))
        found["curvature"] = bends(task, conditions, eps)
    assert shown is not None
    return found, shown


def run(args: argparse.Namespace) -> None:
    """What is missing."""
    book = Book(args.results / "disco-images.jsonl")
    train, held = load(["train"], SIZE), load(["heldout-concepts", "heldout-renderings"], SIZE)
    judge = Judge(train, held, args.out)
    tokenizer = Tokenizer("data/emoji/tokenizer.model")
    length = config_of("plain diffusion", 0).model.text_encoder.length
    data, other = Data(train, tokenizer, length), Data(held, tokenizer, length)
    for seed in args.seeds:
        for name in VARIANTS:
            if book.find(variant=name, seed=seed, updates=args.image_updates):
                continue
            config, began = config_of(name, seed), time.process_time()
            task = build_task(config, tokenizer)
            fit(task, config, data, derive_seed("disco images", seed), args.image_updates)
            trained, disco, prior = time.process_time(), disco_of(task), None
            row: Row = {"variant": name, "seed": seed, "updates": args.image_updates}
            if disco is not None:
                fitted, prior = fit_prior(task, disco, data, seed)
                row |= {"prior_nats": fitted.nats, "prior_heldout_nats": fitted.heldout_nats}
            row["train_cpu_seconds"] = round(trained - began, 1)
            row["prior_cpu_seconds"] = round(time.process_time() - trained, 1)
            found, made = score(task, config, judge, other, prior)
            if seed == args.seeds[0]:
                torch.save(made[:24], args.out / f"disco-images {name}.pt")
            book.add(row | found)


COLUMNS = {
    "kid": "KID, codes of the prior",
    "kid_guided": "KID, codes guided (1)",
    "kid_null": "KID, null codes",
    "l_ig": "held-out L_IG, own codes",
    "l_ig_null": "held-out L_IG, null",
    "l_ig_large": f"L_IG above {LARGE:g}, own codes",
    "l_ig_large_null": f"L_IG above {LARGE:g}, null",
    "curvature": "curvature",
    "perplexity": "perplexity of a code (of 16)",
    "prior_heldout_nats": "prior, held-out nats (of 11.09)",
    "train_cpu_seconds": "CPU s",
    "prior_cpu_seconds": "CPU s, prior",
}


def table(args: argparse.Namespace) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    book = Book(args.results / "disco-images.jsonl")
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in VARIANTS:
        rows = [r for r in book.rows if r["variant"] == name and r["updates"] == args.image_updates]
        cells = []
        for key in COLUMNS:
            values = [r[key] for r in rows if key in r]
            cells.append(
                spread(values, 1 if "seconds" in key else 4 if key == "curvature" else 3)
                if values
                else ""
            )
        if rows:
            lines.append(f"| {name} ({len(rows)} seeds) | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(args: argparse.Namespace, path: Any) -> None:
    """Pictures of the first seed, a row for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {n: args.out / f"disco-images {n}.pt" for n in VARIANTS}
    shown = {n: p for n, p in shown.items() if p.exists()}
    if not shown:
        return
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(9, 1.6 * len(shown)), squeeze=False)
    for axis, (name, file) in zip(axes[:, 0], shown.items(), strict=True):
        made = torch.load(file, weights_only=True)
        rows = [torch.cat(list(part), 2) for part in made.split(len(made) // 2)]
        axis.imshow(((torch.cat(rows, 1) + 1) / 2).clamp(0, 1).permute(1, 2, 0))
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
