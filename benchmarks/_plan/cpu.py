"""A roofline of this CPU from operations alone, and real training steps to hold it against.

The rates come from operations of generic shapes, none taken from a model. Both sides are the
fastest of several repetitions on one thread, in seconds of the processor: what others do on the
machine meanwhile costs cache, but no time. On an idle machine that is the clock's time.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pretrain import config as configs
from pretrain import forecast
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine import Engine, init_distributed
from pretrain.opcost import Kind
from pretrain.roofline import Machine, Rates
from pretrain.run_config import RunConfig
from pretrain.train import build_task
from pretrain.types import Batch

PRESET = "configs/quickstart.yaml"
COMMON = ("ema.half_lives=[2000]", "engine.zero_stage=0", "training.mfu=false")
# Sets the share of the bound that training reaches, as one published run does for GPUs.
PROBE = (
    "model.unet={channels: [48, 96], attention: [true, true], layers: 1, head_dim: 48, "
    "norm_groups: 16}",
    "model.text_encoder={width: 96, query_dim: 96, layers: 2, heads: 2, length: 20}",
    "engine.micro_batch=16",
    "training.global_batch=16",
)
SIZES: dict[str, tuple[str, ...]] = {
    "small": (
        "model.unet={channels: [32, 64], attention: [false, true], layers: 1, head_dim: 32, "
        "norm_groups: 16}",
        "model.text_encoder={width: 64, query_dim: 64, layers: 1, heads: 2, length: 20}",
        "engine.micro_batch=32",
        "training.global_batch=32",
    ),
    "quickstart": ("engine.micro_batch=16", "training.global_batch=16"),
    "large": (
        "model.unet={channels: [64, 128, 256], attention: [false, true, true], layers: 2, "
        "head_dim: 32, norm_groups: 32}",
        "model.text_encoder={width: 256, query_dim: 256, layers: 4, heads: 4, length: 20}",
        "engine.micro_batch=8",
        "training.global_batch=8",
    ),
}
STEPS, WARM_UP = 3, 2


@dataclass(frozen=True)
class Compared:
    """A size: images/s as predicted and as measured."""

    name: str
    parameters: int
    gflop: float
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted by measured."""
        return self.predicted / self.measured


def calibrated(machine: Machine) -> Machine:
    """``machine`` with the share of its bound that a network reaches which is none of `SIZES`."""
    probe = compare("probe", machine)
    return dataclasses.replace(machine, reached=1 / probe.ratio)


def compare(name: str, machine: Machine) -> Compared:
    """Predict a size on ``machine``, and run it."""
    config = configs.load(RunConfig, PRESET, [*COMMON, *(SIZES | {"probe": PROBE})[name]])
    tokenizer = Tokenizer(config.data.tokenizer)
    work = forecast.Workload(config, tokenizer.vocab_size)
    found = forecast.on_machine(work, machine)
    return Compared(
        name,
        work.counted.total,
        sum(work.flops.values()) / 1e9,
        found.images_per_second,
        config.training.global_batch / fastest_step(config, tokenizer),
    )


def fastest_step(config: RunConfig, tokenizer: Tokenizer) -> float:
    """Seconds of the fastest of some optimizer steps of the trainer's own engine, on one rank."""
    init_distributed()
    engine = Engine(
        build_task(config, tokenizer),
        config.engine.for_ranks(1),
        config.optimizer,
        config.training.global_batch,
        config.ema,
    )
    n, size, length = config.training.global_batch, config.data.size, config.data.tokens
    g = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g),
        torch.randint(4, tokenizer.vocab_size, (n, length), generator=g),
        torch.ones(n, length, dtype=torch.bool),
        torch.arange(n),
    )
    seconds = []
    for number in range(WARM_UP + STEPS):
        began = time.process_time()
        engine.step(dataclasses.replace(batch, positions_B=batch.positions_B + n * number), 1e-5)
        seconds.append(time.process_time() - began)
    return min(seconds[WARM_UP:])


