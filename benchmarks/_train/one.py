"""One contestant's process: `python -m benchmarks._train.one TASK.json RESULT.json`, on each rank.

bare        a plain PyTorch loop: the same model, batch, loader, optimizer and clipping, and no more
trainer     `pretrain.train.Run`, as `pretrain train` runs it
saves       the trainer, with blocking saves and with saves in the background, and without any
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pretrain import comm, config
from pretrain.run_config import RunConfig


def main() -> None:
    """Do the task; rank 0 writes the result."""
    task = json.loads(Path(sys.argv[1]).read_text())
    settings = config.load(RunConfig, task["config"], task["set"])
    result = {"bare": bare, "trainer": trainer, "saves": saves}[task["mode"]](settings, task)
    if comm.is_main():
        Path(sys.argv[2]).write_text(json.dumps(result))


def bare(settings: RunConfig, task: dict[str, Any]) -> dict[str, Any]:
    """Images/s of a loop that only trains."""
    from pretrain.data.loader import Loader
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.optim import build_optimizer
    from pretrain.train import build_task

    batch = settings.training.global_batch
    tokenizer = Tokenizer(settings.data.tokenizer)
    module = build_task(settings, tokenizer)
    optimizer = build_optimizer(module, settings.optimizer)
    loader = iter(Loader(settings.data, tokenizer, settings.seed, batch, 0, 1))
    began = 0.0
    for step in range(task["warm_up"] + task["steps"]):
        if step == task["warm_up"]:
            began = time.perf_counter()
        output = module(next(loader))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), settings.engine.clip_norm)
        for group in optimizer.param_groups:
            rate = settings.optimizer.rate(step * batch, settings.training.samples)
            group["lr"] = rate * group["rate_scale"]
        optimizer.step()
    seconds = time.perf_counter() - began
    return {"rate": task["steps"] * batch / seconds, "loss": float(output.loss)}


def trainer(settings: RunConfig, task: dict[str, Any]) -> dict[str, Any]:
    """Images/s of the whole trainer, the share of a step that moving averages take, and the bytes
    of state of this rank."""
    with _run(settings) as run:
        batches = iter(run.loader)
        averages = _timed(run.engine.ema, "update")
        began = 0.0
        for step in range(task["warm_up"] + task["steps"]):
            if step == task["warm_up"]:
                averages.clear()
                began = time.perf_counter()
            if run.stop.agreed():  # as its own loop asks
                break
            run.watchdog.beat("load", run.progress.samples)
            run._step(next(batches), time.monotonic())
        seconds = time.perf_counter() - began
        return {
            "rate": task["steps"] * settings.training.global_batch / seconds,
            "averages": sum(averages) / seconds,
            "loss": float(run.meter._pending[-1]["loss"]),
            "state": held(run.engine),
            "planned": planned(settings, comm.world_size()),
        }


def saves(settings: RunConfig, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds that training loses to a save: of stretches of ``steps`` steps with one save at the
    start, those without one subtracted; each several times, in turns."""
    found: dict[str, list[float]] = {"none": [], "blocking": [], "background": []}
    held_up: dict[str, list[float]] = {"blocking": [], "background": []}
    with _run(settings) as run:
        batches = iter(run.loader)
        for _ in range(task["warm_up"]):
            run._step(next(batches), time.monotonic())
        for _ in range(task["repeats"]):
            for kind in found:
                keeper = run.checkpointer
                keeper.config = keeper.config.model_copy(
                    update={"background": kind == "background"}
                )
                comm.barrier()
                began = time.perf_counter()
                if kind != "none":
                    run._save()
                    held_up[kind].append(time.perf_counter() - began)
                for _ in range(task["steps"]):
                    run._step(next(batches), time.monotonic())
                comm.barrier()
                found[kind].append(time.perf_counter() - began)
                keeper.finish(last=True)
        size = sum(
            p.stat().st_size for p in keeper.committed()[-1].folder.rglob("*") if p.is_file()
        )
    middle = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    return {
        "seconds": found,
        "stalled": {kind: middle[kind] - middle["none"] for kind in held_up},
        "held_up": {kind: statistics.median(seconds) for kind, seconds in held_up.items()},
        "bytes": size,
    }


def held(engine: Any) -> dict[str, int]:
    """Bytes of the storages that the engine keeps between steps, by what they are for."""
    seen: set[int] = set()
    parameters = list(engine._engine.module.parameters())
    weights = [getattr(p, "ds_tensor", p).data for p in parameters]
    weights += [p.data for p in parameters]  # of ZeRO-3 those that are kept whole
    states = [engine.partitions.inner.state[key] for key in engine.partitions._keys()]
    moments = [state[kind] for state in states for kind in ("exp_avg", "exp_avg_sq")]
    flat = getattr(engine._optimizer, "grad_partitions_flat_buffer", None)
    gradients = [flat] if flat is not None else [p.grad for p in parameters if p.grad is not None]
    averages = [t for copies in engine.ema.copies.values() for t in copies]
    return {
        "parameters": _bytes(weights, seen),
        "gradients": _bytes(gradients, seen),
        "optimizer": _bytes([*engine.partitions.flats, *moments], seen),
        "averages": _bytes(averages, seen),
    }


def planned(settings: RunConfig, ranks: int) -> dict[str, int]:
    """What `plan` says of the same."""
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.plan import count_parameters, state_bytes_per_rank

    counted = count_parameters(settings, Tokenizer(settings.data.tokenizer).vocab_size)
    state = state_bytes_per_rank(
        counted.total,
        ranks,
        settings.engine.precision,
        settings.engine.zero_stage,
        ema_copies=len(settings.ema.half_lives),
        persistent=counted.persistent,
    )
    return {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "averages": state.ema,
    }


def _bytes(tensors: list[torch.Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _timed(owner: Any, name: str) -> list[float]:
    """Seconds of every call of a method from now on."""
    seconds: list[float] = []
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, call)
    return seconds


class _run:
    """The parts of a run, as `train` makes them."""

    def __init__(self, settings: RunConfig) -> None:
        self.settings = settings

    def __enter__(self) -> Any:
        from pretrain.engine import init_distributed
        from pretrain.stop import Stop
        from pretrain.train import Run, Speed
        from pretrain.watchdog import Watchdog

        output = Path(self.settings.output)
        stop, speed = Stop(), Speed.of(self.settings)
        self.watchdog = Watchdog(output, comm.rank(), comm.world_size(), self.settings.watchdog)
        self.watchdog.__enter__()
        init_distributed()
        stop.share(output / "control")
        self.run = Run(self.settings, stop, self.watchdog, speed)
        return self.run

    def __exit__(self, *error: Any) -> None:
        self.run.close()
        self.watchdog.__exit__(*error)


if __name__ == "__main__":
    main()
