"""Training runs that something befalls, at an exact place: ranks that call `pretrain.train.train`
as `python -m pretrain train` does, and leave a diary of what they learned from.

    attempt = Attempt(folder, 2, faults=(Fault("step", SIGKILL, rank=1, samples=48),))
    codes = attempt.codes()          # -9 for the rank that was killed
    Attempt(folder, 2).codes()       # takes it up again: 0, 0
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.parts import Parts
from tests.support import ranks, tiny

STEPS, BATCH, EVERY = 12, 16, 48
SAMPLES = STEPS * BATCH
# A checkpoint every 3 steps, an evaluation in mid-run and one at the end, an average.
SETTINGS = (
    f"training.samples={SAMPLES}",
    f"checkpoint.every_samples={EVERY}",
    "checkpoint.keep=3",
    "ema.half_lives=[64]",
    "data.workers=0",
    tiny.ONE_LEVEL_SETTING,
    "evaluators={validation: {global_batch: 96, repeats: 1, every_samples: 112, at_start: false}, "
    "zero_shot: null, retrieval: null, samples: null}",
    # (see tests/distributed/test_engine.py for eps: without it the number of ranks shows at once)
    "optimizer.eps=1.0e-5",
    "watchdog={timeout_seconds: 60.0, start_seconds: 120.0, save_seconds: 60.0, "
    "heartbeat_seconds: 0.5}",
)


@dataclass(frozen=True)
class Fault:
    """A signal to a rank itself, the first time it comes to a place.

    Attributes:
        place: a phase of the watchdog's ("start", "resume", "load", "step", "evaluate", "save",
            "saved"); "forward", in mid-step; or "write", in the thread that writes a checkpoint,
            its files there and its receipt not.
        number: of the signal; 0 waits there until `Attempt.go_on` instead.
        rank: that is hit.
        samples: into the run, at least.
    """

    place: str
    number: int
    rank: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Loss:
    """Losses of the samples [start, stop) are multiplied."""

    factor: float
    start: int
    stop: int


class Attempt:
    """Ranks under way that train in ``folder``, or go on there.

    Args:
        folder: output of the run; diaries and logs are beside it.
        world: ranks.
        settings: over SETTINGS.
        faults, losses: what befalls it.
        left_out: samples [start, stop) that it leaves out from the start.
        environment: variables of the ranks.
        function: that each rank calls, with what `attempt` takes.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        settings: Sequence[str] = (),
        faults: Sequence[Fault] = (),
        losses: Sequence[Loss] = (),
        left_out: Sequence[list[int]] = (),
        environment: Mapping[str, str] | None = None,
        function: str = f"{__name__}:attempt",
    ) -> None:
        self.folder, self.world = folder, world
        number = len(list(folder.parent.glob(f"{folder.name}.attempt-*")))
        self.own = folder.parent / f"{folder.name}.attempt-{number}"
        self.own.mkdir(parents=True)
        self.began = time.monotonic()
        self.processes: list[ForkServerProcess] = ranks.start(
            function,
            world,
            str(self.own),
            str(folder),
            tuple(settings),
            tuple(faults),
            tuple(losses),
            tuple(left_out),
            str(self.own),
            dict(environment or {}),
        )

    def codes(self, timeout: float = 120) -> list[int]:
        """Exit codes in rank order, -N for signal N; ends what does not end in time."""
        self.ended = [math.nan] * self.world
        deadline = time.monotonic() + timeout
        while any(math.isnan(t) for t in self.ended) and time.monotonic() < deadline:
            for rank, process in enumerate(self.processes):
                if math.isnan(self.ended[rank]) and process.exitcode is not None:
                    self.ended[rank] = time.monotonic()
            time.sleep(0.01)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert None not in codes, f"still going after {timeout} s: {codes}\n{self.text()}"
        return [code for code in codes if code is not None]

    def wait_for(self, path: Path, seconds: float = 120) -> None:
        """Until ``path`` is there; the ranks must be under way."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            alive = all(process.exitcode is None for process in self.processes)
            assert alive and time.monotonic() < deadline, f"{path}\n{self.text()}"
            time.sleep(0.02)

    def wait_at(self, fault: Fault, seconds: float = 120) -> None:
        """Until the ranks wait at a fault whose number is 0."""
        self.wait_for(self.own / f"waits-{fault.samples}", seconds)

    def go_on(self, fault: Fault) -> None:
        """Let them go on."""
        (self.own / f"go-{fault.samples}").touch()

    def kill(self) -> None:
        """End what is left."""
        for process in self.processes:
            process.kill()
            process.join()

    def rank_text(self, rank: int) -> str:
        """What a rank printed."""
        return (self.own / f"{rank}.log").read_text(errors="replace")

    def text(self) -> str:
        """What the ranks printed, the end of it."""
        return "\n--- next rank ---\n".join(self.rank_text(r)[-3000:] for r in range(self.world))

    def hit(self) -> float:
        """When the fault struck, by the clock of `ended`."""
        return float((self.own / "hit").read_text())

    def steps(self) -> list[dict[str, Any]]:
        """What was learned from: {"samples", "positions", "loss"} of each step, all ranks'
        positions together; a step that a rank did not finish is not there."""
        return [entry for entry in self.diary() if "loss" in entry]

    def diary(self) -> list[dict[str, Any]]:
        """`steps`, and an entry without a loss where a saved state was taken up: at the start, or
        in a rewind."""
        diaries = []
        for rank in range(self.world):
            path = self.own / f"diary-{rank}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            diaries.append([json.loads(line) for line in lines])
        return [
            {**entries[0], "positions": sorted(p for e in entries for p in e["positions"])}
            for entries in zip(*diaries, strict=False)
        ]


def resume_until_done(folder: Path, world: int, *settings: str) -> Attempt:
    """One more attempt, which must come to the end."""
    attempt = Attempt(folder, world, settings)
    assert attempt.codes() == [0] * world, attempt.text()
    return attempt


def trajectory(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """The steps that the final weights come from. What a run had learned after the state that was
    taken up next is not among them: it died with it."""
    kept: list[dict[str, Any]] = []
    for attempt in attempts:
        for entry in attempt.diary():
            if "loss" in entry:
                kept.append(entry)
            else:
                kept = [step for step in kept if step["samples"] < entry["samples"]]
    return kept


def positions(steps: Sequence[dict[str, Any]]) -> list[int]:
    """Sample numbers of these steps, sorted."""
    return sorted(p for step in steps for p in step["positions"])


def losses(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Mean loss of each step."""
    return [step["loss"] for step in steps]


