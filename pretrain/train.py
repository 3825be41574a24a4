"""A training run, from configuration to the last committed checkpoint. It names no model part and
no loss."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
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
from pretrain.errors import DataError, NonFiniteError
from pretrain.evaluators.base import Evaluator, Subject
from pretrain.flops import measured_peak, mfu, peak_flops, sample_flops
from pretrain.guard import SCALE, Guard, Refusal
from pretrain.inference import Heads, new_model
from pretrain.node_metrics import NodeMetrics, by_node
from pretrain.pretrained import Pretrained
from pretrain.profiling import Profiler, phase
from pretrain.progress import Display, Progress
from pretrain.run_config import EVALUATORS, RunConfig, check_evaluators
from pretrain.stop import REQUEUE_EXIT_CODE, Stop, Stopped
from pretrain.task import PretrainTask, check_objectives
from pretrain.tracking import build as build_tracker
from pretrain.tracking.base import Status, Tracker
from pretrain.types import Batch, StepOutput
from pretrain.watchdog import Watchdog

FINISHED = "_FINISHED"
LEFT_OUT = "left_out.jsonl"
_COPY_SECONDS = 15.0  # for copies of the last checkpoint, of the grace time after a signal


def build_task(
    config: RunConfig,
    tokenizer: Tokenizer,
    like: PretrainTask | None = None,
    storage: bool = True,
) -> PretrainTask:
    """Model and objectives, freshly initialised from the run's seed: the same on every rank.

    Args:
        like: a task of the same configuration, whose model's frozen parts are used too.
        storage: False leaves the model's trained parts on the meta device, for the engine to fill.
    """
    torch.manual_seed(config.seed)
    model = new_model(config.model, tokenizer, None if like is None else like.model, storage)
    return PretrainTask(model, check_objectives(config.objectives), config.task, config.seed)


def train(config: RunConfig, profile: bool = False) -> int:
    """Run, or take up again, the training that ``config`` describes. Every rank calls it.

    Args:
        config: the run.
        profile: also write a trace of a few steps to the folder profile of the run's output.

    Returns:
        The process's exit code: 0 when training is complete, 75 when a signal stopped it after a
        save.

    Raises:
        PretrainError: bad configuration or data, damaged checkpoints, losses that stay bad.
    """
    stop = Stop()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.local_world_size()))
    config.check_ranks(comm.world_size())
    output = Path(config.output)
    with Watchdog(output, comm.rank(), comm.world_size(), config.watchdog) as watchdog:
        watchdog.beat("start", 0)
        # Before the process group: its pass on the meta device is no step. One rank tells it.
        speed = Speed.of(config) if config.training.mfu and comm.is_main() else None
        init_distributed()
        stop.share(output / "control")
        if stop.agreed():
            return REQUEUE_EXIT_CODE
        run = Run(config, stop, watchdog, speed)
        try:
            with (
                Profiler(output / "profile", comm.rank()) if profile else nullcontext() as profiler
            ):
                return run.train(profiler)
        finally:
            run.close()


class Run:
    """One run on this rank: its parts, and the loop over them. Methods are collective.

    Args:
        config: the run.
        stop: whether it was asked to stop.
        watchdog: is told of every progress.
        speed: what the hardware could do; on rank 0.
    """

    def __init__(
        self, config: RunConfig, stop: Stop, watchdog: Watchdog, speed: "Speed | None"
    ) -> None:
        self.config, self.stop, self.watchdog = config, stop, watchdog
        self.output = Path(config.output)
        self.tokenizer = Tokenizer(config.data.tokenizer)
        self.guard = Guard(config.guard)
        self.settings = check_evaluators(config.evaluators)
        self.evaluators: dict[str, Evaluator] = {
            name: plugins.load(EVALUATORS, name, "evaluators").build(settings)
            for name, settings in self.settings.items()
        }
        watchdog.beat("check", 0)
        for evaluator in self.evaluators.values():
            evaluator.check(config.data, lambda: watchdog.beat("check", 0))
        pretrained = Pretrained(config.model)
        self.task = build_task(config, self.tokenizer, storage=not pretrained)
        self.engine = Engine(
            self.task,
            config.engine.for_ranks(comm.world_size()),
            config.optimizer,
            config.training.global_batch,
            config.ema,
            self.guard,
            pretrained,
            config.seed,
        )
        self.loader = Loader(
            config.data,
            self.tokenizer,
            config.seed,
            config.training.global_batch,
            comm.rank(),
            comm.world_size(),
        )
        check_encodings(self.task.model, self.loader.encodings)
        self.checkpointer = Checkpointer(self.output / "checkpoints", config.checkpoint)
        if comm.is_main() and self.loader.advice:
            print(f"[data] {self.loader.advice}", flush=True)
        self.progress = Progress()
        self._resume()
        self.tracker: Tracker = build_tracker(config.tracking, config.output, comm.rank())
        self.tracker.start(config.tracking.run_info(config.output))
        self.tracker.params(config.resolved())
        if comm.is_main():
            (self.output / FINISHED).unlink(missing_ok=True)
            path = self.output / "config.json"
            storage.write_bytes(str(path), json.dumps(config.resolved(), indent=1).encode())
            self.tracker.artifact(str(path))
        self.display = Display(config.training.samples, self.progress.samples)
        self.meter = Meter(config, self.engine, self.tracker, self.display, self.progress, speed)
        self.status: Status = "failed"

    def train(self, profiler: Profiler | None = None) -> int:
        """Every step that is left, then the last evaluation; the exit code."""
        progress, every = self.progress, self.config.checkpoint.every_samples
        total = self.config.training.samples
        if not self.stop.agreed():
            self._evaluate(lambda e: e.at_start and progress.samples == 0)
        batches = self._batches()
        while progress.samples < total:
            if self.stop.agreed():
                return self._leave()
            began = time.monotonic()
            self.watchdog.beat("load", progress.samples)
            with phase("data"):
                batch = next(batches)
            self._step(batch, began)
            if profiler is not None:
                profiler.step()
            if progress.bad_steps >= self.config.guard.bad_steps:
                self._rewind()
                batches = self._batches()
                continue
            complete = progress.samples >= total
            if progress.due(self.config.training.log_every_samples) or complete:
                self.meter.log()
            if not complete:
                self._evaluate(lambda e: progress.due(e.every_samples))
            # In mid-trouble what is saved is no state to go back to.
            if (progress.due(every) and not progress.bad_steps) or complete:
                self._save(last=complete)
        try:
            self._evaluate(lambda e: True, stoppable=True)
        except Stopped:
            return self._leave()
        if comm.is_main():
            tree = {"samples": progress.samples, "progress": dataclasses.asdict(progress)}
            storage.write_bytes(str(self.output / FINISHED), json.dumps(tree).encode())
        self.status = "finished"
        return 0

    def close(self) -> None:
        """End the display and the tracked run."""
        self.meter.close()
        self.display.close()
        self.tracker.finish(self.status)

    def _batches(self) -> Iterator[Batch]:
        return (
            iter(self.loader) if self.progress.samples < self.config.training.samples else iter(())
        )

    def _step(self, batch: Batch, began: float) -> None:
        """Learn from one global batch, unless its samples are to be left out; asked for at
        ``began``."""
        progress = self.progress
        size, before = self.config.training.global_batch, self.progress.samples
        self.watchdog.beat("step", before)
        if progress.leaves_out(before, before + size):
            progress.advance(size, refused=True)
            self.meter.count(None, batch, time.monotonic() - began)
            return
        lr = self.config.optimizer.rate(before, self.config.training.samples)
        step = self.engine.step(batch, lr, before)
        refused = isinstance(step, Refusal)
        progress.advance(size, refused=refused)
        if isinstance(step, Refusal):
            if step.why != SCALE:
                progress.bad_steps += 1
                self._note(before, before + size, step.why, step.loss)
            self.meter.count(None, batch, time.monotonic() - began)
        else:
            progress.bad_steps = 0
            self.meter.count(step, batch, time.monotonic() - began)

    def _rewind(self) -> None:
        """Go back to the last good state, and leave out from then on what led away from it."""
        progress, guard = self.progress, self.config.guard
        size = self.config.training.global_batch
        first_bad = progress.samples - progress.bad_steps * size
        where = f"samples {first_bad}-{progress.samples - 1}"
        if progress.rewinds >= guard.rewinds:
            raise NonFiniteError(
                f"{progress.bad_steps} bad steps in a row ({where}, listed in "
                f"{self.output / LEFT_OUT}) after {progress.rewinds} rewinds; look at them with "
                "`data explain`, lower optimizer.lr, or raise guard.bad_steps or guard.rewinds"
            )
        self.watchdog.beat("rewind", progress.samples)
        found = self.checkpointer.rewind(self.engine)
        if found is None:
            raise NonFiniteError(
                f"{progress.bad_steps} bad steps in a row ({where}, listed in "
                f"{self.output / LEFT_OUT}) before the first checkpoint; lower optimizer.lr, or "
                "checkpoint.every_samples"
            )
        stop, rewinds, left_out = progress.samples, progress.rewinds, progress.left_out
        self._take_up(found)
        start = max(progress.samples, first_bad - guard.skip_before)
        progress.left_out = [*left_out, [start, stop]]
        progress.rewinds = rewinds + 1
        self.meter.rewind()
        self._note(start, stop, "left out after a rewind", float("nan"))
        self.display.say(
            f"[guard] {where} were bad: back to {progress.samples:,} samples, leaving out "
            f"{start:,}-{stop - 1:,}"
        )

    def _note(self, start: int, stop: int, why: str, loss: float) -> None:
        """Record samples that the model does not learn from."""
        if comm.is_main():
            line = {"samples": [start, stop], "why": why, "loss": loss}
            _append(self.output / LEFT_OUT, line, self.display.say)

    def _save(self, last: bool = False, copies_seconds: float | None = None) -> None:
        self.watchdog.beat("save", self.progress.samples)
        progress = dataclasses.asdict(self.progress) | {"guard": self.guard.state_dict()}
        facts = {
            "tokenizer_sha256": self.tokenizer.sha256,
            "data": self.loader.fingerprint,
            "config": self.config.resolved(),
            "progress": progress,
            "loader": self.loader.state_dict(),
            "metrics": self.meter.evaluated(),
        }
        self.checkpointer.save(self.engine, self.progress.samples, facts, last, copies_seconds)
        self.watchdog.beat("saved", self.progress.samples)

    def _leave(self) -> int:
        """Save what there is and end with the code that asks for a restart."""
        if self.progress.steps or self.progress.skipped:
            self._save(last=True, copies_seconds=_COPY_SECONDS)
        self.status = "preempted"
        return REQUEUE_EXIT_CODE

    def _evaluate(self, wanted: Callable[[Any], bool], stoppable: bool = False) -> None:
        """Run the evaluators for whose settings ``wanted(settings)`` is true.

        Raises:
            Stopped: the run was asked to stop meanwhile, and ``stoppable``; else the loop sees it.
        """
        names = [name for name, settings in self.settings.items() if wanted(settings)]
        if not names:
            return
        began, samples = time.monotonic(), self.progress.samples

        def lost(name: str, error: NonFiniteError) -> None:
            # Whether training goes on is for the guard to say, which looks at the weights.
            self.display.say(f"[eval]  WARNING: no metrics of {name} at {samples:,}: {error}")

        self.watchdog.beat("evaluate", samples)
        try:
            with self.engine.evaluating(self.config.ema.use) as state:
                task = build_task(self.config, self.tokenizer, self.task).to(comm.device()).eval()
                task.load_state_dict(state, strict=True)
                metrics, files = evaluate(
                    task,
                    self.config,
                    self.tokenizer,
                    self.evaluators,
                    names,
                    samples,
                    self._pulse,
                    lost,
                )
                self.watchdog.beat("wait", samples)
        except Stopped:
            self.display.say("[eval]  left: the run was asked to stop")
            if stoppable:
                raise
            return
        metrics["evaluation_seconds"] = time.monotonic() - began
        self.meter.evaluation(metrics, files)
        self.checkpointer.annotate(samples, metrics)

    def _pulse(self) -> bool:
        self.watchdog.beat("evaluate", self.progress.samples)
        return self.stop.seen()

    def _take_up(self, found: Mapping[str, Any]) -> None:
        """Progress, guard and loader of a saved run, in place."""
        saved = dict(found["progress"])
        self.guard.load_state_dict(saved.pop("guard"))
        for name, value in dataclasses.asdict(Progress(**saved)).items():
            setattr(self.progress, name, value)
        self.loader.load_state_dict(found["loader"])

    def _resume(self) -> None:
        """Take up the newest committed checkpoint, if there is one."""

        def check(found: Checkpoint) -> None:
            self.tokenizer.check(found.run["tokenizer_sha256"])
            if found.run["data"] != self.loader.fingerprint:
                raise DataError(
                    f"data.train and data.order have fingerprint {self.loader.fingerprint[:12]} "
                    f"and checkpoint {str(found.folder)!r} was trained on "
                    f"{found.run['data'][:12]}: sample numbers would mean other samples; restore "
                    "the shards and the order's settings, or start with a new output"
                )

        self.watchdog.beat("resume", 0)
        found = self.checkpointer.restore(self.engine, check)
        if found is None:
            return
        self._take_up(found.run)
        if comm.is_main():
            ranks = found.run["world_size"]
            other = f", written by {ranks} ranks" if ranks != comm.world_size() else ""
            print(
                f"[train] resuming {found.folder} at {self.progress.samples:,} samples{other}",
                flush=True,
            )


@dataclass(frozen=True)
class Speed:
    """What a run's arithmetic needs and what its device could do.

    Attributes:
        flops_per_sample: of a training step, recomputation not counted.
        peak: operations per second of one rank's device: by its data sheet, on a CPU measured.
    """

    flops_per_sample: float
    peak: float

    @classmethod
    def of(cls, config: RunConfig) -> "Speed":
        """Counted on the meta device; a CPU's peak is measured for half a second."""
        vocab_size = Tokenizer(config.data.tokenizer).vocab_size
        precision, device = config.engine.precision, comm.device()
        peak = peak_flops(device, precision) or measured_peak(precision, device)
        return cls(sum(sample_flops(config, vocab_size).values()), peak)

    def mfu(self, images_per_second: float, ranks: int) -> float:
        """Model FLOPs utilisation: flops per sample × images/s ÷ (ranks × peak)."""
        return mfu(self.flops_per_sample, images_per_second, ranks, self.peak)


