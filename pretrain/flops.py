"""Floating-point operations of a training step, and the share of the hardware's peak that they are.

    MFU = flops_per_sample × samples per second ÷ (ranks × peak flops of a rank's device)

(model FLOPs utilisation: Chowdhery et al. 2022, PaLM, appendix B). A multiply and an add are two
operations. Only what the model's mathematics needs is counted: not the recomputation of activation
checkpointing, not the optimizer, not a frozen autoencoder.
"""

import time
from collections.abc import Mapping, Set
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.abstract import AbstractRun
from pretrain.hardware import PEAKS, WITHOUT_BF16
from pretrain.run_config import RunConfig

# The beginnings of the names of each component's modules below the task; the first that fits.
COMPONENTS = (
    ("model.text_encoder", "text encoder"),
    ("model.trunk.unet.up_blocks", "decoder"),
    ("model.trunk.unet.conv_norm_out", "decoder"),
    ("model.trunk.unet.conv_out", "decoder"),
    ("model.trunk.unet", "image encoder"),
    ("model.trunk.blocks", "text stream"),
    ("model.trunk.query_time", "text stream"),
    ("model.trunk.head", "head"),
    ("", "objectives"),
)


def sample_flops(config: RunConfig, vocab_size: int) -> dict[str, float]:
    """Operations of one training step for one sample, by component.

    A forward pass is counted operation by operation on the meta device. The backward pass
    takes twice as many: one matrix product for the inputs' gradient, one for the weights'; a frozen
    module takes only the first, a wholly frozen text encoder neither. The query's token in the
    shared attention is counted with the image encoder.

    Args:
        config: the run; its engine.micro_batch says what a pass of the null prompt is shared by.
        vocab_size: of its tokenizer.
    """
    return flops_of(AbstractRun(config, vocab_size))


def flops_of(run: AbstractRun) -> dict[str, float]:
    """The same, of a run that stands on the meta device already. Afterwards none of its parameters
    needs a gradient: it can be asked nothing else."""
    n = run.config.engine.micro_batch
    learns = {name for name, p in run.task.named_parameters() if p.requires_grad}
    # torch's counter fails where a module answers with a view of a parameter that needs a gradient.
    run.task.requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        run.task(run.batch(n))
    root = type(run.task).__name__
    by_name = {
        name.removeprefix(root).lstrip("."): sum(operations.values())
        for name, operations in counted.get_flop_counts().items()
        if name != "Global"
    }
    modules = dict(run.task.named_modules())
    flops = {component: 0.0 for _, component in COMPONENTS}
    for name, forward in own(by_name).items():
        component = next(what for prefix, what in COMPONENTS if name.startswith(prefix))
        frozen = run.text_frozen and name.startswith("model.text_encoder")
        backward = 0.0 if frozen else _backward(name, modules.get(name), learns)
        flops[component] += forward * (1 + backward) / n
    return flops


def _backward(name: str, module: nn.Module | None, learns: Set[str]) -> float:
    """Operations of the backward pass by those of the forward pass, of a module by itself."""
    own = module.named_parameters(recurse=False) if module else ()
    weights = [f"{name}.{parameter}" for parameter, _ in own]
    return 1.0 if weights and learns.isdisjoint(weights) else 2.0


def own(by_name: Mapping[str, float]) -> dict[str, float]:
    """What each module computes outside the modules that it called."""
    rest = dict(by_name)
    for name, value in by_name.items():
        above = name
        while above:
            above = above.rpartition(".")[0]
            if above in rest:
                rest[above] -= value
                break
    return rest


def mfu(flops_per_sample: float, samples_per_second: float, ranks: int, peak: float) -> float:
    """The share of the peak, by the formula above."""
    return flops_per_sample * samples_per_second / (ranks * peak)


def peak_flops(device: torch.device | str, precision: str) -> float | None:
    """Dense operations per second of a device in a precision; None where no data sheet is known.

    Args:
        device: a CUDA device, or a device's name.
        precision: "fp32", "bf16" or "fp16".
    """
    name = device if isinstance(device, str) else ""
    if isinstance(device, torch.device) and device.type == "cuda":  # never run here: no GPU
        name = torch.cuda.get_device_name(device)
    for known, half, single in PEAKS:
        if known in name:
            if precision == "bf16" and known in WITHOUT_BF16:
                return None
            return single if precision == "fp32" else half
    return None


def measured_peak(
    precision: str, device: torch.device | str = "cpu", side: int = 1024, seconds: float = 0.5
) -> float:
    """The best rate of a square matrix product on this process's threads, in operations per second.

    What stands in for a data sheet on a CPU. Other processes that compute meanwhile lower it.
    """
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a = torch.randn(side, side, device=device).to(kind)
    multiply = partial(torch.mm, a, a, out=torch.empty_like(a))
    multiply()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        multiply()
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
