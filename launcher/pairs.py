"""All-gather between pairs of hosts, and one mock step on each: what network and hosts can do."""

import os
import statistics
import time
from datetime import timedelta
from typing import Any

_ROUNDS = 8  # pairs of each host, at most
_SMALL, _SMALL_TIMES = 8, 20  # bytes
_LARGE, _LARGE_TIMES = 2**22, 3  # bytes
_WIDTH, _STEPS = 768, 6


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """One host's part; all hosts are asked at once.

    Request: rank, world (hosts), address, port, seconds (until it gives up).

    Returns:
        pairs: [other host's rank, latency in seconds, bytes a second] of each; step_seconds: of a
        forward and backward pass of a small network, the fastest of a few.
    """
    import torch
    import torch.distributed as dist

    rank, world = request["rank"], request["world"]
    os.environ.update(MASTER_ADDR=request["address"], MASTER_PORT=str(request["port"]))
    on_gpu = torch.cuda.is_available()  # never run here: no GPU on the development machines
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=request["seconds"]),
    )
    try:
        found = []
        for pairs in rounds(world):
            groups = [(pair, dist.new_group(list(pair))) for pair in pairs]
            dist.barrier()
            for pair, group in groups:
                if rank in pair:
                    latency = _gather(_SMALL, _SMALL_TIMES, device, group)
                    seconds = _gather(_LARGE, _LARGE_TIMES, device, group)
                    found.append([pair[0] + pair[1] - rank, latency, _LARGE / seconds])
        dist.barrier()
        return {"pairs": found, "step_seconds": _step(device)}
    finally:
        dist.destroy_process_group()


def rounds(hosts: int) -> list[list[tuple[int, int]]]:
    """A tournament: in each round every host is in one pair at most; no pair comes twice."""
    even = hosts + hosts % 2
    ring = list(range(even))
    found = []
    for _ in range(min(even - 1, _ROUNDS)):
        pairs = [(ring[i], ring[even - 1 - i]) for i in range(even // 2)]
        found.append([(min(p), max(p)) for p in pairs if max(p) < hosts])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def _gather(size: int, times: int, device: Any, group: Any) -> float:
    """Median seconds of an all-gather of ``size`` bytes from each side."""
    import torch
    import torch.distributed as dist

    own = torch.zeros(size, dtype=torch.uint8, device=device)
    both = [torch.empty_like(own), torch.empty_like(own)]
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        dist.all_gather(both, own, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])  # the first opens the connection


def _step(device: Any) -> float:
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Linear(_WIDTH, _WIDTH) for _ in range(4)]
    net = torch.nn.Sequential(*layers).to(device)
    x = torch.randn(_WIDTH, _WIDTH, device=device)
    taken = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        net(x).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken)
