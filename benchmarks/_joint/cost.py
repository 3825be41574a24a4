"""What a joint step costs beside the two single ones: bytes in collectives, time, parameters.

`report` starts real ranks of this file: `python -m benchmarks._joint.cost TASK.json RESULT.json`.
"""

import ast
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks._joint import params
from benchmarks._joint.cells import PRESET
from pretrain import comm, config
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine import Engine, init_distributed
from pretrain.run_config import RunConfig
from pretrain.train import build_task
from pretrain.types import Batch

ROOT = Path(__file__).resolve().parents[2]
OUT = "runs/benchmarks/joint-cost.json"
MODES = {
    "joint": (),
    "generate": ("objectives.align=null",),
    "align": ("objectives.generate=null",),
    # As the trainer runs it: the text stream is in the network, its query masked out.
    "generate, as configured": ("objectives.align=null",),
}
TOKENIZER = "data.tokenizer=data/emoji/tokenizer.model"  # the corpus plays no part
ROUNDS = 7
FLOAT = 4  # bytes: the preset trains in fp32
# Under ZeRO-3, gathers for each use and after it none stays whole: the most that can be moved.
EACH_USE = ("engine.persist_parameters=0", "engine.live_parameters=0")
KEPT = ("engine.persist_parameters=0",)


def report(overrides: Iterable[str]) -> int:
    """Measure, print, judge; 0 if the three goals are met."""
    more = (TOKENIZER, *overrides)
    goals, found = [], {}
    counted = count_parameters(more)
    goals += parameters(counted)
    for title, engine in (("gathered for each use", EACH_USE), ("kept where there is room", KEPT)):
        bytes_of = start("bytes", 2, (*more, *engine))
        found[f"bytes, {title}"] = bytes_of
        goals.append(collectives(title, bytes_of, counted))
    for ranks in (1, 2):
        times = start("times", ranks, more)
        found[f"seconds, {ranks} rank(s)"] = times
        goals.append(seconds(ranks, times))
    (ROOT / OUT).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / OUT).write_text(json.dumps(found | {"parameters": vars(counted)}, indent=1))
    print()
    for met, text in goals:
        print(f"{'PASS' if met else 'FAIL'}  {text}")
    print(f"report: {OUT}")
    return 0 if all(met for met, _ in goals) else 1


def parameters(n: params.Count) -> list[tuple[bool, str]]:
    """The joint network's against the two that it stands for."""
    print("parameters: " + ", ".join(f"{k} {v:,}" for k, v in vars(n).items()))
    least = n.joint / (n.generate + n.align)
    return [
        (
            n.joint / (2 * n.joint) <= 0.65,
            f"parameters <= 0.65 of two networks that are each whole: {n.joint:,} of "
            f"{2 * n.joint:,}, 0.500",
        ),
        (
            least <= 0.65,
            "parameters <= 0.65 of two networks that have only what their task needs "
            f"(no text stream; no decoder): {n.joint:,} of {n.generate:,} + {n.align:,}, "
            f"{least:.3f}",
        ),
    ]


def collectives(title: str, found: dict[str, Any], n: params.Count) -> tuple[bool, str]:
    """Bytes of a joint step against the bound: a generation step's, and for the text stream's own
    parameters as many times their bytes as a generation step moves of each of its own."""
    for mode in MODES:
        print(f"bytes on a rank, {title}, {mode}: {_listed(found[mode])}")
    joint, generate = (sum(found[mode].values()) for mode in ("joint", "generate"))
    own, times = n.text_stream * FLOAT, generate / (n.generate * FLOAT)
    bound = generate + times * own
    return (
        joint <= bound,
        f"bytes in collectives, {title}: joint {joint:,} <= {bound:,.0f} = generation "
        f"{generate:,} (each parameter {times:.2f} times) + text stream {own:,} as often; ratio "
        f"{joint / bound:.4f} (the text stream once: {joint / (generate + own):.4f})",
    )


def seconds(ranks: int, found: dict[str, list[float]]) -> tuple[bool, str]:
    """Medians of steps in turns."""
    middle = {mode: median(found[mode]) for mode in MODES}
    joint, align = middle["joint"], middle["align"]
    ratio = joint / (middle["generate"] + align)
    configured = joint / (middle["generate, as configured"] + align)
    singles = zip(*(found[mode] for mode in ("joint", "generate", "align")), strict=True)
    rounds = [both / (one + other) for both, one, other in singles]
    listed = ", ".join(f"{mode} {1000 * value:.0f} ms" for mode, value in middle.items())
    return (
        ratio <= 0.9,
        f"time of a joint step <= 0.9 of the two single ones, {ranks} rank(s): {ratio:.3f} "
        f"(rounds {min(rounds):.3f} to {max(rounds):.3f}; {configured:.3f} with generation as "
        f"configured; {listed})",
    )


