"""What a run will hold and do, from its configuration alone: no weight is allocated, no process
started."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain import storage
from pretrain.data.source import Source
from pretrain.engine_config import accumulation
from pretrain.errors import ConfigError
from pretrain.model.autoencoder import SpaceToDepth, SpaceToDepthConfig
from pretrain.model.diffdis import DiffDis
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask, check_objectives

RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
# Stable Diffusion's autoencoders: what the dry run assumes without opening the folder.
LATENT_CHANNELS, LATENT_FACTOR = 4, 8


@dataclass(frozen=True)
class Parameters:
    """Parameters by part of the task."""

    by_part: dict[str, int]

    @property
    def total(self) -> int:
        """All parameters, each of them trained."""
        return sum(self.by_part.values())


class _Assumed(SpaceToDepth):
    """A stand-in of the right shape for an autoencoder whose files are not opened."""

    def __init__(self) -> None:
        self.factor, self.channels = LATENT_FACTOR, LATENT_CHANNELS


def count_parameters(config: RunConfig, vocab_size: int) -> Parameters:
    """Parameters by part, from a model built on the meta device.

    Args:
        config: the run.
        vocab_size: of its tokenizer.
    """
    exact = isinstance(config.model.autoencoder, SpaceToDepthConfig)
    length = config.model.text_encoder.length
    with torch.device("meta"):
        model = DiffDis(
            config.model,
            vocab_size,
            torch.zeros(length, dtype=torch.long),
            torch.zeros(length, dtype=torch.bool),
            autoencoder=None if exact else _Assumed(),
        )
        task = PretrainTask(model, check_objectives(config.objectives), config.task, config.seed)
    parts = {
        "text encoder": model.text_encoder,
        "image stream": model.trunk.unet,
        "text stream": model.trunk.blocks,
        "query time": model.trunk.query_time,
        "alignment head": model.trunk.head,
        "objectives": task.objectives,
    }
    return Parameters(
        {
            name: sum(p.numel() for p in part.parameters() if p.requires_grad)
            for name, part in parts.items()
        }
    )


def state_bytes_per_rank(parameters: int, ranks: int, precision: str, zero_stage: int) -> int:
    """Bytes of parameters, gradients and AdamW state that one rank keeps (activations not counted).

    ZeRO (Rajbhandari et al. 2020, section 5): weights and gradients in the precision, fp32 masters
    where it is not fp32, two fp32 moments; stage 1 divides the optimizer's part, 2 the gradients
    too, 3 the weights too.
    """
    width = 4 if precision == "fp32" else 2
    masters = 8 if precision == "fp32" else 12
    divide = [(zero_stage >= 3, width), (zero_stage >= 2, width), (zero_stage >= 1, masters)]
    return sum(
        -(-parameters * size // ranks) if split else parameters * size for split, size in divide
    )


def render(config: RunConfig, ranks: int | None) -> str:
    """The plan of a run as text: parameters, memory by ranks, batch arithmetic.

    Raises:
        ConfigError: ``ranks`` was given and the batch does not divide by it.
    """
    vocab_size = _vocab_size(config)
    counted = count_parameters(config, vocab_size)
    t, e, o = config.training, config.engine, config.optimizer
    lines = [f"{config.name}  (dry run: nothing is allocated or started)", "", "parameters"]
    lines += [f"  {name:<16}{n:>16,}" for name, n in counted.by_part.items()]
    lines += [f"  {'total':<16}{counted.total:>16,}", ""]
    lines += [f"state per rank under ZeRO-{e.zero_stage}, {e.precision} (activations not counted)"]
    lines += ["  ranks        memory   micro-steps a step"]
    for n in RANKS if ranks is None else (ranks,):
        size = state_bytes_per_rank(counted.total, n, e.precision, e.zero_stage)
        try:
            steps = str(accumulation(e, t.global_batch, n))
        except ConfigError:
            if ranks is not None:
                raise
            steps = "does not divide"
        lines.append(f"  {n:>5}  {_size(size):>12}   {steps}")
    losses = [f"{n} × {s.weight:g}" for n, s in check_objectives(config.objectives).items()]
    steps_total = -(-t.samples // t.global_batch)
    lines += [
        "",
        f"batch    global_batch {t.global_batch} = micro_batch {e.micro_batch} × ranks × "
        "micro-steps",
        f"data     {_data(config)}",
        f"length   {t.samples:,} samples = {steps_total:,} steps of {t.global_batch}",
        f"rate     {o.lr:g}, warm-up {o.warmup_samples:,} samples, then {o.schedule}",
        f"losses   {', '.join(losses)}",
        f"scores   {', '.join(config.evaluators) or 'none'}",
        f"output   {config.output}",
    ]
    return "\n".join(lines)


def _data(config: RunConfig) -> str:
    """What is read; of manifests on this machine, which must then be there."""
    listed = config.data.train
    urls = [listed] if isinstance(listed, str) else [s.manifest for s in listed]
    if any(storage.is_remote(url) for url in urls):
        return f"{', '.join(urls)} (remote: not opened)"
    source = Source(config.data, config.seed)
    shards = sum(len(m.shards) for m in source.manifests)
    epochs = config.training.samples / source.num_samples
    return (
        f"{source.num_samples:,} samples in {shards:,} shards: {epochs:.3g} epochs; "
        f"{source.lanes} lanes"
    )


def _vocab_size(config: RunConfig) -> int:
    from pretrain.data.tokenizer import Tokenizer

    return Tokenizer(config.data.tokenizer).vocab_size


def _size(n: int) -> str:
    units: Sequence[tuple[str, int]] = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    for unit, factor in units:
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return f"{n} B"