def measure() -> Machine:
    """What this process reaches on one thread, in fp32."""
    torch.set_num_threads(1)
    rates: dict[Kind, Rates] = {
        "matmul": _matmul(),
        "convolution": _convolution(backward=False),
        "convolution backward": _convolution(backward=True),
        "attention": _attention(),
    }
    rates["other"] = rates["matmul"]
    return Machine(
        rates,
        _bandwidth(),
        _call_seconds(),
        assumptions=("every rate was measured on one thread of this CPU, over sizes, in fp32",),
    )


def _matmul() -> Rates:
    found = []
    for rows, width in ((16, 32), (64, 64), (256, 128), (1024, 256), (4096, 256), (4096, 1024)):
        a, b = torch.randn(rows, width), torch.randn(width, width)
        flops = 2 * rows * width * width
        found.append((float(flops), flops / _fastest(lambda a=a, b=b: torch.mm(a, b))))
    return found


def _convolution(backward: bool) -> Rates:
    """3 x 3, over sizes, mean of rates; the backward pass gives both gradients."""
    found = []
    for batch, width, side in ((2, 16, 8), (4, 32, 8), (8, 64, 8), (16, 64, 16), (32, 128, 16)):
        x, w = torch.randn(batch, width, side, side), torch.randn(width, width, 3, 3)
        flops = 2 * batch * width * width * 9 * side * side
        if backward:
            grad = torch.randn_like(x)
            flops *= 2

            def run(x: torch.Tensor = x, w: torch.Tensor = w, g: torch.Tensor = grad) -> None:
                torch.ops.aten.convolution_backward(
                    g, x, w, [w.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3
                )
        else:

            def run(x: torch.Tensor = x, w: torch.Tensor = w, g: object = None) -> None:
                F.conv2d(x, w, padding=1)

        found.append((float(flops), flops / _fastest(run)))
    return found


def _attention() -> Rates:
    """Forward and backward together, as a training step has them; heads of 32."""
    found = []
    for batch, tokens in ((2, 16), (4, 64), (16, 64), (32, 257)):
        q, k, v = (torch.randn(batch, 4, tokens, 32, requires_grad=True) for _ in range(3))
        flops = 4 * q.numel() * tokens * 3.5

        def run(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            F.scaled_dot_product_attention(q, k, v).sum().backward()

        found.append((flops / 3.5, flops / _fastest(run)))
    return found


def _bandwidth() -> Rates:
    """Bytes/s of what is bound by memory: a geometric mean over an addition, an activation, a
    norm and a copy that transposes."""
    found = []
    for rows in (16, 128, 1024, 8192, 32768):
        x = torch.randn(rows, 256)
        y = torch.randn_like(x)
        runs: tuple[tuple[int, Callable[[], object]], ...] = (
            (3, lambda x=x, y=y: x + y),
            (2, lambda x=x: F.silu(x)),
            (2, lambda x=x: F.layer_norm(x, (256,))),
            (2, lambda x=x: x.T.contiguous()),
        )
        speeds = [times * x.nbytes / _fastest(run) for times, run in runs]
        found.append((2.25 * x.nbytes, math.exp(sum(map(math.log, speeds)) / len(speeds))))
    return found


def _call_seconds() -> float:
    """Of one operation on next to nothing, forward and backward through autograd."""
    x = torch.ones(8, requires_grad=True)
    count = 200

    def run() -> None:
        y = x
        for _ in range(count):
            y = y * 1.0001
        y.sum().backward()

    return _fastest(run) / (2 * count)


def _fastest(run: Callable[[], object], seconds: float = 0.2) -> float:
    """Seconds of the fastest call in some time."""
    run()
    best, end = math.inf, time.process_time() + seconds
    while time.process_time() < end:
        began = time.process_time()
        run()
        best = min(best, time.process_time() - began)
    return best
