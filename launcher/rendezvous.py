"""Where the ranks of a job meet, from the variables that each scheduler sets.

Pure functions of an environment. A node's place is asked for once by `python -m launcher node`; a
rank's own, where a launcher starts every rank by itself (mpirun), by `python -m launcher.rank`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.job import JobError

DEFAULT_PORT = 29_500
Environment = Mapping[str, str]


@dataclass(frozen=True)
class NodePlace:
    """A node of a job.

    Attributes:
        scheduler: whose variables said so.
        rank, nodes: this node of how many; the node of rank 0 is the main one.
        address, port: of the main node, as this node reaches it.
        ranks: on this node, if the scheduler says; else None.
    """

    scheduler: str
    rank: int
    nodes: int
    address: str
    port: int
    ranks: int | None = None


@dataclass(frozen=True)
class RankPlace:
    """A rank of a job: what torch.distributed reads from the environment."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int

    def environment(self) -> dict[str, str]:
        """The variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "LOCAL_SIZE": str(self.local_world),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def node_place(
    env: Environment,
    scheduler: str | None = None,
    nodes: int | None = None,
    port: int | None = None,
) -> NodePlace:
    """This node's place.

    Args:
        env: with the scheduler's variables. MASTER_ADDR and MASTER_PORT, where a plan sets them, go
            before what the scheduler says by itself.
        scheduler: whose variables to read; None for the one whose variables are there.
        nodes, port: as planned, where the scheduler does not tell them.

    Raises:
        JobError: the variables are missing, or do not agree with each other or with the plan.
    """
    full = dict(env)
    if port is not None:
        full.setdefault("MASTER_PORT", str(port))
    name = scheduler or next((n for n, (sign, _) in _NODES.items() if sign in env), None)
    if name == "kubernetes" and "PET_NNODES" in env:  # a TrainJob
        name = "torchrun"
    if name is None or name not in _NODES:
        known = ", ".join(f"{n} ({sign})" for n, (sign, _) in _NODES.items())
        raise JobError(
            f"scheduler={name!r}: no place was found; there are: {known}; or set NNODES, "
            "NODE_RANK and MASTER_ADDR"
        )
    if name in ("kubernetes", "explicit") and nodes is not None:
        full.setdefault("NNODES", str(nodes))
    place = _checked(_NODES[name][1](name, full))
    if nodes is not None and nodes != place.nodes:
        raise JobError(f"nodes={nodes} were planned, but {name} gives {place.nodes}")
    return place


def rank_place(env: Environment) -> RankPlace:
    """This rank's place under a launcher that starts every rank: torch's own variables, Open MPI,
    MPICH or Intel MPI, or Slurm with a task a rank.

    Raises:
        JobError: no launcher's variables are there, or they are incomplete or do not agree.
    """
    for names in _RANKS:
        if names[0] in env and names[-1] in env:
            rank, world, local_rank, local_world = (_number(env, name) for name in names)
            break
    else:
        raise JobError(
            "no launcher's variables are set (looked for "
            f"{', '.join(f'{n[0]} with {n[-1]}' for n in _RANKS)}); "
            "set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
        raise JobError(
            f"{names[0]}={rank} of {names[1]}={world}, {names[2]}={local_rank} of "
            f"{names[3]}={local_world}: they do not agree; was one set by hand?"
        )
    address = env.get("MASTER_ADDR", "127.0.0.1" if world == local_world else "")
    if not address:
        raise JobError("MASTER_ADDR is not set; give the address of rank 0's host")
    return RankPlace(rank, world, local_rank, local_world, address, _port(env))


# rank, ranks, rank on this host, ranks on this host
_OMPI = "OMPI_COMM_WORLD"
_RANKS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),  # deepspeed's launcher
    (f"{_OMPI}_RANK", f"{_OMPI}_SIZE", f"{_OMPI}_LOCAL_RANK", f"{_OMPI}_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


def expand_hosts(text: str) -> list[str]:
    """Slurm's list of hosts, `gpu[01-03,7],head` written out.

    Raises:
        JobError: it is not such a list.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text)
    if not parts or ",".join(parts) != text:
        raise JobError(f"nodelist={text!r} is not a list such as node[1-3,7]")
    return [host for part in parts for host in _expand(part, text)]


