"""A training run, from configuration to the last committed checkpoint. It names no model part and
no loss."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from pretrain import comm, plugins, storage
from pretrain.checkpoint import Checkpoint, Checkpointer
from pretrain.data.loader import Loader
from pretrain.data.rejects import Ledger
from pretrain.data.tokenizer import Tokenizer
from pretrain.encoders import check_encodings
from pretrain.engine import Engine, init_distributed
from pretrain.errors import DataError
from pretrain.evaluators.base import Evaluator, Subject
from pretrain.inference import Heads, new_model
from pretrain.progress import Display, Progress, Stop
from pretrain.run_config import EVALUATORS, RunConfig, check_evaluators
from pretrain.task import PretrainTask, check_objectives
from pretrain.tracking import build as build_tracker
from pretrain.tracking.base import Status, Tracker
from pretrain.types import StepOutput

FINISHED = "_FINISHED"
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal after a committed save; start it again


def build_task(config: RunConfig, tokenizer: Tokenizer) -> PretrainTask:
    """Model and objectives, freshly initialised from the run's seed: the same on every rank."""
    torch.manual_seed(config.seed)
    model = new_model(config.model, tokenizer)
    return PretrainTask(model, check_objectives(config.objectives), config.task, config.seed)


def train(config: RunConfig) -> int:
    """Run, or take up again, the training that ``config`` describes. Every rank calls it.

    Returns:
        The process's exit code: 0 when training is complete, 75 when a signal stopped it after a
        save.

    Raises:
        PretrainError: bad configuration or data, a damaged checkpoint, a loss that stays
            non-finite.
    """
    stop = Stop()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.local_world_size()))
    config.check_ranks(comm.world_size())
    init_distributed()
    output = Path(config.output)
    tokenizer = Tokenizer(config.data.tokenizer)
    task = build_task(config, tokenizer)
    engine = Engine(task, config.engine, config.optimizer, config.training.global_batch)
    loader = Loader(
        config.data,
        tokenizer,
        config.seed,
        config.training.global_batch,
        comm.rank(),
        comm.world_size(),
    )
    check_encodings(task.model, loader.encodings)
    checkpointer = Checkpointer(output / "checkpoints", config.checkpoint)
    if comm.is_main() and loader.advice:
        print(f"[data] {loader.advice}", flush=True)
    progress = _resume(checkpointer, engine, loader, tokenizer)
    tracker = build_tracker(config.tracking, config.output, comm.rank())
    tracker.start(config.tracking.run_info(config.output))
    tracker.params(config.resolved())
    if comm.is_main():
        (output / FINISHED).unlink(missing_ok=True)
        path = output / "config.json"
        storage.write_bytes(str(path), json.dumps(config.resolved(), indent=1).encode())
        tracker.artifact(str(path))
    display = Display(config.training.samples, progress.samples)
    run = _Run(config, engine, tokenizer, tracker, display, progress)
    facts = {
        "tokenizer_sha256": tokenizer.sha256,
        "data": loader.fingerprint,
        "config": config.resolved(),
    }

    def save() -> None:
        tree = {**facts, "progress": dataclasses.asdict(progress), "loader": loader.state_dict()}
        checkpointer.save(engine, progress.samples, tree)

    status: Status = "failed"
    stopping = False
    try:
        run.evaluate(lambda e: e.at_start and progress.samples == 0)
        for batch in loader if progress.samples < config.training.samples else ():
            began = time.monotonic()
            step = engine.step(
                batch, config.optimizer.rate(progress.samples, config.training.samples)
            )
            progress.advance(config.training.global_batch, refused=step is None)
            run.count(step, batch.rejects, time.monotonic() - began)
            complete = progress.samples >= config.training.samples
            if progress.due(config.training.log_every_samples) or complete:
                run.log()
            if not complete:
                run.evaluate(lambda e: progress.due(e.every_samples))
            stopping = stop.agreed() and not complete
            if progress.due(config.checkpoint.every_samples) or stopping or complete:
                save()
            if stopping or complete:
                break
        if stopping:
            status = "preempted"
            return REQUEUE_EXIT_CODE
        run.evaluate(lambda e: True)
        if comm.is_main():
            tree = {"samples": progress.samples, "progress": dataclasses.asdict(progress)}
            storage.write_bytes(str(output / FINISHED), json.dumps(tree).encode())
        status = "finished"
        return 0
    finally:
        display.close()
        tracker.finish(status)


