"""Predictions for runs that others published, beside what they published.

Their network is built on the meta device as they describe it: Stable Diffusion's U-Net alone, in
half precision. One cell of MosaicML's table has set the share of the bound that training reaches
(`roofline.REACHED`); everything else here is a check of it, and nothing is fitted to it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from pretrain import communication, opcost, roofline
from pretrain.communication import Sizes
from pretrain.engine_config import EngineConfig
from pretrain.forecast import ADAMW_BYTES, Frozen, encoder_of
from pretrain.hardware import ACCELERATORS
from pretrain.opcost import Ops

MOSAIC = "mosaicml/diffusion README: https://github.com/mosaicml/diffusion"
CARD = "Stable Diffusion v1 model card: https://github.com/CompVis/stable-diffusion"
UNETS = {
    "SD 1": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "SD 2": {
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
CLIP_L_FLOP = 13.3e9  # forward, 77 tokens: 2 x 85 M weights of its layers x 77, and attention


@dataclass(frozen=True)
class Run:
    """A published run, or phase of one.

    Attributes:
        source: where it is published.
        unet, side: network, and pixels of a side.
        gpu, gpus, batch, micro: hardware, global batch and micro-batch.
        stage: ZeRO's, as theirs comes nearest to.
        online: whether autoencoder and text encoder run beside.
        images_per_second: as published.
    """

    source: str
    unet: str
    side: int
    gpu: str
    gpus: int
    batch: int
    micro: int
    stage: int
    online: bool
    images_per_second: float


def mosaic(side: int, gpus: int, published: float) -> Run:
    """A cell of MosaicML's table: latents stored, FSDP SHARD_GRAD_OP, micro-batch 16."""
    return Run(MOSAIC, "SD 2", side, "a100", gpus, 2048, 16, 2, False, published)


THROUGHPUT = (
    *(mosaic(256, n, v) for n, v in ((8, 1100), (16, 2180), (32, 4080), (64, 8530), (128, 11600))),
    *(mosaic(512, n, v) for n, v in ((8, 290), (16, 585), (32, 1195), (64, 2340), (128, 4590))),
)
# (what, source, phases, published, unit): phases of (run, samples).
MOSAIC_SAMPLES = (1_126_400_000, 1_740_800_000)
CARD_STEPS = (237_000, 194_000 + 515_000 + 195_000)  # at 256, at 512 px


@dataclass(frozen=True)
class Predicted:
    """What is said of a run: seconds of a step, and their parts."""

    passes: float
    communication: float
    encoding: float
    optimizer: float
    images_per_second: float


@lru_cache
def passes(unet: str, side: int, micro: int) -> tuple[Ops, int, int]:
    """Operations of a micro-batch, parameters, and tensors of them."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel(
            sample_size=side // 8,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            **UNETS[unet],
        )
        torch.nn.Module.to(net, torch.bfloat16)
        x = torch.zeros(micro, 4, side // 8, side // 8, dtype=torch.bfloat16)
        c = torch.zeros(micro, 77, net.config.cross_attention_dim, dtype=torch.bfloat16)
        t = torch.zeros(micro)
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with opcost.recorded() as ops:
        F.mse_loss(net(x, t, c).sample.float(), x.float()).backward()
    modules = sum(any(True for _ in m.parameters(recurse=False)) for m in net.modules())
    return ops, sum(p.numel() for p in net.parameters()), modules


@lru_cache
def encoder(side: int, micro: int) -> Frozen:
    """Stable Diffusion's autoencoder in half precision."""
    return encoder_of("AutoencoderKL", side, micro, "bf16")


def predict(run: Run) -> Predicted:
    """By the plan's own arithmetic."""
    gpu = ACCELERATORS[run.gpu]
    machine = roofline.of_gpu(gpu, "bf16")
    ops, parameters, modules = passes(run.unet, run.side, run.micro)
    micro_steps = run.batch // (run.gpus * run.micro)
    nodes = max(1, run.gpus // 8)
    config = EngineConfig(precision="bf16", zero_stage=run.stage, micro_batch=run.micro)  # type: ignore[arg-type]
    found = communication.step_collectives(
        Sizes(parameters, 0, 0, modules, 0), config, run.gpus, micro_steps
    )
    sent = sum(
        communication.seconds(c, gpu, nodes, run.gpus // nodes, roofline.NETWORK_SHARE)
        for c in found
    )
    computed = machine.total(ops) * micro_steps
    encoding = 0.0
    if run.online:
        text = run.micro * CLIP_L_FLOP / (roofline.MATRIX_SHARE * gpu.peak("bf16"))
        encoding = micro_steps * (machine.total(encoder(run.side, run.micro).ops) + text)
    mine = parameters if run.stage == 0 else parameters / run.gpus
    optimizer = mine * (ADAMW_BYTES + 12) / machine.bandwidth[-1][1]
    step = encoding + max(computed, sent) + optimizer
    return Predicted(computed, sent, encoding, optimizer, run.batch / step)


def table() -> str:
    """The comparison in Markdown."""
    lines = [
        "| run | GPUs | predicted images/s | published | predicted / published |",
        "|---|---|---|---|---|",
    ]
    for run in THROUGHPUT:
        rate, theirs = predict(run).images_per_second, run.images_per_second
        own = " (sets the share)" if (run.side, run.gpus) == (512, 8) else ""
        lines.append(
            f"| MosaicML, SD 2 U-Net, {run.side} px, latents stored | {run.gpus} A100 | "
            f"{rate:,.0f} | {theirs:,.0f} | {rate / theirs:.2f}{own} |"
        )
    lines += ["", "| run | predicted | published | predicted / published |", "|---|---|---|---|"]
    for what, mine, theirs, unit in lengths():
        lines.append(
            f"| {what} | {mine:,.2f} {unit} | {theirs:,.2f} {unit} | {mine / theirs:.2f} |"
        )
    return "\n".join(lines)


def lengths() -> list[tuple[str, float, float, str]]:
    """(what, predicted, published, unit) of whole runs."""
    stored = [mosaic(side, 128, 0) for side in (256, 512)]
    days = sum(
        n / predict(run).images_per_second / 86_400
        for n, run in zip(MOSAIC_SAMPLES, stored, strict=True)
    )
    online = [Run(MOSAIC, "SD 2", s, "a100", 128, 2048, 16, 2, True, 0) for s in (256, 512)]
    slower = sum(
        n / predict(run).images_per_second / 86_400
        for n, run in zip(MOSAIC_SAMPLES, online, strict=True)
    )
    card = [Run(CARD, "SD 1", s, "a100-40", 256, 2048, 4, 0, True, 0) for s in (256, 512)]
    hours = sum(
        256 * 2048 * steps / predict(run).images_per_second / 3600
        for steps, run in zip(CARD_STEPS, card, strict=True)
    )
    return [
        ("MosaicML, SD 2 U-Net on 128 A100, both phases, by its table", days, 5.51, "days"),
        ("the same, by the run that MosaicML reports", days, 6.8, "days"),
        ("MosaicML: encoders beside the training, times as long", slower / days, 1.4, ""),
        ("SD v1-1 to v1-3, 256 A100 PCIe, by its model card", hours / 1e3, 150.0, "thousand h"),
    ]
