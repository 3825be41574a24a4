"""Seconds of a pass from its operations, by the roofline (Williams et al. 2009), each for itself:

    time of an operation = max(operations / rate, bytes / bandwidth, the least that a call takes)

Nothing overlaps but arithmetic with memory inside an operation, as where kernels run one by one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import log
from typing import get_args

from pretrain.hardware import Accelerator
from pretrain.opcost import Kind, Op, Ops

# What is assumed of a GPU, the same for every model and every machine (docs/SCALING.md says from
# what, and where it misses).
MATRIX_SHARE = 0.7  # of the peak, of matrix products, convolutions and fused attention
MEMORY_SHARE = 0.8  # of the memory's bandwidth
NETWORK_SHARE = 0.8  # of the links' bandwidth
CALL_SECONDS = 6e-6  # of a kernel: what the host takes to launch one
# Share of this bound that training reaches: what one published run did, MosaicML's Stable Diffusion
# 2 at 512 px on 8 A100 (290 images/s where the bound is 558). All other runs are held against it.
REACHED = 0.52

Rates = Sequence[tuple[float, float]]
"""(size, rate) by growing size: a rate that depends on how much there is to do."""


@dataclass(frozen=True)
class Machine:
    """What one rank's device reaches.

    Attributes:
        rates: operations/s by kind of operation, over operations of one call.
        bandwidth: bytes/s of memory, over bytes of one call.
        call_seconds: the least time of any call.
        reached: share of the bound that training reaches.
        assumptions: what the numbers rest on, for people.
    """

    rates: Mapping[Kind, Rates]
    bandwidth: Rates
    call_seconds: float
    reached: float = 1.0
    assumptions: tuple[str, ...] = field(default=())

    def seconds(self, op: Op) -> float:
        """Of one call."""
        memory = op.nbytes / _at(self.bandwidth, op.nbytes)
        work = op.flops / _at(self.rates[op.kind], op.flops) if op.flops else 0.0
        return max(memory, work, self.call_seconds)

    def total(self, ops: Ops) -> float:
        """Of all calls, one after another, at the share that is reached."""
        return sum(self.seconds(op) * n for op, n in ops.items()) / self.reached


def of_gpu(gpu: Accelerator, precision: str) -> Machine:
    """A GPU by its data sheet and the assumptions above."""
    peak = gpu.peak(precision)
    rate = ((1.0, MATRIX_SHARE * peak),)
    memory = ((1.0, MEMORY_SHARE * gpu.memory_bandwidth),)
    return Machine(
        dict.fromkeys(get_args(Kind), rate),
        memory,
        CALL_SECONDS,
        REACHED,
        (
            f"matrix products, convolutions and attention reach {MATRIX_SHARE:.0%} of "
            f"{peak / 1e12:g} TFLOP/s ({precision}, dense)",
            f"every other operation is bound by memory, {MEMORY_SHARE:.0%} of "
            f"{gpu.memory_bandwidth / 1e12:g} TB/s, and reads and writes its tensors once",
            f"kernels run one by one, none fused, each at least {CALL_SECONDS * 1e6:g} us",
            f"training reaches {REACHED:.0%} of that bound, as one published run did (MosaicML's "
            "Stable Diffusion 2 at 512 px on 8 A100)",
        ),
    )


def _at(rates: Rates, size: float) -> float:
    """The rate at ``size``, between the given ones by its logarithm; the end ones outside."""
    if size <= rates[0][0]:
        return rates[0][1]
    for (low, slow), (high, fast) in pairwise(rates):
        if size <= high:
            part = log(size / low) / log(high / low)
            return slow * (fast / slow) ** part
    return rates[-1][1]