class Meter:
    """What a run tells of itself: metrics, refusals, evaluations; to the tracker, the display and
    files."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        tracker: Tracker,
        display: Display,
        progress: Progress,
        speed: "Speed | None",
    ) -> None:
        self.config, self.engine, self.speed = config, engine, speed
        self.tracker, self.display, self.progress = tracker, display, progress
        self.ledger = Ledger(Path(config.output), config.data.max_reject_rate, comm.rank())
        self.ledger.load_state_dict(progress.rejects)
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        seconds = config.tracking.system_seconds
        watched = bool(seconds) and comm.local_rank() == 0
        self.node = NodeMetrics(Path(config.output), seconds) if watched else None
        self.restart()

    def close(self) -> None:
        """Look at the node no more."""
        if self.node is not None:
            self.node.close()

    def restart(self) -> None:
        """Forget what was counted since the last log."""
        self._pending: list[dict[str, torch.Tensor]] = []
        self._seconds = 0.0
        self._samples = 0

    def rewind(self) -> None:
        """Go back to what `Progress` tells: samples that are read again are counted again."""
        self.ledger.take()
        self.ledger.load_state_dict(self.progress.rejects)
        self.restart()

    def count(self, step: StepOutput | None, batch: Batch, seconds: float) -> None:
        """Keep a step's metrics on the device; nothing is synchronised before `log`."""
        if step is not None:
            self._pending.append(step.metrics)
        self.ledger.add(batch.rejects)
        self._seconds += seconds
        self._samples += self.progress.global_batch

    def log(self) -> None:
        """Mean metrics since the last log, over ranks, to the tracker and the display.
        Collective."""
        names = self._pending[0] if self._pending else {}
        means = {n: torch.stack([m[n].float() for m in self._pending]).mean().item() for n in names}
        metrics = comm.mean_over_ranks(means)
        progress = self.progress
        node = None if self.node is None else self.node.take()
        told = comm.gather_objects((self.ledger.take(), node))
        self.ledger.merge([refused for refused, _ in told])
        progress.rejects = self.ledger.state_dict()
        progress.seconds += self._seconds
        images_per_second = self._samples / max(self._seconds, 1e-9)
        metrics |= {
            "images_per_second": images_per_second,
            **self._mfu(images_per_second),
            "lr": self.config.optimizer.rate(progress.samples, self.config.training.samples),
            "gradient_norm": self.engine.gradient_norm(),
            "steps_skipped": float(progress.skipped),
            "rewinds": float(progress.rewinds),
            **self.ledger.metrics(progress.samples),
        }
        progress.first = progress.first or metrics
        progress.last = metrics
        self.tracker.metrics(metrics | by_node([node for _, node in told]), progress.samples)
        self.display.line(progress.samples, metrics)
        self.restart()
        self.ledger.check(progress.samples)

    def _mfu(self, images_per_second: float) -> dict[str, float]:
        if self.speed is None:
            return {}
        return {"mfu": self.speed.mfu(images_per_second, comm.world_size())}

    def evaluation(self, metrics: dict[str, float], files: list[Path]) -> None:
        """Keep the results of evaluators."""
        samples = self.progress.samples
        known = self._evaluated[1] if self._evaluated[0] == samples else {}
        self._evaluated = (samples, known | metrics)
        self.tracker.metrics(metrics, samples)
        for path in files:
            self.tracker.artifact(str(path), "samples")
        shown = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if not k.endswith("/chance"))
        self.display.say(f"[eval]  {samples:>9,} samples  {shown}")
        if comm.is_main():
            path = Path(self.config.output) / "evaluations.jsonl"
            _append(path, {"samples": samples, **metrics}, self.display.say)

    def evaluated(self) -> dict[str, float]:
        """Metrics of evaluations made at this very state."""
        samples, metrics = self._evaluated
        return metrics if samples == self.progress.samples else {}