def _expand(part: str, whole: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\](.*)", part)
    if match is None:
        return [part.strip()]
    before, spans, after = match.groups()
    found = []
    for span in spans.split(","):
        low, _, high = span.strip().partition("-")
        high = high or low
        if not (low.isdigit() and high.isdigit() and int(low) <= int(high)):
            raise JobError(f"nodelist={whole!r} is not a list such as node[1-3,7]: {span!r}")
        numbers = range(int(low), int(high) + 1)
        found += [f"{before}{n:0{len(low)}d}{rest}" for n in numbers for rest in _expand(after, "")]
    return found


# --- each scheduler -------------------------------------------------------------------------------


def _plain(scheduler: str, env: Environment) -> NodePlace:
    """What a plan sets where the scheduler gives too little of its own, as Kubernetes does."""
    nodes = _number(env, "NNODES")
    names = ("NODE_RANK", "JOB_COMPLETION_INDEX")
    rank = next((_number(env, n) for n in names if n in env), None)
    if rank is None:
        if nodes > 1:
            raise JobError(f"NNODES={nodes}, but neither of {', '.join(names)} is set")
        rank = 0
    return NodePlace(scheduler, rank, nodes, _main(env, nodes), _port(env))


def _torchrun(scheduler: str, env: Environment) -> NodePlace:
    """Kubeflow's TrainJob, and whatever else sets torchrun's variables."""
    low, _, high = _text(env, "PET_NNODES").partition(":")
    if high and high != low:
        raise JobError(
            f"PET_NNODES={env['PET_NNODES']!r} asks for an elastic job; give one number of nodes"
        )
    ranks = env.get("PET_NPROC_PER_NODE", "auto")
    endpoint, _, port = env.get("PET_RDZV_ENDPOINT", "").rpartition(":")
    known = {"PET_MASTER_ADDR": endpoint, "PET_MASTER_PORT": port} if endpoint else {}
    full = {**known, **env, "PET_NNODES": low}
    nodes = _number(full, "PET_NNODES")
    address = full.get("MASTER_ADDR") or full.get("PET_MASTER_ADDR", "")
    return NodePlace(
        scheduler,
        _number(full, "PET_NODE_RANK") if nodes > 1 else 0,
        nodes,
        address or _main(env, nodes, "PET_MASTER_ADDR"),
        _port(full, full.get("PET_MASTER_PORT", DEFAULT_PORT)),
        int(ranks) if ranks.isdigit() else None,
    )


def _slurm(scheduler: str, env: Environment) -> NodePlace:
    """One task a node. Two jobs may share a node, so the port is the job's own."""
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST") or _text(env, "SLURM_JOB_NODELIST"))
    nodes = next(
        (_number(env, n) for n in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if n in env), len(hosts)
    )
    if nodes != len(hosts):
        raise JobError(f"SLURM_NNODES={nodes}, but the node list holds {len(hosts)} hosts")
    port = 20_000 + _number(env, "SLURM_JOB_ID") % 10_000
    address = env.get("MASTER_ADDR", hosts[0])
    return NodePlace(scheduler, _number(env, "SLURM_NODEID"), nodes, address, _port(env, port))


def _aws_batch(scheduler: str, env: Environment) -> NodePlace:
    """The main node, of any index, is our rank 0. It is not told its own address: it meets itself
    on loopback, the others by the address that Batch gives them."""
    nodes = _number(env, "AWS_BATCH_JOB_NUM_NODES")
    main = _number(env, "AWS_BATCH_JOB_MAIN_NODE_INDEX")
    rank = (_number(env, "AWS_BATCH_JOB_NODE_INDEX") - main) % max(nodes, 1)
    name = "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if rank == 0 else _text(env, name))
    return NodePlace(scheduler, rank, nodes, address, _port(env))


