"""How each contestant learns an energy: the loss functions of `pretrain.diffusion.energy`, the same
ones that `objectives.dcd` uses, with one setting that is chosen for each."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.diffusion import energy as dcd
from pretrain.diffusion.energy import Contrast
from pretrain.diffusion.langevin import langevin, slope_of
from pretrain.rng import derive_seed

BATCH, RATE, DRAWS = 256, 1e-3, 16
Loss = Callable[[nn.Module, Tensor, torch.Generator, float], Contrast]


@dataclass(frozen=True)
class Method:
    """Attributes:
    label: in tables.
    knob: what the chosen setting is.
    values: to choose from, as many for each method; by part ("points", "pictures").
    energy_l2: factor of the mean square of energies (CD runs away without; the others need none).
    """

    label: str
    loss: Loss
    knob: str
    values: dict[str, tuple[float, ...]]
    energy_l2: float = 0.0


def _cd(steps: int) -> Method:
    def loss(net: nn.Module, x: Tensor, g: torch.Generator, step: float) -> Contrast:
        noises = torch.randn(steps, *x.shape, generator=g)
        return dcd.contrastive(net, x, langevin(slope_of(net), x, noises, step))

    small, smaller = (0.003, 0.01, 0.03, 0.1), (0.001, 0.003, 0.01, 0.03)
    return Method(
        f"CD-{steps}", loss, "Langevin step", {"points": small, "pictures": smaller}, 1e-3
    )


def _one_step(process: dcd.Process) -> Method:
    def loss(net: nn.Module, x: Tensor, g: torch.Generator, delta: float) -> Contrast:
        noise, probe = (torch.randn(x.shape, generator=g) for _ in range(2))
        return dcd.one_step(net, x, noise, probe.sign(), delta, process)

    values = {"points": (0.005, 0.02, 0.05, 0.1), "pictures": (0.003, 0.01, 0.03, 0.1)}
    return Method(f"DCD one step, {process.upper()}", loss, "δ", values)


def _finite() -> Method:
    def loss(net: nn.Module, x: Tensor, g: torch.Generator, time: float) -> Contrast:
        noise = torch.randn(x.shape, generator=g)
        back = torch.randn(DRAWS, *x.shape, generator=g)
        return dcd.discrepancy(net, x, noise, back, dcd.spread("ve", time))

    values = {"points": (0.05, 0.25, 1.0, 4.0), "pictures": (0.003, 0.01, 0.03, 0.1)}
    return Method(f"DCD finite time (ED estimator, M={DRAWS})", loss, "T", values)


METHODS: dict[str, Method] = {
    "cd-1": _cd(1),
    "cd-10": _cd(10),
    "cd-20": _cd(20),
    "one-step-ve": _one_step("ve"),
    "one-step-vp": _one_step("vp"),
    "finite": _finite(),
}


@dataclass
class Trained:
    """Attributes:
    seconds: of the training loop, processor time of this process (others share the machine).
    rows: energies of single points computed for each sample and step, forward.
    finite: whether every loss was.
    """

    net: nn.Module
    seconds: float
    rows: float
    finite: bool


def train(
    method: Method,
    net: nn.Module,
    draw: Callable[[int, torch.Generator], Tensor],
    setting: float,
    seed: int,
    iterations: int,
) -> Trained:
    """Adam on the method's loss; batch, rate, network and data the same for all. Stops at the first
    loss that is not finite."""
    g = torch.Generator().manual_seed(derive_seed("dcd benchmark", seed))
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    rows = 0

    def count(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        nonlocal rows
        rows += len(given[0])

    handle = net.register_forward_hook(count)
    began, finite, done = time.process_time(), True, 0
    for _ in range(iterations):
        contrast = method.loss(net, draw(BATCH, g), g, setting)
        loss = contrast.loss_B.mean()
        if method.energy_l2:
            squares = contrast.data_B.square().mean() + contrast.other_KB.square().mean()
            loss = loss + method.energy_l2 * squares
        done += 1
        if not torch.isfinite(loss):
            finite = False
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - began
    handle.remove()
    return Trained(net, seconds, rows / (BATCH * done), finite)