def state(folder: Path, samples: int = SAMPLES) -> dict[str, Tensor]:
    """Every parameter of every kind (weights, moments, averages) in a committed checkpoint."""
    checkpoint = folder / "checkpoints" / f"samples-{samples:012d}"
    assert (checkpoint / "COMMITTED").exists(), sorted(checkpoint.parent.iterdir())
    parts = Parts(checkpoint)
    found = {f"{k}/{n}": parts.whole(k, n) for k in parts.kinds for n in parts.shapes}
    return found | {"steps": torch.tensor(parts.steps)}


def unequal(a: Path, b: Path) -> list[str]:
    """Names of what is not equal to the bit in the last checkpoints of two runs."""
    one, other = state(a), state(b)
    assert len(one) > 300 and one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# --- on each rank ---------------------------------------------------------------------------------


def attempt(
    output: str,
    settings: tuple[str, ...],
    faults: tuple[Fault, ...],
    losses: tuple[Loss, ...],
    left_out: tuple[list[int], ...],
    own: str,
    environment: dict[str, str],
) -> None:
    """As `python -m pretrain train`, with what befalls it."""
    from pretrain import comm, config, stop
    from pretrain.data import loader
    from pretrain.errors import PretrainError
    from pretrain.run_config import RunConfig
    from pretrain.train import train

    os.environ.update(environment)
    stop.install(stop.GIVE_UP_SECONDS)
    stop.tolerate_closed_output()
    rank = comm.rank()
    _befall([f for f in faults if f.rank == rank], Path(own))
    _spoil(losses)
    _keep_diary(Path(own) / f"diary-{rank}.jsonl")
    if left_out:
        _leave_out([list(span) for span in left_out])
    try:
        overrides = (*SETTINGS, f"output={output}", *settings)
        code = train(config.load(RunConfig, "configs/debug.yaml", overrides))
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    loader._kill_workers()  # a child of multiprocessing runs no atexit
    raise SystemExit(code)


