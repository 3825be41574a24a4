"""CDCD on pictures, the paper's own setting at a small size: VQ tokens of the embedded corpus at
32 px, mask-and-replace diffusion, the parts of `python -m pretrain vq` and its shipped loss.

The condition is a caption "GROUP, STYLE" ("food drink, Noto"), so that a probe can tell whether it
was followed. Variants of a seed see the same pictures, times, noise and initial weights.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._images.corpus import Book, Judge, Pictures, Row, load, spread
from pretrain import distances
from pretrain.commands._vq._model import VQDiffusion, VQDiffusionConfig
from pretrain.commands._vq.denoise import held_out_nll
from pretrain.config import build
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.vq import VQAutoencoder, VQConfig
from pretrain.objectives import _cdcd_loss as loss
from pretrain.objectives._cdcd_tokens import entropy, token_loss

SIZE, T, BATCH, NEGATIVES, CHUNKS = 32, 20, 32, 4, 8
STEPS = (20, 13, 6)  # 13 is 35% fewer
IMAGES = 132
# name -> (the loss, negatives, temperature, the training it shares)
VARIANTS: dict[str, tuple[dict[str, Any], str, float, str | None]] = {
    "baseline, w = 0": ({}, "intra", 1.0, None),
    "intra, step-wise, w = 5e-5 (the paper's)": (
        {"contrast": 5e-5, "mechanism": "step"},
        "intra",
        1.0,
        None,
    ),
    "inter, sample-wise, w = 5e-4": (
        {"contrast": 5e-4, "mechanism": "sample"},
        "inter",
        1.0,
        None,
    ),
    "control: baseline at temperature .9": ({}, "intra", 0.9, "baseline, w = 0"),
}


def tokenizer_of_pictures(args: argparse.Namespace, pictures: Tensor) -> VQAutoencoder:
    """One VQ tokenizer for all seeds and variants, trained once."""
    torch.manual_seed(0)
    vq = VQAutoencoder(VQConfig(codes=64, dim=8, width=16))
    path = args.out / f"cdcd-images-vq-{args.vq_updates}.pt"
    if path.exists():
        vq.load_state_dict(torch.load(path, weights_only=True))
        return vq.eval()
    optimizer = torch.optim.AdamW(vq.parameters(), 2e-3)
    for _ in range(args.vq_updates):
        out = vq(pictures[torch.randint(len(pictures), (64,))])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    torch.save(vq.state_dict(), path)
    return vq.eval()


def new_model(fields: dict[str, Any], vocabulary: int) -> VQDiffusion:
    """A small VQ-Diffusion model."""
    tree = {
        "process": {"steps": T},
        "denoiser": {"width": 64, "layers": 3, "heads": 4},
        "text_encoder": {"width": 64, "layers": 1, "heads": 4, "length": 12},
        "loss": fields,
    }
    return VQDiffusion(build(VQDiffusionConfig, tree, "vq"), 64, (SIZE // 4) ** 2, vocabulary)


def fit(
    model: VQDiffusion, data: tuple[Tensor, Tensor, Tensor], negatives: str, seed: int, updates: int
) -> None:
    """The command's loop, with draws that do not depend on the variant."""
    g, process = torch.Generator().manual_seed(1000 + seed), model.process
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.96), weight_decay=4.5e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        rows = torch.randperm(len(data[0]), generator=g)[:BATCH]
        x0, tokens, mask = (part[rows] for part in data)
        t = torch.randint(1, T + 1, (BATCH,), generator=g)
        x_t = process.noised(x0, t, torch.rand(*x0.shape, process.codes + 1, generator=g))
        keys = torch.rand(1, NEGATIVES, CHUNKS, generator=g).expand(BATCH, -1, -1)
        u = torch.rand(BATCH, generator=g)
        if negatives == "intra":
            wrong = loss.shuffled(x0[..., None], keys)[..., 0]
            real = torch.ones(wrong.shape[:2], dtype=torch.bool)
        else:
            others = loss.others(rows, u, NEGATIVES, gather=False)
            wrong, real = others.of(x0), others.real_BK
        term = token_loss(
            process, model(x_t, t, tokens, mask), x0, x_t, t, wrong, real, model.config.loss
        )
        optimizer.zero_grad()
        term.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def predicted_entropy(model: VQDiffusion, data: tuple[Tensor, Tensor, Tensor]) -> float:
    """Entropy of p(x_0 | x_t, c) on held-out pictures, nats a token."""
    x0, tokens, mask = (part[:256] for part in data)
    t = torch.arange(len(x0)) * T // len(x0) + 1
    u = torch.rand(*x0.shape, model.process.codes + 1, generator=torch.Generator().manual_seed(0))
    return float(entropy(model(model.process.noised(x0, t, u), t, tokens, mask)).mean())


