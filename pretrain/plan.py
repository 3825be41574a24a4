"""What a run will hold and do, from its configuration alone: no weight is allocated, no process
started."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pretrain import storage
from pretrain.abstract import AbstractRun, fused_attention
from pretrain.data.source import Source
from pretrain.engine_config import EngineConfig, accumulation
from pretrain.errors import ConfigError
from pretrain.flops import flops_of
from pretrain.model.recompute import set_recompute
from pretrain.model.text_config import TransformersTextConfig
from pretrain.run_config import RunConfig
from pretrain.task import check_objectives

RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Parameters:
    """Parameters of the task.

    Attributes:
        by_part: those that are trained, by part.
        frozen: those that ZeRO spreads all the same, for optimizer.freeze keeps them as they are.
        outside: those of a frozen text encoder, whole on every rank, fp32.
        persistent: those, trained or frozen, in tensors small enough to stay whole on every rank.
    """

    by_part: dict[str, int]
    frozen: int = 0
    outside: int = 0
    persistent: int = 0

    @property
    def total(self) -> int:
        """All that are trained."""
        return sum(self.by_part.values())


@dataclass(frozen=True)
class State:
    """Bytes of training state that one rank keeps, wherever: device, host or NVMe.

    Attributes:
        parameters: weights in the run's precision, with the small ones kept whole.
        gradients: in the run's precision.
        optimizer: AdamW's two moments and the fp32 masters.
        ema: moving averages, fp32.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch's passes on one rank, weights and gradients not counted.

    Attributes:
        kept: at the end of the forward pass, for the backward pass.
        peak: at the worst moment of either pass, with what operations use for a moment.
    """

    kept: int
    peak: int


def count_parameters(config: RunConfig, vocab_size: int) -> Parameters:
    """Parameters by part, from a model on the meta device.

    Args:
        config: the run.
        vocab_size: of its tokenizer.
    """
    return count(AbstractRun(config, vocab_size))


def count(run: AbstractRun) -> Parameters:
    """The same, of a run that stands on the meta device already."""
    task, outside = run.task, run.config.model.text_encoder.frozen
    model = task.model
    parts: dict[str, Any] = {
        "text encoder": model.text_encoder,
        "image stream": model.trunk.unet,
        "text stream": model.trunk.blocks,
        "query time": model.trunk.query_time,
        "alignment head": model.trunk.head,
        "objectives": task.objectives,
    }
    text = sum(p.numel() for p in model.text_encoder.parameters()) if outside else 0
    threshold = run.config.engine.persist_parameters
    return Parameters(
        {
            name: sum(p.numel() for p in part.parameters() if p.requires_grad)
            for name, part in parts.items()
        },
        frozen=sum(p.numel() for p in task.parameters() if not p.requires_grad) - text,
        outside=text,
        persistent=sum(
            p.numel()
            for name, p in task.named_parameters()
            if p.numel() <= threshold and not (outside and name.startswith("model.text_encoder"))
        ),
    )


def state_bytes_per_rank(
    parameters: int,
    ranks: int,
    precision: str,
    zero_stage: int,
    *,
    ema_copies: int = 0,
    frozen: int = 0,
    persistent: int = 0,
) -> State:
    """What one rank keeps between steps (activations, buckets and gathered weights not counted).

    ZeRO (Rajbhandari et al. 2020, section 5): weights and gradients in the precision, fp32 masters
    and two fp32 moments; stage 1 divides the optimizer's part (and our moving averages, which lie
    on its partitions), 2 the gradients too, 3 the weights too. DeepSpeed keeps masters beside fp32
    weights as well (measured; 0.19.8 compares a torch.device with its name), but in stage 0.

    Args:
        parameters: that are trained.
        ranks, precision, zero_stage: of the run.
        ema_copies: moving averages that are kept.
        frozen: parameters that are not trained.
        persistent: parameters that stage 3 keeps whole beside their partitions, on several ranks.
    """
    width = 4 if precision == "fp32" else 2

    def part(size: int, divided: bool) -> int:
        return -(-size // ranks) if divided else size

    whole = persistent * width if zero_stage == 3 and ranks > 1 else 0
    optimizer = 8 if precision == "fp32" and zero_stage == 0 else 12
    return State(
        parameters=part((parameters + frozen) * width, zero_stage >= 3) + whole,
        gradients=part(parameters * width, zero_stage >= 2),
        optimizer=part(parameters * optimizer, zero_stage >= 1),
        ema=part(parameters * 4 * ema_copies, zero_stage >= 1),
    )


def working_bytes(counted: Parameters, config: EngineConfig, ranks: int) -> int:
    """What a rank holds for the step beside state and activations: the bucket that gradients are
    reduced in, and under stage 3 the gathered weights (kept from the forward to the backward pass
    up to ``live_parameters``)."""
    width = 4 if config.precision == "fp32" else 2
    bucket = config.bucket_elements * width if config.zero_stage else 0
    gathered = 0
    if config.zero_stage == 3 and ranks > 1:  # on one rank the partition is the whole
        gathered = counted.total + counted.frozen - counted.persistent
    return bucket + min(gathered, config.live_parameters) * width + counted.outside * 4


def activation_bytes(
    config: RunConfig, vocab_size: int, checkpointing: bool | None = None
) -> Activations:
    """What the passes of one micro-batch hold, found by running them on the meta device.

    Args:
        config: the run.
        vocab_size: of its tokenizer.
        checkpointing: instead of engine.activation_checkpointing.
    """
    on = config.engine.activation_checkpointing if checkpointing is None else checkpointing
    return _recomputing(AbstractRun(config, vocab_size), on)


def _recomputing(run: AbstractRun, on: bool) -> Activations:
    set_recompute(run.task, on)
    with fused_attention():
        return activations(run)


def activations(run: AbstractRun) -> Activations:
    """The same, of a run that stands on the meta device already, whose gradients are dropped. To be
    called where attention is fused."""
    # As ZeRO does: a gradient leaves for its bucket as soon as it is there.
    handles = [
        p.register_post_accumulate_grad_hook(_drop)
        for p in run.task.parameters()
        if p.requires_grad
    ]
    batch = run.batch(run.config.engine.micro_batch)
    with LiveBytes() as live:
        output = run.task(batch)
        kept = live.now
        output.loss.backward()
    for handle in handles:
        handle.remove()
    return Activations(kept, live.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations on the meta device made and that live.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self._known:
                self._known[storage] = True
                size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_meta]


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def render(config: RunConfig, ranks: int | None) -> str:
    """The plan of a run as text: parameters, operations, memory by ranks, batch arithmetic.

    Args:
        config: the run.
        ranks: to plan for; None for a table.

    Raises:
        ConfigError: ``ranks`` was given and the batch does not divide by it.
    """
    pieces = vocab_size(config)
    t, e, o = config.training, config.engine, config.optimizer
    o.check_length(t.samples)
    if ranks is not None:
        accumulation(e, t.global_batch, ranks)
    run = AbstractRun(config, pieces)  # one for all: to build it takes longest
    counted = count(run)
    held = [_recomputing(run, on) for on in (False, True)]
    lines = [f"{config.name}  (dry run: nothing is allocated or started)", "", "parameters"]
    lines += [f"  {name:<16}{n:>16,}" for name, n in counted.by_part.items()]
    lines += [f"  {'total':<16}{counted.total:>16,}"]
    if counted.frozen + counted.outside:
        lines += [f"  {'frozen':<16}{counted.frozen + counted.outside:>16,}"]
    flops = flops_of(run)
    lines += ["", "operations of a training step, for one sample"]
    lines += [f"  {name:<16}{n / 1e9:>16,.3f} GFLOP" for name, n in flops.items()]
    lines += [f"  {'total':<16}{sum(flops.values()) / 1e9:>16,.3f} GFLOP", ""]
    lines += _memory(config, counted, held, RANKS if ranks is None else (ranks,))
    losses = [f"{n} × {s.weight:g}" for n, s in check_objectives(config.objectives).items()]
    steps_total = -(-t.samples // t.global_batch)
    decay = f", linear in the last {o.decay_samples:,}" if o.schedule == "wsd" else ""
    lines += [
        "",
        f"batch    global_batch {t.global_batch} = micro_batch {e.micro_batch} × ranks × "
        "micro-steps",
        f"data     {_data(config)}",
        f"length   {t.samples:,} samples = {steps_total:,} steps of {t.global_batch}",
        f"rate     {o.lr:g}, warm-up {o.warmup_samples:,} samples, then {o.schedule}{decay}",
        f"losses   {', '.join(losses)}",
        f"scores   {', '.join(config.evaluators) or 'none'}",
        f"output   {config.output}",
    ]
    return "\n".join(lines)


def _memory(
    config: RunConfig,
    counted: Parameters,
    held: Sequence[Activations],
    table: Sequence[int],
) -> list[str]:
    """Bytes of a rank, by number of ranks."""
    e = config.engine
    without, recomputing = held
    peak = (recomputing if e.activation_checkpointing else without).peak
    places = {"weights": e.offload_parameters, "optimizer": e.offload_optimizer}
    aside = [f"{what} on {place}" for what, place in places.items() if place != "none"]
    ema_copies = len(config.ema.half_lives)
    averages = f", moving averages {ema_copies}" if ema_copies else ""
    lines = [
        f"memory per rank under ZeRO-{e.zero_stage}, {e.precision}{averages}"
        + (f" ({', '.join(aside)})" if aside else ""),
        "  ranks         state   + gathered, bucket   + activations         total   "
        "micro-steps a step",
    ]
    for n in table:
        own = e.for_ranks(n)
        state = state_bytes_per_rank(
            counted.total,
            n,
            own.precision,
            own.zero_stage,
            ema_copies=ema_copies,
            frozen=counted.frozen,
            persistent=counted.persistent,
        ).total
        working = working_bytes(counted, own, n)
        try:
            steps = str(accumulation(e, config.training.global_batch, n))
        except ConfigError:
            steps = "does not divide"
        lines.append(
            f"  {n:>5}  {size(state):>12}   {size(working):>18}   {size(peak):>13}  "
            f"{size(state + working + peak):>12}   {steps}"
        )
    on = "on" if e.activation_checkpointing else "off"
    lines += [
        f"  activations of {e.micro_batch} samples at their peak: {size(without.peak)}, with "
        f"activation checkpointing {size(recomputing.peak)} (engine.activation_checkpointing is "
        f"{on})"
    ]
    return lines


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


def vocab_size(config: RunConfig) -> int:
    """Of the run's tokenizer, which is opened; of a transformers text encoder, whose files may be
    elsewhere, as its settings say."""
    text = config.model.text_encoder
    if isinstance(text, TransformersTextConfig) and "vocab_size" in text.settings:
        return int(text.settings["vocab_size"])
    from pretrain.data.tokenizer import Tokenizer

    return Tokenizer(config.data.tokenizer).vocab_size


def size(n: int) -> str:
    """Bytes for people."""
    units: Sequence[tuple[str, int]] = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    for unit, factor in units:
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return f"{n} B"