def _befall(faults: list[Fault], own: Path) -> None:
    from pretrain import checkpoint
    from pretrain.task import PretrainTask
    from pretrain.watchdog import Watchdog

    waiting = list(faults)
    samples = 0

    def reached(place: str) -> None:
        for fault in list(waiting):
            if fault.place == place and samples >= fault.samples:
                waiting.remove(fault)
                (own / "hit").write_text(str(time.monotonic()))
                if fault.number:
                    os.kill(os.getpid(), fault.number)
                    continue
                (own / f"waits-{fault.samples}").touch()
                while not (own / f"go-{fault.samples}").exists():
                    time.sleep(0.02)

    real_beat, real_forward = Watchdog.beat, PretrainTask.forward
    real_write = checkpoint.write_part

    def beat(self: Watchdog, phase: str, now: int) -> None:
        nonlocal samples
        samples = now
        real_beat(self, phase, now)
        reached(phase)

    def forward(self: PretrainTask, batch: Any) -> Any:
        output = real_forward(self, batch)
        if self.training:
            reached("forward")
        return output

    def write_part(*arguments: Any) -> Any:
        facts = real_write(*arguments)
        reached("write")
        return facts

    Watchdog.beat = beat  # type: ignore[method-assign]
    PretrainTask.forward = forward  # type: ignore[method-assign]
    checkpoint.write_part = write_part


def _spoil(losses: tuple[Loss, ...]) -> None:
    from pretrain.task import PretrainTask

    real = PretrainTask.forward

    def forward(self: PretrainTask, batch: Any) -> Any:
        output = real(self, batch)
        for loss in losses if self.training else ():
            hit = (batch.positions_B >= loss.start) & (batch.positions_B < loss.stop)
            if hit.any():
                output = dataclasses.replace(output, loss=output.loss * loss.factor)
        return output

    PretrainTask.forward = forward  # type: ignore[method-assign]


def _keep_diary(path: Path) -> None:
    from pretrain.engine import Engine
    from pretrain.guard import Refusal
    from pretrain.train import Run

    real, real_rewind, real_resume = Engine.step, Run._rewind, Run._resume

    def write(entry: dict[str, Any]) -> None:
        with path.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    def rewind(self: Run) -> None:
        real_rewind(self)
        write({"samples": self.progress.samples, "positions": []})

    def resume(self: Run) -> None:
        real_resume(self)
        write({"samples": self.progress.samples, "positions": []})

    def step(self: Engine, batch: Any, lr: float, samples: int = 0) -> Any:
        result = real(self, batch, lr, samples)
        if not isinstance(result, Refusal):
            entry = {
                "samples": samples,
                "positions": batch.positions_B.tolist(),
                "loss": self.guard.state_dict()[-1],
            }
            write(entry)
        return result

    Engine.step = step  # type: ignore[method-assign]
    Run._rewind = rewind  # type: ignore[method-assign]
    Run._resume = resume  # type: ignore[method-assign]


def _leave_out(spans: list[list[int]]) -> None:
    from pretrain.train import Run

    real = Run.train

    def train(self: Run, *arguments: Any) -> int:
        self.progress.left_out = spans
        return real(self, *arguments)

    Run.train = train  # type: ignore[method-assign]


SIGKILL, SIGSTOP, SIGTERM, SIGUSR1 = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR1
