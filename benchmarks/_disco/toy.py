"""The 2-D toy of DisCo-Diff (app. F): eight Gaussians on a circle, small MLPs, the objective's own
draws, bonus and path."""

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.diffusion.curvature import trajectory_curvature
from pretrain.diffusion.path import Path, StreamConfig, build_path
from pretrain.diffusion.sampler import sample
from pretrain.diffusion.schedule import EDMConfig
from pretrain.objectives._disco_codes import draw_codes, entropy, missing_entropy
from pretrain.rng import generator

MODES, RADIUS, SPREAD, EACH = 8, 3.0, 0.2, 1000
LARGE = (2.0, 4.0, 8.0, 16.0)  # noise levels at which the loss is quoted
OFF = 4.0  # spreads from the nearest centre beyond which a sample is off every mode
CURVED = 0.5  # curvature is averaged over noise levels above this


def centres() -> Tensor:
    """(8, 2)."""
    angle = torch.arange(MODES) * (2 * torch.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def points(seed: int | str, each: int = EACH) -> Tensor:
    """(8 each, 2), as many of each mode."""
    draws = torch.randn(MODES * each, 2, generator=generator(seed, "points"))
    return centres().repeat_interleave(each, 0) + SPREAD * draws


def mixture(seed: str, n: int) -> Tensor:
    """(n, 2), the mode of each at random, as a model draws them."""
    draws = generator(seed, "mixture")
    modes = torch.randint(MODES, (n,), generator=draws)
    return centres()[modes] + SPREAD * torch.randn(n, 2, generator=draws)


@dataclass(frozen=True)
class Method:
    """A contestant: codes of K values (0: a plain diffusion model), and the factor of the bonus."""

    name: str
    values: int = 0
    bonus: float = 0.0


@dataclass(frozen=True)
class Setting:
    """The same for every method: the paper's Adam 1e-3, Heun of 50 steps; the rest is ours."""

    steps: int = 4000
    batch: int = 512
    width: int = 64
    lr: float = 1e-3
    drop: float = 0.1
    sampler_steps: int = 50
    made: int = 1000


def mlp(first: int, width: int, last: int, layers: int) -> nn.Sequential:
    """SiLU between ``layers`` linear layers."""
    sizes = [first, *[width] * (layers - 1), last]
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*parts[:-1])


class Toy(nn.Module):
    """Denoiser of 4 layers and encoder of 3, EDM's preconditioning, one code (m = 1).

    A plain model has the same denoiser, told the null code always.
    """

    def __init__(self, method: Method, setting: Setting) -> None:
        super().__init__()
        self.method, self.setting = method, setting
        k = method.values
        self.net = mlp(2 + 1 + k + 1, setting.width, 2, 4)
        self.encoder = mlp(2, setting.width, k, 3) if k else None
        self.path: Path = build_path(
            StreamConfig(
                predict="edm",
                sigma_data=(RADIUS**2 / 2 + SPREAD**2) ** 0.5,
                schedule=EDMConfig(p_mean=0.0, p_std=1.5, sigma_max=80),
            )
        )

    def f(self, x: Tensor, sigma_B: Tensor, code_BK: Tensor) -> Tensor:
        """Raw output; an all-zero code is the null."""
        null = 1 - code_BK.sum(1, keepdim=True)
        inputs = [self.path.network_input(x, sigma_B), sigma_B.log()[:, None] / 4, code_BK, null]
        return self.net(torch.cat(inputs, 1))

    def denoise(self, x: Tensor, sigma_B: Tensor, code_BK: Tensor) -> Tensor:
        """x_0 estimate."""
        return self.path.x0_of(self.f(x, sigma_B, code_BK), x, sigma_B)

    def logits(self, y: Tensor) -> Tensor:
        """(B, K); none of a plain model."""
        return self.encoder(y) if self.encoder is not None else y.new_zeros(len(y), 0)

    def codes(self, logits_BK: Tensor, u_BK: Tensor) -> Tensor:
        """Hard straight-through draws at temperature 1."""
        if not self.method.values:
            return logits_BK
        return draw_codes(logits_BK[:, None], u_BK[:, None], 1.0, hard=True)[:, 0]

    def loss(self, y: Tensor, sigma_B: Tensor, eps: Tensor, code_BK: Tensor) -> Tensor:
        """lambda(sigma) |D - y|^2, (B,): stage 1 of DisCo-Diff, section 3."""
        x = self.path.noised(y, eps, sigma_B)
        target = self.path.f_target(y, x, sigma_B)
        return (self.f(x, sigma_B, code_BK) - target).square().sum(1)