class _Run:
    """Logging and evaluation of one run: what happens beside the step."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        tracker: Tracker,
        display: Display,
        progress: Progress,
    ) -> None:
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.tracker, self.display, self.progress = tracker, display, progress
        self.settings = check_evaluators(config.evaluators)
        self.evaluators: dict[str, Evaluator] = {
            name: plugins.load(EVALUATORS, name, "evaluators").build(settings)
            for name, settings in self.settings.items()
        }
        self.ledger = Ledger(Path(config.output), config.data.max_reject_rate, comm.rank())
        self.ledger.load_state_dict(progress.rejects)
        self._pending: list[dict[str, torch.Tensor]] = []
        self._seconds = 0.0
        self._samples = 0

    def count(self, step: StepOutput | None, rejects: tuple[Any, ...], seconds: float) -> None:
        """Keep a step's metrics on the device; nothing is synchronised before `log`."""
        if step is not None:
            self._pending.append(step.metrics)
        self.ledger.add(rejects)
        self._seconds += seconds
        self._samples += self.progress.global_batch

    def log(self) -> None:
        """Mean metrics since the last log, over ranks, to the tracker and the display.
        Collective."""
        names = self._pending[0] if self._pending else {}
        means = {n: torch.stack([m[n].float() for m in self._pending]).mean().item() for n in names}
        metrics = comm.mean_over_ranks(means)
        progress = self.progress
        self.ledger.merge(comm.gather_objects(self.ledger.take()))
        progress.rejects = self.ledger.state_dict()
        progress.seconds += self._seconds
        metrics |= {
            "images_per_second": self._samples / self._seconds,
            "lr": self.config.optimizer.rate(progress.samples, self.config.training.samples),
            "gradient_norm": self.engine.gradient_norm(),
            "steps_skipped": float(progress.skipped),
            **self.ledger.metrics(progress.samples),
        }
        progress.first = progress.first or metrics
        progress.last = metrics
        self.tracker.metrics(metrics, progress.samples)
        self.display.line(progress.samples, metrics)
        self._pending, self._seconds, self._samples = [], 0.0, 0
        self.ledger.check(progress.samples)

    def evaluate(self, wanted: Any) -> None:
        """Run the evaluators for whose settings ``wanted(settings)`` is true. Collective."""
        names = [name for name, settings in self.settings.items() if wanted(settings)]
        if not names:
            return
        began = time.monotonic()
        with self.engine.evaluating() as state:
            task = build_task(self.config, self.tokenizer).to(comm.device()).eval()
            task.load_state_dict(state, strict=True)
            metrics, files = evaluate(
                task, self.config, self.tokenizer, self.evaluators, names, self.progress.samples
            )
        metrics["evaluation_seconds"] = time.monotonic() - began
        self.tracker.metrics(metrics, self.progress.samples)
        for path in files:
            self.tracker.artifact(str(path), "samples")
        shown = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if not k.endswith("/chance"))
        self.display.say(f"[eval]  {self.progress.samples:>9,} samples  {shown}")
        if comm.is_main():
            path = Path(self.config.output) / "evaluations.jsonl"
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"samples": self.progress.samples, **metrics}) + "\n")


def evaluate(
    task: PretrainTask,
    config: RunConfig,
    tokenizer: Tokenizer,
    evaluators: dict[str, Evaluator],
    names: list[str],
    samples: int,
) -> tuple[dict[str, float], list[Path]]:
    """Run the evaluators ``names`` on a plain task; every rank calls it, every rank gets the
    metrics."""
    subject = Subject(
        task=task,
        heads=Heads(task.model, config.inference),
        tokenizer=tokenizer,
        data=config.data,
        folder=Path(config.output) / "samples",
        samples=samples,
        rank=comm.rank(),
        world=comm.world_size(),
    )
    metrics: dict[str, float] = {}
    files: list[Path] = []
    for name in names:
        result = evaluators[name].run(subject)
        metrics |= result.metrics
        files += result.files
    return metrics, files


def _resume(
    checkpointer: Checkpointer, engine: Engine, loader: Loader, tokenizer: Tokenizer
) -> Progress:
    """Progress of the newest committed checkpoint, with engine and loader restored; else a fresh
    start."""

    def check(found: Checkpoint) -> None:
        tokenizer.check(found.run["tokenizer_sha256"])
        if found.run["data"] != loader.fingerprint:
            raise DataError(
                f"data.train and data.order have fingerprint {loader.fingerprint[:12]} and "
                f"checkpoint {str(found.folder)!r} was trained on {found.run['data'][:12]}: sample "
                "numbers would mean other samples; restore the shards and the order's settings, or "
                "start with a new output"
            )

    found = checkpointer.restore(engine, check)
    if found is None:
        return Progress()
    loader.load_state_dict(found.run["loader"])
    progress = Progress(**found.run["progress"])
    if comm.is_main():
        print(f"[train] resuming {found.folder} at {progress.samples:,} samples", flush=True)
    return progress