def _gcp_batch(scheduler: str, env: Environment) -> NodePlace:
    """One task a VM."""
    of_node = "BATCH_NODE_INDEX" in env and "BATCH_NODE_COUNT" in env
    kind = "NODE" if of_node else "TASK"
    nodes = _number(env, f"BATCH_{kind}_COUNT")
    address = env.get("MASTER_ADDR") or env.get("BATCH_MAIN_NODE_HOSTNAME", "")
    address = address or _main(env, nodes, "BATCH_MAIN_NODE_HOSTNAME")
    return NodePlace(scheduler, _number(env, f"BATCH_{kind}_INDEX"), nodes, address, _port(env))


def _skypilot(scheduler: str, env: Environment) -> NodePlace:
    nodes = _number(env, "SKYPILOT_NUM_NODES")
    addresses = _text(env, "SKYPILOT_NODE_IPS").split()
    if len(addresses) != nodes:
        raise JobError(
            f"SKYPILOT_NUM_NODES={nodes}, but SKYPILOT_NODE_IPS holds {len(addresses)} addresses"
        )
    address = env.get("MASTER_ADDR", addresses[0])
    gpus = env.get("SKYPILOT_NUM_GPUS_PER_NODE", "0")
    ranks = int(gpus) if gpus.isdigit() and int(gpus) else None
    return NodePlace(
        scheduler, _number(env, "SKYPILOT_NODE_RANK"), nodes, address, _port(env), ranks
    )


# The variable by which a scheduler is known, and its reader; the first that is there counts.
# SkyPilot stands before Slurm, on which it may run; Kubeflow before Kubernetes.
_NODES: dict[str, tuple[str, Callable[[str, Environment], NodePlace]]] = {
    "explicit": ("NNODES", _plain),
    "torchrun": ("PET_NNODES", _torchrun),
    "kubernetes": ("JOB_COMPLETION_INDEX", _plain),
    "skypilot": ("SKYPILOT_NODE_RANK", _skypilot),
    "aws_batch": ("AWS_BATCH_JOB_NUM_NODES", _aws_batch),
    "gcp_batch": ("BATCH_TASK_INDEX", _gcp_batch),
    "slurm": ("SLURM_NODEID", _slurm),
}


def _checked(place: NodePlace) -> NodePlace:
    if place.nodes < 1 or not 0 <= place.rank < place.nodes:
        raise JobError(
            f"{place.scheduler}: node {place.rank} of {place.nodes}; the number of a node must be "
            "from 0 to one below the number of nodes"
        )
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", place.address) or place.address.startswith("-"):
        raise JobError(f"{place.scheduler}: address={place.address!r} is no host name or address")
    return place


def _main(env: Environment, nodes: int, name: str = "MASTER_ADDR") -> str:
    address = env.get("MASTER_ADDR", "127.0.0.1" if nodes == 1 else "")
    if not address:
        raise JobError(f"{name} is not set; give the address of node 0, as the others reach it")
    return address


def _port(env: Environment, default: object = DEFAULT_PORT) -> int:
    port = _number({"MASTER_PORT": str(default), **env}, "MASTER_PORT")
    if not 1_024 <= port <= 65_535:
        raise JobError(f"MASTER_PORT={port} must be from 1024 to 65535")
    return port


def _text(env: Environment, name: str) -> str:
    value = env.get(name, "").strip()
    if not value:
        raise JobError(f"{name} is not set; it comes from the scheduler: is this started by it?")
    return value


def _number(env: Environment, name: str) -> int:
    value = _text(env, name)
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise JobError(f"{name}={value!r} must be a whole number, 0 or more")
    return int(value)
