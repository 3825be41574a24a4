"""What a run will hold, compute, send and cost on a cluster, before any of it is there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pretrain import communication, opcost, plan, roofline
from pretrain.abstract import DTYPES, AbstractRun
from pretrain.communication import Collective, Sizes
from pretrain.engine_config import accumulation
from pretrain.flops import flops_of
from pretrain.hardware import Accelerator
from pretrain.model.autoencoder import DiffusersConfig
from pretrain.opcost import Ops
from pretrain.roofline import Machine
from pretrain.run_config import RunConfig

# Bytes that AdamW moves for a parameter on fp32: it reads gradient, weight and two moments and
# writes three of them; clipping reads gradients twice; a moving average is read and written beside.
ADAMW_BYTES, AVERAGE_BYTES = 7 * 4 + 2 * 4, 3 * 4
HOST_MEMORY = 25e9  # bytes/s of a host's memory for each of its ranks, where it runs the optimizer


@dataclass(frozen=True)
class Frozen:
    """A frozen autoencoder that encodes each batch's pictures.

    Attributes:
        ops: of one micro-batch.
        nbytes: of its weights, on every rank.
        peak: bytes of its pass at the worst moment.
    """

    ops: Ops
    nbytes: int
    peak: int


class Workload:
    """What a configuration asks for, whatever runs it: traced once on the meta device.

    Args:
        config: the run.
        vocab_size: of its tokenizer.

    Attributes:
        counted: its parameters.
        sizes: what its communication depends on.
        ops: of a micro-batch's passes, recomputed ones as often as they run.
        activations: of a micro-batch.
        flops: of a training step for one sample, by component; without what is computed twice.
        autoencoder: that runs beside, or None.
    """

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self.config, self.vocab_size = config, vocab_size
        run = AbstractRun(config, vocab_size)
        self.counted = plan.count(run)
        self.sizes = _sizes(run, self.counted)
        with opcost.recorded() as self.ops:
            self.activations = plan.activations(run)
        self.flops: Mapping[str, float] = flops_of(run)
        # Stored latents need none.
        self.autoencoder = None if config.data.encoded else _autoencoder(config)
        if self.autoencoder is not None:
            encoding = opcost.flops(self.autoencoder.ops) / config.engine.micro_batch
            self.flops = {**self.flops, "autoencoder": encoding}


@dataclass(frozen=True)
class Forecast:
    """A workload on a cluster.

    Attributes:
        ranks, micro_steps: how it is cut.
        state: bytes between steps, by what they are.
        working: gathered weights and buckets.
        frozen: weights of frozen encoders, whole on every rank.
        activations: the peak of a pass.
        on_host: of these bytes, those that lie in the host's memory.
        collectives: of a step, with how long each kind takes.
        passes, encoding, optimizer: seconds of a step that a rank computes.
        samples: of a step.
        assumptions: every number that is not counted.
    """

    ranks: int
    micro_steps: int
    state: plan.State
    working: int
    frozen: int
    activations: int
    on_host: int
    collectives: tuple[tuple[Collective, float], ...]
    passes: float
    encoding: float
    optimizer: float
    samples: int
    assumptions: tuple[str, ...]

    @property
    def device_bytes(self) -> int:
        """On the accelerator, at the worst moment."""
        held = self.state.total + self.working + self.frozen + self.activations
        return held - self.on_host

    @property
    def communication(self) -> float:
        """Seconds of a step that collectives take."""
        return sum(seconds for _, seconds in self.collectives)

    @property
    def step(self) -> float:
        """Seconds of a step: collectives run beside the passes, the optimizer after both."""
        return self.encoding + max(self.passes, self.communication) + self.optimizer

    @property
    def images_per_second(self) -> float:
        """Over all ranks."""
        return self.samples / self.step

    def days(self, samples: float) -> float:
        """For so many samples."""
        return samples / self.images_per_second / 86_400

    def dollars(self, samples: float, price: float) -> float:
        """For so many samples at a price of an accelerator's hour."""
        return self.days(samples) * 24 * self.ranks * price


def forecast(work: Workload, gpu: Accelerator, nodes: int, gpus_per_node: int) -> Forecast:
    """The workload on ``nodes`` of ``gpus_per_node``.

    Raises:
        ConfigError: the batch does not divide by that many ranks.
    """
    machine = roofline.of_gpu(gpu, work.config.engine.precision)
    return on_machine(work, machine, nodes * gpus_per_node, gpu, nodes)