def _append(path: Path, line: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """One line more; a full disk costs the line, not the run."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    except OSError as error:
        say(f"[train] WARNING: {str(path)!r} was not written: {error}")


def evaluate(
    task: PretrainTask,
    config: RunConfig,
    tokenizer: Tokenizer,
    evaluators: dict[str, Evaluator],
    names: list[str],
    samples: int,
    pulse: Callable[[], bool] = lambda: False,
    lost: Callable[[str, NonFiniteError], None] | None = None,
) -> tuple[dict[str, float], list[Path]]:
    """Run the evaluators ``names`` on a plain task; every rank calls it, every rank gets the
    metrics.

    Args:
        lost: is told of an evaluator that found the model to say NaN, and the others run; None
            raises it.

    Raises:
        Stopped: on every rank, if ``pulse`` was True on one.
        NonFiniteError: on every rank.
    """
    subject = Subject(
        task=task,
        heads=Heads(task.model, config.inference, task.conditions),
        tokenizer=tokenizer,
        data=config.data,
        folder=Path(config.output) / "samples",
        samples=samples,
        rank=comm.rank(),
        world=comm.world_size(),
        pulse=pulse,
    )
    metrics: dict[str, float] = {}
    files: list[Path] = []
    for name in names:
        try:
            result = evaluators[name].run(subject)
        except NonFiniteError as error:  # of every rank
            if lost is None:
                raise
            lost(name, error)
            continue
        metrics |= result.metrics
        files += result.files
    return metrics, files