def count_parameters(overrides: Iterable[str]) -> params.Count:
    """Of the preset."""
    settings = config.load(RunConfig, PRESET, list(overrides))
    task = build_task(settings, Tokenizer(settings.data.tokenizer))
    return params.count(task.model, task.objectives)


def start(what: str, ranks: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Rank 0's result of ``what`` on real processes."""
    with tempfile.TemporaryDirectory() as folder:
        ask, answer = Path(folder, "task.json"), Path(folder, "result.json")
        ask.write_text(json.dumps({"what": what, "set": list(overrides)}))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "benchmarks._joint.cost", str(ask), str(answer)]
        started = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=subprocess.DEVNULL,
            )
            for r in range(ranks)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError(f"{what} on {ranks} rank(s) ended with {codes}")
        return dict(json.loads(answer.read_text()))


def main() -> None:
    """A rank: measure, rank 0 writes."""
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    init_distributed()
    engines = {mode: Made(task["set"], mode) for mode in MODES}
    result = {"bytes": _bytes, "times": _times}[task["what"]](engines)
    if comm.is_main():
        Path(sys.argv[2]).write_text(json.dumps(result))


class Made:
    """An engine of the preset in one of `MODES`, and a batch that it steps on."""

    def __init__(self, overrides: list[str], mode: str) -> None:
        world = comm.world_size()
        settings = config.load(RunConfig, PRESET, [*overrides, *MODES[mode]])
        batch = settings.training.global_batch // world
        tokenizer = Tokenizer(settings.data.tokenizer)
        engine = settings.engine.for_ranks(world).model_copy(update={"micro_batch": batch})
        whole = settings.training.global_batch
        task = build_task(settings, tokenizer)
        strip(task.model, mode)
        self.engine = Engine(task, engine, settings.optimizer, whole)
        g = torch.Generator().manual_seed(comm.rank())
        size, length = settings.data.size, settings.data.tokens
        self.batch = Batch(
            torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=g),
            torch.randint(4, tokenizer.vocab_size, (batch, length), generator=g),
            torch.ones(batch, length, dtype=torch.bool),
            torch.arange(comm.rank(), whole, world),
        )

    def step(self) -> None:
        """One optimizer step."""
        self.engine.step(self.batch, 1e-5)


def strip(model: Any, mode: str) -> None:
    """Take out of a network what its single task has no use for."""
    trunk = model.trunk
    if mode == "align":
        for name in ("up_blocks", "conv_norm_out", "conv_out"):
            setattr(trunk.unet, name, nn.Identity())
    if mode == "generate":
        without = [None] * len(trunk.blocks)  # a transformer without a text stream's block
        del trunk.blocks, trunk.query_time, trunk.head
        trunk.blocks, trunk.query_time = without, lambda t_B, dtype: 0.0


def _times(engines: dict[str, Made]) -> dict[str, list[float]]:
    """Seconds of each mode's steps, in turns, in an order that is drawn anew each round."""
    found: dict[str, list[float]] = {mode: [] for mode in engines}
    for made in engines.values():
        for _ in range(2):
            made.step()
    order, draws = list(engines), random.Random(0)
    for _ in range(ROUNDS):
        draws.shuffle(order)
        for mode in order:
            comm.barrier()
            began = time.perf_counter()
            engines[mode].step()
            comm.barrier()
            found[mode].append(time.perf_counter() - began)
    return found


def _bytes(engines: dict[str, Made]) -> dict[str, dict[str, int]]:
    """Bytes of one step by operation: each collective's result on this rank, fp32."""
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for mode, made in engines.items():
        for _ in range(3):  # ZeRO-3 records the order of modules in its first steps
            made.step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            made.step()
        counted: dict[str, int] = {}
        for event in profiler.events():
            if event.name.startswith("c10d::"):
                name = event.name.removeprefix("c10d::")
                counted[name] = counted.get(name, 0) + FLOAT * _elements(event.input_shapes)
        found[mode] = counted
    return found


def _elements(shapes: Any) -> int:
    """Of the first argument, the result: a tensor's shape or a list of them."""
    tree = ast.literal_eval(str(shapes))
    first = tree[0] if tree else []
    return sum(math.prod(s) for s in _shapes(first))


def _shapes(tree: Any) -> list[list[int]]:
    if not isinstance(tree, list) or not tree:
        return []
    if all(isinstance(n, int) for n in tree):
        return [tree]
    return [shape for part in tree for shape in _shapes(part)]


def _listed(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in sorted(found.items()))


if __name__ == "__main__":
    main()
