"""What a rank sends in one optimizer step under ZeRO, and how long that takes.

Bytes are of the payload: a tensor of n bytes that is gathered from all ranks, or reduced over them,
counts n. On a ring each rank sends (R - 1)/R of that (Rajbhandari et al. 2020, section 7), and
twice that for an all-reduce.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2

from pretrain.engine_config import EngineConfig
from pretrain.hardware import Accelerator

# NCCL's own model (src/graph/tuning.cc, ncclTopoTuneModel): microseconds of a call, of a hop in a
# node and of a hop between nodes, and the share of the bandwidth; NCCL takes what is fastest. A
# ring, in its protocols Simple and LL, has one hop a rank: linear in ranks. A tree (LL), which is
# there for all-reduces alone, has one a doubling of nodes.
_RINGS = ((8.4, 3.4, 9.6, 1.0), (3.6, 0.47 * 1.8, 2.7, 0.25))
_TREE = (4.4, 0.52 * 1.8, 5.0, 0.25)
AGREEMENTS = 6  # scalars: loss, stop, DeepSpeed's norm and overflow


@dataclass(frozen=True)
class Collective:
    """What one kind of collective moves in an optimizer step.

    Attributes:
        what: for people.
        nbytes: payload, all calls together.
        calls: how many.
        rings: 1 for a gather or a reduce-scatter, 2 for an all-reduce.
    """

    what: str
    nbytes: int
    calls: int
    rings: int = 1

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends."""
        return self.nbytes * self.rings * (ranks - 1) / ranks


@dataclass(frozen=True)
class Sizes:
    """What communication depends on of a model.

    Attributes:
        trained, frozen: parameters in the engine.
        persistent: those in tensors that stage 3 keeps whole.
        modules: leaf modules with a parameter that stage 3 partitions: each is one gather.
        queries: elements of one sample's rows that contrast gathers over ranks; 0 without contrast.
    """

    trained: int
    frozen: int
    persistent: int
    modules: int
    queries: int


def step_collectives(
    sizes: Sizes, config: EngineConfig, ranks: int, micro_steps: int
) -> tuple[Collective, ...]:
    """The collectives of one optimizer step; none on one rank. By ZeRO's arithmetic: not yet held
    against the calls of real ranks.

    Stage 3 gathers a micro-batch's weights once if they stay from the forward to the backward pass
    (``live_parameters``), else for each use; it reduces each micro-batch's gradients, as stage 2
    does; stages 1 and 0 reduce once a step.
    """
    if ranks == 1:
        return ()
    width = 4 if config.precision == "fp32" else 2
    stage = config.zero_stage
    cut = sizes.trained + sizes.frozen - sizes.persistent
    buckets = max(1, -(-sizes.trained // config.bucket_elements))
    found = []
    if stage == 3:
        uses = 1 if cut <= config.live_parameters else 2 + config.activation_checkpointing
        times = uses * micro_steps
        found += [
            Collective("gather weights", cut * width * times, sizes.modules * times),
            Collective("gather small weights", sizes.persistent * width, 1),
        ]
    elif stage:
        found.append(Collective("gather weights", sizes.trained * width, buckets))
    times = micro_steps if stage >= 2 else 1
    found.append(
        Collective(
            "reduce gradients",
            sizes.trained * width * times,
            buckets * times,
            rings=2 if stage == 0 else 1,
        )
    )
    found.append(Collective("agree", 8 * AGREEMENTS, AGREEMENTS, rings=2))
    if sizes.queries:
        rows = sizes.queries * 4 * config.micro_batch * ranks * micro_steps  # fp32
        found.append(Collective("gather queries", rows, 2 * micro_steps))
        found.append(Collective("reduce queries' gradients", rows, 2 * micro_steps, rings=2))
    return tuple(c for c in found if c.nbytes)


def seconds(
    collective: Collective, gpu: Accelerator, nodes: int, gpus_per_node: int, share: float
) -> float:
    """How long its calls take one after another, on a ring through all ranks.

    Args:
        collective: what is moved.
        gpu, nodes, gpus_per_node: where. The slower of the node's links and its adapters bounds a
            ring; a node's GPUs share its rings, so that each adds its adapter.
        share: of the bandwidth that is reached.
    """
    ranks = nodes * gpus_per_node
    if ranks == 1 or not collective.calls:
        return 0.0
    bandwidth = gpu.link_bandwidth
    if nodes > 1:
        bandwidth = min(bandwidth, gpu.network_bandwidth * gpus_per_node)
    rings = collective.rings
    ways = [(way, (ranks - nodes) * rings, (nodes - 1) * rings) for way in _RINGS]
    if rings == 2:
        ways.append((_TREE, 2 * (gpus_per_node - 1), 2 * ceil(log2(nodes))))
    one = collective.sent(ranks) / collective.calls / (bandwidth * share)
    return collective.calls * min(
        1e-6 * (call + hops_in * inside + hops_between * between) + one / part
        for (call, inside, between, part), hops_in, hops_between in ways
    )


def by_name(collectives: tuple[Collective, ...]) -> Mapping[str, Collective]:
    """The same, by what they are."""
    return {c.what: c for c in collectives}
