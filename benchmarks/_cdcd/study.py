"""The toy's study: train each variant, sample it in fewer and fewer steps, score it."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._cdcd.show import line
from benchmarks._cdcd.toy import CLASSES, CODES, LENGTH, Chains, Denoiser, bigram_entropy
from pretrain.diffusion.discrete import DiscreteProcess, ProcessConfig, vb_prior, vb_terms
from pretrain.objectives import _cdcd_loss as loss
from pretrain.objectives._cdcd_steps import fewest_steps
from pretrain.objectives._cdcd_tokens import TokenLossConfig, token_loss

STEPS = (12, 11, 10, 9, 8, 7, 6, 5, 4, 3)
PLAIN: dict[str, Any] = {"likelihood": "plain", "mechanism": "sample"}
# name -> (the loss, negatives, sampling temperature, the training it shares)
VARIANTS: dict[str, tuple[dict[str, Any], str, float, str | None]] = {
    "w=0": ({}, "inter", 1.0, None),
    "w=.01": ({"contrast": 0.01}, "inter", 1.0, None),
    "w=.03": ({"contrast": 0.03}, "inter", 1.0, None),
    "temperature .9": ({}, "inter", 0.9, "w=0"),
    "temperature .8": ({}, "inter", 0.8, "w=0"),
}
MORE: dict[str, tuple[dict[str, Any], str, float, str | None]] = {
    "w=.03 margin 4": ({"contrast": 0.03, "bound": "clamp", "margin": 4.0}, "inter", 1.0, None),
    "w=.03 intra": ({"contrast": 0.03}, "intra", 1.0, None),
    "w=.03 step-wise": ({"contrast": 0.03, "mechanism": "step"}, "inter", 1.0, None),
    "InfoNCE w=.1": ({"contrast": 0.1, "bound": "info_nce"}, "inter", 1.0, None),
}


def train(
    process: DiscreteProcess,
    chains: Chains,
    config: TokenLossConfig,
    negatives: str,
    seed: int,
    args: argparse.Namespace,
) -> Denoiser:
    """One network; a seed's data and noise are the same for every variant."""
    torch.manual_seed(seed)
    net, g = Denoiser(args.width), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    positions = torch.arange(args.batch)
    for _ in range(args.updates):
        classes = torch.randint(CLASSES, (args.batch,), generator=g)
        x0 = chains.sample(classes, g)
        t = torch.randint(1, process.steps + 1, (args.batch,), generator=g)
        x_t = process.noised(x0, t, torch.rand(*x0.shape, CODES + 1, generator=g))
        keys = torch.rand(args.batch, args.negatives, 6, generator=g)
        if negatives == "intra":
            wrong = loss.shuffled(x0[..., None], keys)[..., 0]
            real = torch.ones(wrong.shape[:2], dtype=torch.bool)
        else:
            others = loss.others(positions, keys[:, 0, 0], args.negatives, gather=False)
            # As the released code draws them: any other sample, of its own class as well.
            wrong, real = others.of(x0), others.real_BK
        term = token_loss(process, net(x_t, t, classes), x0, x_t, t, wrong, real, config)
        optimizer.zero_grad()
        term.loss.backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def held_out_nll(process: DiscreteProcess, chains: Chains, net: Denoiser, n: int = 4000) -> float:
    """The variational bound on -log p(x | c), nats a sample, over every t."""
    g = torch.Generator().manual_seed(77)
    classes = torch.arange(n) % CLASSES
    x0 = chains.sample(classes, g)
    total = vb_prior(process, x0).sum(1)
    for k in range(1, process.steps + 1):
        t = torch.full((n,), k)
        x_t = process.noised(x0, t, torch.rand(*x0.shape, CODES + 1, generator=g))
        total = total + vb_terms(process, net(x_t, t, classes), x0, x_t, t).sum(1)
    return float(total.mean())


def scores(
    process: DiscreteProcess, chains: Chains, net: Denoiser, temperature: float, n: int
) -> dict[int, tuple[float, float]]:
    """By number of sampling steps: the oracle's accuracy, and the entropy of pairs."""
    classes = torch.arange(n) % CLASSES
    found = {}
    for steps in STEPS:
        g = torch.Generator().manual_seed(5)

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return net(x, t, classes)

        x = process.sample(denoise, (n, LENGTH), steps, g, temperature)
        # What is still masked (never, at the end of this schedule) would be token 0.
        x = x.clamp(max=CODES - 1)
        found[steps] = (chains.accuracy(x, classes), bigram_entropy(x, classes))
    return found


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Every variant of every seed."""
    process = DiscreteProcess(
        ProcessConfig(kind="absorbing", steps=LENGTH, keep_first=1 - 1 / LENGTH), CODES
    )
    variants = VARIANTS | (MORE if args.more else {})
    rows: list[dict[str, Any]] = []
    data: list[dict[str, float]] = []
    for seed in args.seeds:
        chains = Chains.draw(seed, args.common, args.own)
        classes = torch.arange(args.samples) % CLASSES
        x = chains.sample(classes, torch.Generator().manual_seed(9))
        own = chains.log_likelihood(x)[torch.arange(len(x)), classes]
        truth = {"accuracy": chains.accuracy(x, classes), "nll": -float(own.mean())}
        data.append(truth | {"entropy": bigram_entropy(x, classes)})
        nets: dict[str, Denoiser] = {}
        target = None
        for name, (fields, negatives, temperature, shared) in variants.items():
            start = time.monotonic()
            config = TokenLossConfig(**PLAIN | fields)
            net = nets[shared] if shared else train(process, chains, config, negatives, seed, args)
            nets[name] = net
            by_steps = scores(process, chains, net, temperature, args.samples)
            target = target or by_steps[LENGTH][0]
            row = {
                "variant": name,
                "seed": seed,
                "accuracy": {s: a for s, (a, _) in by_steps.items()},
                "entropy": {s: e for s, (_, e) in by_steps.items()},
                "nll": held_out_nll(process, chains, net),
                "fewest": fewest_steps({s: a for s, (a, _) in by_steps.items()}, target),
                "seconds": time.monotonic() - start,
            }
            rows.append(row)
            say(line(name, [row]) + f"   seed {seed}, {row['seconds']:.0f} s")
    return {"settings": vars(args), "data": data, "rows": rows}