def on_machine(
    work: Workload,
    machine: Machine,
    ranks: int = 1,
    gpu: Accelerator | None = None,
    nodes: int = 1,
) -> Forecast:
    """The workload on ranks that compute as ``machine`` does; ``gpu`` says how they are connected,
    and is needed for more than one.

    Raises:
        ConfigError: the batch does not divide.
    """
    config, counted = work.config, work.counted
    engine = config.engine.for_ranks(ranks)
    micro_steps = accumulation(engine, config.training.global_batch, ranks)
    averages = len(config.ema.half_lives)
    state = plan.state_bytes_per_rank(
        counted.total,
        ranks,
        engine.precision,
        engine.zero_stage,
        ema_copies=averages,
        frozen=counted.frozen,
        persistent=counted.persistent,
    )
    found: tuple[tuple[Collective, float], ...] = ()
    assumptions = machine.assumptions
    if gpu is not None and ranks > 1:
        share = roofline.NETWORK_SHARE
        found = tuple(
            (c, communication.seconds(c, gpu, nodes, ranks // nodes, share))
            for c in communication.step_collectives(work.sizes, engine, ranks, micro_steps)
        )
        assumptions += _about_network(gpu, nodes, ranks)
    # Where the optimizer's state lies whole, every rank steps all of it.
    mine = -(-counted.total // ranks) if engine.zero_stage else counted.total
    moved = mine * (ADAMW_BYTES + AVERAGE_BYTES * averages)
    on_host = 0
    if engine.offload_optimizer == "cpu":
        on_host += state.optimizer + state.ema
        width = 4 if engine.precision == "fp32" else 2
        bus = gpu.host_bandwidth if gpu is not None else HOST_MEMORY
        optimizer = moved / HOST_MEMORY + 2 * mine * width / bus
        assumptions += (
            f"the optimizer runs on the host, at {HOST_MEMORY / 1e9:g} GB/s of its memory a rank; "
            f"gradients and weights cross the bus at {bus / 1e9:g} GB/s",
        )
    else:
        optimizer = moved / machine.bandwidth[-1][1]
    if engine.offload_parameters != "none":
        on_host += state.parameters
        assumptions += ("reading offloaded weights hides behind the passes",)
    encoding, frozen = 0.0, counted.outside * 4
    peak = work.activations.peak
    if work.autoencoder is not None:
        encoding = machine.total(work.autoencoder.ops) * micro_steps
        frozen += work.autoencoder.nbytes
        peak = max(peak, work.autoencoder.peak)
    return Forecast(
        ranks=ranks,
        micro_steps=micro_steps,
        state=state,
        working=plan.working_bytes(counted, engine, ranks) - counted.outside * 4,
        frozen=frozen,
        activations=peak,
        on_host=on_host,
        collectives=found,
        passes=machine.total(work.ops) * micro_steps,
        encoding=encoding,
        optimizer=optimizer,
        samples=config.training.global_batch,
        assumptions=(
            *assumptions,
            "collectives run beside the passes: a step takes the longer of the two",
            f"AdamW moves {ADAMW_BYTES} bytes a parameter of its partition, a moving average "
            f"{AVERAGE_BYTES}; data are there in time; no evaluation, no checkpoint, no restart",
        ),
    )


def _about_network(gpu: Accelerator, nodes: int, ranks: int) -> tuple[str, ...]:
    per_node = ranks // nodes
    bandwidth = gpu.link_bandwidth
    if nodes > 1:
        bandwidth = min(bandwidth, gpu.network_bandwidth * per_node)
    return (
        f"collectives are rings over {nodes} nodes of {per_node} at {roofline.NETWORK_SHARE:.0%} "
        f"of {bandwidth / 1e9:g} GB/s a rank (links {gpu.link_bandwidth / 1e9:g}, a node's "
        f"adapters {gpu.network_bandwidth * per_node / 1e9:g})",
        "a call's latency is NCCL's own model of a ring: it grows with every rank; gathers are "
        "one a module, as without prefetching",
    )


def _sizes(run: AbstractRun, counted: plan.Parameters) -> Sizes:
    config, outside = run.config, run.config.model.text_encoder.frozen
    threshold = config.engine.persist_parameters

    def gathered(name: str, module: nn.Module) -> bool:
        inside = not (outside and name.startswith("model.text_encoder"))
        return inside and any(p.numel() > threshold for p in module.parameters(recurse=False))

    contrasts = "alignment" in run.task.halves and "align" in config.objectives
    return Sizes(
        counted.total,
        counted.frozen,
        counted.persistent,
        sum(gathered(name, module) for name, module in run.task.named_modules()),
        config.model.text_encoder.query_dim if contrasts else 0,
    )


def _autoencoder(config: RunConfig) -> Frozen | None:
    chosen = config.model.autoencoder
    if not isinstance(chosen, DiffusersConfig):
        return None
    precision = getattr(chosen, "precision", "fp32")
    side, n = config.model.image_size, config.engine.micro_batch
    return encoder_of(chosen.model, side, n, precision)


def encoder_of(model: str, side: int, samples: int, precision: str) -> Frozen:
    """The encoder of a diffusers autoencoder of the usual shape; its files are not opened.

    Args:
        model: AutoencoderKL (of Stable Diffusion 1.x, 2.x and XL) or AutoencoderTiny.
        side: pixels.
        samples, precision: of a pass.
    """
    import diffusers

    with torch.device("meta"):
        if model == "AutoencoderTiny":
            vae = diffusers.AutoencoderTiny()
        else:
            vae = diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            )
        nn.Module.to(
            vae, DTYPES[precision]
        )  # diffusers' own warns of what it keeps in fp32: nothing
        pixels = torch.zeros(samples, 3, side, side, dtype=DTYPES[precision])
    with torch.no_grad(), opcost.recorded() as ops, plan.LiveBytes() as live:
        vae.encode(pixels)
    return Frozen(ops, sum(p.nbytes for p in vae.parameters()), live.peak)