def fit(method: Method, seed: int, setting: Setting) -> tuple[Toy, float]:
    """A trained toy, and the seconds that took."""
    torch.manual_seed(seed)
    toy, data, k = Toy(method, setting), points(seed), method.values
    draws = generator(seed, "training")
    optimizer = torch.optim.Adam(toy.parameters(), setting.lr)
    began = time.process_time()
    for _ in range(setting.steps):
        y = data[torch.randint(len(data), (setting.batch,), generator=draws)]
        sigma_B = toy.path.schedule.training_times(torch.rand(len(y), generator=draws))
        eps = torch.randn(y.shape, generator=draws)
        u_BK = torch.rand(len(y), k, generator=draws)
        kept = (torch.rand(len(y), 1, generator=draws) >= setting.drop).float()
        logits = toy.logits(y)
        loss = toy.loss(y, sigma_B, eps, toy.codes(logits, u_BK) * kept).mean()
        if method.bonus:
            marginal_1K = logits.softmax(-1).mean(0, keepdim=True)
            loss = loss + method.bonus * missing_entropy(marginal_1K)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return toy.eval(), time.process_time() - began


@torch.no_grad()
def measure(toy: Toy, seed: int) -> tuple[dict[str, float], Tensor]:
    """What the table shows, and the generated points."""
    s, k = toy.setting, toy.method.values
    data, draws = points(seed), generator(seed, "measure")
    logits = toy.logits(data)
    codes = toy.codes(logits, torch.rand(len(data), k, generator=draws))
    # For one code the prior of largest likelihood is the table of its frequencies (m = 1).
    drawn = torch.randint(len(codes), (s.made,), generator=draws)
    given = codes[drawn]
    eps = torch.randn(s.made, 2, generator=draws)

    def denoise(x: Tensor, sigma_B: Tensor) -> Tensor:
        return toy.denoise(x, sigma_B, given)

    made = sample(toy.path, denoise, eps, s.sampler_steps, "heun")
    result = {
        "w2": w2(made, mixture(f"{seed}/fresh", s.made)),
        "w2_floor": w2(mixture(f"{seed}/other", s.made), mixture(f"{seed}/fresh", s.made)),
        "off_mode": float((distance(made) > OFF * SPREAD).float().mean()),
        "off_mode_floor": float((distance(data) > OFF * SPREAD).float().mean()),
    }
    fresh = points(f"{seed}/loss")
    codes = toy.codes(toy.logits(fresh), torch.rand(len(fresh), k, generator=draws))
    losses = []
    for sigma in LARGE:
        noise = torch.randn(fresh.shape, generator=draws)
        losses.append(float(toy.loss(fresh, torch.full((len(fresh),), sigma), noise, codes).mean()))
    result |= {"loss_2": losses[0], "loss_large": sum(losses) / len(losses)}
    grid = toy.path.schedule.grid(s.sampler_steps)
    grid = grid[grid > CURVED]
    few = slice(0, 500)

    def in_double(x: Tensor, sigma_B: Tensor) -> Tensor:
        return toy.denoise(x, sigma_B, given[few].double())

    toy.double()  # differences over 1e-3 of the noise level drown in fp32's rounding
    start = eps[few].double() * toy.path.schedule.t_max
    bends = trajectory_curvature(in_double, start, grid.double())
    toy.float()
    result |= {"curvature": float(bends.mean()), "curvature_median": float(bends.median())}
    if k:
        share_K = codes.mean(0)
        result |= {
            "perplexity": float(entropy(share_K).exp()),
            "used": float((share_K > 0.01).sum()),
        }
    return result, made


def distance(x: Tensor) -> Tensor:
    """To the nearest centre."""
    return torch.cdist(x, centres()).min(1).values


def w2(a: Tensor, b: Tensor) -> float:
    """Wasserstein-2 distance of two sets of as many points, exactly."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))
