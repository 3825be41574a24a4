"""Small grey pictures of the committed corpus, and how well an energy takes noise off them."""

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from pretrain.data.evalset import read_pictures
from pretrain.data.samples import prepare
from pretrain.diffusion.langevin import denoise

ROOT = Path(__file__).resolve().parents[2]
SIDE, SIGMA = 8, 0.3  # pixels; deviation of the noise where black is -1 and white 1
VALIDATION = 256  # pictures, held out of training, by which settings are chosen


def load(folder: Path) -> dict[str, Tensor]:
    """Pictures as (N, 64) in [-1, 1]: "train", "validation" and "test" (held-out concepts); made
    once, kept in ``folder``."""
    kept = folder / f"grey{SIDE}.pt"
    if not kept.exists():
        found = {}
        for name in ("train", "heldout-concepts"):
            pictures = read_pictures(str(ROOT / f"data/emoji/{name}.json"))
            rows = [prepare(Image.open(io.BytesIO(p.png)), SIDE).mean(0) for p in pictures]
            found[name] = torch.stack(rows).flatten(1)
        g = torch.Generator().manual_seed(0)
        mixed = found["train"][torch.randperm(len(found["train"]), generator=g)]
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"train": mixed[VALIDATION:], "validation": mixed[:VALIDATION]}
        torch.save(parts | {"test": found["heldout-concepts"]}, kept)
    loaded: dict[str, Tensor] = torch.load(kept)
    return loaded


def noisy(clean: Tensor, seed: int) -> Tensor:
    """The same noise for every contestant."""
    return clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def psnr(clean: Tensor, found: Tensor) -> float:
    """Decibels, mean over pictures; the range is 2. Not finite: -infinity."""
    error = (found.clamp(-1, 1) - clean).square().mean(1).clamp(min=1e-12)
    value = (10 * torch.log10(4 / error)).mean().item()
    return value if math.isfinite(value) else -math.inf


def wiener(train: Tensor, y: Tensor) -> Tensor:
    """The best linear estimate, by mean and covariance of the training pictures."""
    mean, covariance = train.mean(0), torch.cov(train.T)
    gain = covariance @ torch.linalg.inv(covariance + SIGMA**2 * torch.eye(train.shape[1]))
    return mean + (y - mean) @ gain.T


def score(net: nn.Module, clean: Tensor, seed: int) -> float:
    """PSNR after descending E(x) + |x - y|^2 / 2 sigma^2."""
    return psnr(clean, denoise(net, noisy(clean, seed), SIGMA, steps=200, rate=0.05))
