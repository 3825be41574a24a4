"""A forecast as text."""

from pretrain.forecast import Forecast, Workload
from pretrain.hardware import Accelerator
from pretrain.opcost import calls, flops, nbytes
from pretrain.plan import size


def render(
    work: Workload,
    found: Forecast,
    gpu: Accelerator,
    nodes: int,
    samples: int,
    price: float | None = None,
) -> str:
    """Everything of a forecast, its assumptions last.

    Args:
        samples: that the run sees.
        price: dollars of a GPU's hour.
    """
    c, e = work.config, work.config.engine
    total = sum(work.flops.values())
    lines = [
        f"{c.name} on {nodes} nodes of {found.ranks // nodes} {gpu.name} ({found.ranks} ranks): "
        f"ZeRO-{e.zero_stage}, {e.precision}, micro-batch {e.micro_batch}, global batch "
        f"{c.training.global_batch:,} = {found.micro_steps} micro-steps",
        "",
        "parameters",
        *(f"  {name:<24}{n:>16,}" for name, n in work.counted.by_part.items() if n),
        f"  {'trained':<24}{work.counted.total:>16,}",
        "",
        "bytes of a rank",
        *_memory(found, gpu),
        "",
        "operations of a training step, for one sample",
        *(f"  {name:<24}{n / 1e9:>16,.1f} GFLOP" for name, n in work.flops.items() if n),
        f"  {'total':<24}{total / 1e9:>16,.1f} GFLOP",
        f"  a micro-batch runs {calls(work.ops):,} operations: {flops(work.ops) / 1e12:,.2f} TFLOP"
        f"{' (with what is computed again)' if e.activation_checkpointing else ''}, "
        f"{nbytes(work.ops) / 1e9:,.1f} GB read and written",
        "",
        "sent by a rank in a step",
    ]
    for collective, seconds in found.collectives:
        lines.append(
            f"  {collective.what:<24}{size(round(collective.sent(found.ranks))):>16}  "
            f"{collective.calls:>6,} calls  {1000 * seconds:>9,.1f} ms"
        )
    if not found.collectives:
        lines.append("  nothing: there is one rank")
    rate = found.images_per_second
    used = total * rate / (found.ranks * gpu.peak(e.precision))
    lines += [
        "",
        "seconds of a step",
        f"  {'passes':<24}{found.passes:>16.3f}",
        f"  {'collectives beside them':<24}{found.communication:>16.3f}",
        f"  {'autoencoder':<24}{found.encoding:>16.3f}",
        f"  {'optimizer':<24}{found.optimizer:>16.3f}",
        f"  {'step':<24}{found.step:>16.3f}",
        "",
        f"images/s  {rate:,.0f}, of a GPU {rate / found.ranks:,.1f}; model FLOPs utilisation "
        f"{used:.1%}",
        f"length    {samples:,} samples: {found.days(samples):,.2f} days, "
        f"{found.days(samples) * 24 * found.ranks:,.0f} GPU hours"
        + (f", ${found.dollars(samples, price):,.0f} at ${price:g}" if price else ""),
        "",
        "assumptions",
        *(f"  - {text}" for text in found.assumptions),
    ]
    return "\n".join(lines)


def _memory(found: Forecast, gpu: Accelerator) -> list[str]:
    state = found.state
    parts = {
        "weights": state.parameters,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "moving averages": state.ema,
        "gathered, buckets": found.working,
        "frozen encoders": found.frozen,
        "activations, at most": found.activations,
    }
    used = found.device_bytes / gpu.memory_bytes
    verdict = "fits" if used < 0.9 else "tight" if used < 1 else "DOES NOT FIT"
    lines = [f"  {name:<24}{size(n):>16}" for name, n in parts.items() if n]
    if found.on_host:
        lines.append(f"  {'of these on the host':<24}{size(found.on_host):>16}")
    return [
        *lines,
        f"  {'on the GPU':<24}{size(found.device_bytes):>16}  of {size(int(gpu.memory_bytes))}: "
        f"{used:.0%}, {verdict}",
    ]