@torch.no_grad()
def drawn(
    model: VQDiffusion, text: tuple[Tensor, Tensor], steps: int, temperature: float
) -> Tensor:
    """Tokens (N, L) for captions."""
    c = model.text_encoder(*text).c_BLD
    g = torch.Generator().manual_seed(5)
    x = model.process.sample(
        lambda x_t, t: model.denoiser(x_t, t, c), (len(c), (SIZE // 4) ** 2), steps, g, temperature
    )
    return x.clamp(max=63)


class Probe:
    """Linear probes of style and group on tokens (how often each is there, where, and each token),
    fitted to the training pictures' tokens: the tokenizer blurs what SqueezeNet would look at."""

    def __init__(self, x_NL: Tensor, labels: dict[str, tuple[str, ...]]) -> None:
        seen = self.read(x_NL)
        gram = seen.T @ seen + 100 * torch.eye(seen.shape[1])
        self.names = {what: sorted(set(found)) for what, found in labels.items()}
        self.weights = {
            what: torch.linalg.solve(
                gram, seen.T @ torch.tensor([[float(n == x) for n in names] for x in labels[what]])
            )
            for what, names in self.names.items()
        }

    @staticmethod
    def read(x_NL: Tensor) -> Tensor:
        side = SIZE // 4
        one_hot = F.one_hot(x_NL, 64).float()
        quarters = one_hot.view(-1, 2, side // 2, 2, side // 2, 64).mean((2, 4)).flatten(1)
        ones = torch.ones(len(x_NL), 1)
        return torch.cat([8 * one_hot.mean(1), 8 * quarters, one_hot.flatten(1), ones], 1)

    def agreement(self, x_NL: Tensor, what: str, labels: tuple[str, ...]) -> float:
        """Share in which the probe sees what was asked for."""
        found = (self.read(x_NL) @ self.weights[what]).argmax(1).tolist()
        hits = [self.names[what][k] == label for k, label in zip(found, labels, strict=True)]
        return sum(hits) / len(hits)


def pair_entropy(x_NL: Tensor) -> float:
    """Entropy of horizontal pairs of tokens, nats (plug-in; biased alike for all)."""
    grid = x_NL.view(-1, SIZE // 4, SIZE // 4)
    pairs = torch.bincount((grid[..., :-1] * 64 + grid[..., 1:]).flatten(), minlength=64**2)
    p = pairs / pairs.sum()
    return float(-(p * p.clamp(min=1e-12).log()).sum())


def score(
    model: VQDiffusion,
    vq: VQAutoencoder,
    judge: Judge,
    probe: Probe,
    real_ND: Tensor,
    held: Pictures,
    text: tuple[Tensor, Tensor],
    temperature: float,
) -> Row:
    """By number of steps: KID, agreement, entropy of pairs."""
    found: Row = {}
    every = slice(0, None, max(1, len(held) // IMAGES))
    captions = tuple(part[every][:IMAGES] for part in text)
    for steps in STEPS:
        x = drawn(model, (captions[0], captions[1]), steps, temperature)
        with torch.no_grad():
            made = vq.decode(x.unflatten(1, (SIZE // 4, SIZE // 4))).clamp(-1, 1)
        seen = judge.features(made)
        found[str(steps)] = {"kid": kid(real_ND, seen), "pairs": pair_entropy(x)} | {
            what: probe.agreement(x, what, labels[every][:IMAGES])
            for what, labels in held.labels.items()
        }
    return found


def kid(real_ND: Tensor, seen_ND: Tensor) -> float:
    """Against held-out pictures that went through the tokenizer too."""
    return distances.kid(real_ND, seen_ND, min(128, len(seen_ND)))[0]


def run(args: argparse.Namespace) -> None:
    """What is missing."""
    book = Book(args.results / "cdcd-images.jsonl")
    train, held = load(["train"], SIZE), load(["heldout-concepts", "heldout-renderings"], SIZE)
    judge = Judge(train, held, args.out)
    vq = tokenizer_of_pictures(args, train.images_NCHW)
    tokenizer = Tokenizer(str(Path("data/emoji/tokenizer.model")))
    data = []
    with torch.no_grad():
        for part in (train, held):
            codes = torch.cat([vq.encode(x).flatten(1) for x in part.images_NCHW.split(256)])
            data.append((codes, *tokenizer.encode(list(part.captions), 12)))
        again = vq.decode(data[1][0].unflatten(1, (SIZE // 4, SIZE // 4))).clamp(-1, 1)
    probe, real = Probe(data[0][0], train.labels), judge.features(again)
    if book.find(variant="data") is None:
        row: Row = {"variant": "data", "pairs": pair_entropy(data[1][0]), "blur": judge.kid(real)}
        for what, labels in held.labels.items():
            row[what] = probe.agreement(data[1][0], what, labels)
            row[f"{what} (chance)"] = max(labels.count(x) for x in set(labels)) / len(labels)
        row["psnr"] = 10 * math.log10(4 / float((again - held.images_NCHW).square().mean()))
        book.add(row)
    for seed in args.seeds:
        models: dict[str, VQDiffusion] = {}
        for name, (_, _, temperature, shared) in VARIANTS.items():
            if book.find(variant=name, seed=seed, updates=args.image_updates):
                continue
            began = time.process_time()
            source = shared or name
            if source not in models:
                torch.manual_seed(seed)
                models[source] = new_model(VARIANTS[source][0], tokenizer.vocab_size)
                fit(models[source], data[0], VARIANTS[source][1], seed, args.image_updates)
            model, trained = models[source], time.process_time()
            book.add(
                {
                    "variant": name,
                    "seed": seed,
                    "updates": args.image_updates,
                    "nll": held_out_nll(model, *data[1]),
                    "entropy": predicted_entropy(model, data[1]),
                    "train_cpu_seconds": round(trained - began, 1),
                    "steps": score(model, vq, judge, probe, real, held, data[1][1:], temperature),
                }
            )


def fewest(row: Row, base: Row) -> int | None:
    """Least number of steps whose KID is at most the same seed's baseline's with all."""
    bound = base["steps"][str(T)]["kid"]
    good = [s for s in STEPS if row["steps"][str(s)]["kid"] <= bound]
    return min(good) if good else None


def table(args: argparse.Namespace) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    book = Book(args.results / "cdcd-images.jsonl")
    lines = [
        "| | NLL bound, nats a token | entropy of p(x_0 \\| x_t) | "
        f"KID in {T} steps | in 13 | in 6 | style in {T} | in 13 | in 6 | group in {T} | "
        f"entropy of pairs in {T} | fewest steps |",
        "|" + "---|" * 12,
    ]
    for name in VARIANTS:
        rows = [r for r in book.rows if r["variant"] == name and r["updates"] == args.image_updates]
        if not rows:
            continue

        def at(steps: int, key: str, digits: int = 3, rows: list[Row] = rows) -> str:
            return spread([r["steps"][str(steps)][key] for r in rows], digits)

        bases = [
            book.find(variant=next(iter(VARIANTS)), seed=r["seed"], updates=r["updates"])
            for r in rows
        ]
        least = [str(fewest(r, b) or "none") for r, b in zip(rows, bases, strict=True) if b]
        cells = [spread([r["nll"] for r in rows]), spread([r["entropy"] for r in rows])]
        cells += [at(s, "kid") for s in (T, 13, 6)] + [at(s, "style") for s in (T, 13, 6)]
        cells += [at(T, "group"), at(T, "pairs", 2), ", ".join(least)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    data = book.find(variant="data")
    if data:
        lines.append(
            f"| held-out pictures' tokens (commonest label) | | | 0 | | | {data['style']:.3f} "
            f"({data['style (chance)']:.3f}) | | | {data['group']:.3f} "
            f"({data['group (chance)']:.3f}) | {data['pairs']:.2f} | |"
        )
    return "\n".join(lines)


def plot(args: argparse.Namespace, path: Path) -> None:
    """KID by steps, and style against entropy."""
    import statistics

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    book = Book(args.results / "cdcd-images.jsonl")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in VARIANTS:
        rows = [r for r in book.rows if r["variant"] == name and r["updates"] == args.image_updates]
        if rows:
            mean = {
                key: [statistics.mean(r["steps"][str(s)][key] for r in rows) for s in STEPS]
                for key in ("kid", "style", "pairs")
            }
            style = "--" if name.startswith("control") else "-"
            left.plot(STEPS, mean["kid"], style, marker="o", markersize=3, label=name)
            right.plot(mean["pairs"], mean["style"], style, marker="o", markersize=3, label=name)
    left.set(xlabel="sampling steps", ylabel="KID")
    right.set(xlabel="entropy of pairs of tokens (nats)", ylabel="agreement in style (probe)")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
