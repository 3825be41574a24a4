"""The fault table of docs/RELIABILITY.md: what befalls real ranks, and that the run they resume
ends as one that nothing befell. (S3's rows: tests/cluster/test_checkpoint_s3.py.)"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from pretrain.checkpoint import CheckpointConfig, Checkpointer
from pretrain.watchdog import HUNG_EXIT_CODE, read_heartbeats
from tests.support import faulty_run, ranks
from tests.support.faulty_run import (
    BATCH,
    EVERY,
    SAMPLES,
    SIGKILL,
    SIGSTOP,
    SIGTERM,
    SIGUSR1,
    Attempt,
    Fault,
    Loss,
    positions,
    resume_until_done,
    trajectory,
    unequal,
)
from tests.support.plain import PlainEngine, same

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ALL = list(range(SAMPLES))
STOPPED, REFUSED = 75, 2
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """Twelve steps on two ranks without a break."""
    folder = tmp_path_factory.mktemp("reliability") / "reference"
    attempt = resume_until_done(folder, 2, "checkpoint.keep=9")
    assert positions(attempt.steps()) == ALL
    return attempt


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    """Starts attempts at one run, in ``tmp_path/run``; ends what a failed test leaves of them."""
    started: list[Attempt] = []

    def start(world: int = 2, **befalls: object) -> Attempt:
        started.append(Attempt(tmp_path / "run", world, **befalls))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for attempt in started:
        attempt.kill()


def equals(reference: Attempt, attempts: list[Attempt]) -> None:
    """The end is the reference's to the bit, of the same samples and losses, each once."""
    steps = trajectory(attempts)
    assert positions(steps) == ALL
    assert faulty_run.losses(steps) == faulty_run.losses(reference.steps())
    assert unequal(reference.folder, attempts[-1].folder) == []
    assert (attempts[-1].folder / "_FINISHED").exists()


KILLED = [("forward", 1, 64), ("write", 0, 96), ("write", 1, 96), ("evaluate", 1, 112)]


@pytest.mark.parametrize(
    "places", [KILLED[1:2], pytest.param(KILLED, marks=pytest.mark.soak)], ids=["one", "all"]
)
def test_sigkill_of_a_rank(reference, run, places):
    """In mid-step, in the thread that writes a checkpoint, in an evaluation."""
    attempts = []
    for place, rank, samples in places:
        attempt = run(faults=[Fault(place, SIGKILL, rank, samples)])
        codes = attempt.codes()
        assert codes[rank] == -SIGKILL and codes[1 - rank] == 1, (place, codes, attempt.text())
        noticed = attempt.ended[1 - rank] - attempt.hit()
        print(f"measured: {place}: the other rank ended {noticed:.1f} s later")
        assert noticed < 20
        attempts.append(attempt)
    attempts.append(run())
    assert attempts[-1].codes() == [0, 0], attempts[-1].text()
    began = [a.diary()[0]["samples"] for a in attempts]
    # Killed between its files and its receipt, a rank leaves 96 uncommitted.
    assert began[:2] == [0, 48], began
    if places == KILLED:  # at last it may or may not be in time for the evaluation at 112
        assert began[2:4] == [48, 48] and began[4] in (48, 96), began
    equals(reference, attempts)


STOPS = [
    Fault("start", SIGTERM, 1),
    Fault("resume", SIGTERM, 0),
    Fault("forward", SIGUSR1, 1, 16),
    Fault("load", SIGTERM, 0, 80),
    Fault("evaluate", SIGTERM, 1, 112),
    Fault("write", SIGUSR1, 0, 144),
    Fault("save", SIGTERM, 1, SAMPLES),
    Fault("evaluate", SIGTERM, 0, SAMPLES),
]


@pytest.mark.parametrize(
    "phases",
    [[STOPS[4]], pytest.param(STOPS, marks=pytest.mark.soak)],
    ids=["one", "all"],
)
def test_sigterm_and_sigusr1_in_each_phase(reference, run, phases):
    """One run stopped in each phase, with a loader's worker: every time all ranks end with 75 and
    leave nothing to do again."""
    attempts = []
    for fault in phases:
        attempt = run(faults=[fault], settings=("data.workers=1",))
        codes = attempt.codes()
        assert codes == [STOPPED, STOPPED], (fault, codes, attempt.text())
        ended = max(attempt.ended) - attempt.hit()
        print(f"measured: {fault.place} at {fault.samples}: ended {ended:.1f} s after the signal")
        attempts.append(attempt)
    attempts.append(run(settings=("data.workers=1",)))
    assert attempts[-1].codes() == [0, 0], attempts[-1].text()
    equals(reference, attempts)
    assert sum(len(a.steps()) for a in attempts) * BATCH == SAMPLES  # no step was made twice


@pytest.mark.soak  # tests/unit/test_watchdog.py has the watchdog
def test_sigstop_of_a_rank(reference, run):
    """The other one names it and ends; nothing is lost but the steps since the last checkpoint."""
    limits = (
        "watchdog={timeout_seconds: 10.0, start_seconds: 90.0, save_seconds: 30.0, "
        "heartbeat_seconds: 0.5}"
    )
    attempt = run(faults=[Fault("forward", SIGSTOP, 1, 64)], settings=(limits,))
    attempt.processes[0].join(120)
    noticed = time.monotonic() - attempt.hit()
    assert attempt.processes[0].exitcode == HUNG_EXIT_CODE, attempt.text()
    assert attempt.processes[1].exitcode is None
    stopped = attempt.processes[1].pid
    said = attempt.rank_text(0)
    assert "suspect: rank 1 (" in said and f"process {stopped};" in said, said
    assert "rank 0" in (attempt.folder / "stacks" / "rank-00000.txt").read_text()
    print(f"measured: limit 10 s, noticed after {noticed:.1f} s")
    assert 5 < noticed < 30  # counted from the beginning of the step
    attempt.kill()
    after = run()
    assert after.codes() == [0, 0], after.text()
    equals(reference, [attempt, after])


# --- the launcher ---------------------------------------------------------------------------------

MARK = "DIFFDIS_RELIABILITY_TEST"


def launch(output: Path) -> subprocess.Popen[bytes]:
    settings = (*faulty_run.SETTINGS, f"output={output}", "data.workers=1")
    sets = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "launcher", "local", "--config", "configs/debug.yaml"]
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, "--ranks", "2", *sets],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", MARK: str(output)},
            stdout=log,
            stderr=log,
        )


def marked(output: Path) -> list[psutil.Process]:
    """Every process that comes from `launch`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(output):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(true: Callable[[], object], what: str, seconds: float = 120) -> float:
    """Seconds until ``true()``."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + seconds, what
        time.sleep(0.02)
    return time.monotonic() - began


def in_its_import(process: psutil.Process) -> bool:
    """A rank whose handlers stand and that has not begun."""
    try:
        if "LOCAL_RANK" not in process.environ() or "-m" not in process.cmdline():
            return False
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (psutil.Error, OSError):
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (SIGUSR1 - 1) & 1)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Of launched runs; what is left of them is ended."""
    yield tmp_path / "run"
    for process in marked(tmp_path / "run"):
        process.kill()


@pytest.mark.soak
def test_sigterm_in_the_import_sigkill_of_a_rank_and_of_the_launcher(reference, output):
    """Under `python -m launcher local`, three times in a row."""
    text = output.with_suffix(".log")
    committed = output / "checkpoints" / f"samples-{EVERY:012d}" / "COMMITTED"

    process = launch(output)
    until(lambda: sum(map(in_its_import, marked(output))) == 2, "no rank began")
    process.send_signal(SIGTERM)
    assert process.wait(120) == STOPPED, text.read_text()
    assert not committed.parent.parent.exists() and not marked(output)

    process = launch(output)
    until(committed.exists, "no checkpoint")
    os.kill(read_heartbeats(output)[1].pid, SIGKILL)
    began = time.monotonic()
    assert process.wait(120) not in (0, STOPPED), text.read_text()
    print(f"measured: the launcher ended {time.monotonic() - began:.1f} s after a rank")
    assert not marked(output) and not (output / "_FINISHED").exists()

    process = launch(output)
    later = output / "checkpoints" / f"samples-{2 * EVERY:012d}" / "COMMITTED"
    until(later.exists, "no checkpoint")
    launchers = [p for p in marked(output) if "LOCAL_RANK" not in p.environ()]
    assert len(launchers) == 3  # ours, deepspeed's runner, deepspeed's launch
    for one in launchers:
        one.kill()
    process.wait()
    # The ranks write to a file, so no pipe breaks: the run comes to its end without a launcher.
    until((output / "_FINISHED").exists, text.read_text())
    gone = until(lambda: not marked(output), f"orphans: {marked(output)}", 60)
    print(f"measured: the last process ended {gone:.1f} s after the run")
    assert unequal(reference.folder, output) == []


# --- checkpoints ----------------------------------------------------------------------------------


def die_in_mid_save(folder: str, points: int) -> list[str]:
    """Forks children that save over two checkpoints, and are killed at points of the save: before
    a call to the file system, or at a moment."""
    # Here first: children inherit what is imported on the way.
    _checkpointer(Path(folder, "warm")).save(_state_at(16), 16, {}, last=True)  # type: ignore[arg-type]
    calls = _saved_by_a_child(Path(folder, "dry"), None)
    assert calls > 40
    draw = random.Random(0)
    wrong = []
    killed = {"before": 0, "after": 0}
    for point in range(points):
        own = Path(folder, str(point))
        ends = draw.randrange(calls) if point % 5 else draw.uniform(0, 0.02)
        _saved_by_a_child(own, ends)
        engine = PlainEngine(seed=9, half_lives=(16,))
        checkpointer = _checkpointer(own)
        there = (own / f"samples-{24:012d}" / "COMMITTED").exists()
        found = checkpointer.restore(engine)  # type: ignore[arg-type]
        killed["after" if there else "before"] += 1
        if found is None or found.samples != (24 if there else 16):
            wrong.append(f"{ends}: took {found and found.samples}, committed: {there}")
        elif not same(engine.state(), _state_at(found.samples).state()):
            wrong.append(f"{ends}: the state is not that of {found.samples}")
        again = _state_at(24)
        checkpointer.save(again, 24, {}, last=True)  # type: ignore[arg-type]
        if checkpointer.restore(engine).samples != 24 or not same(engine.state(), again.state()):  # type: ignore[arg-type, union-attr]
            wrong.append(f"{ends}: the next save is not taken up")
        shutil.rmtree(own)
    print(f"measured: {calls} calls to the file system in a save; killed {killed} the commit")
    assert min(killed.values()) > 3, killed
    return wrong


def _checkpointer(folder: Path) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig(keep=1))


def _state_at(samples: int) -> PlainEngine:
    engine = PlainEngine(seed=1, half_lives=(16,))
    while engine.samples < samples:
        engine.step()
    return engine


def _saved_by_a_child(folder: Path, ends: float | int | None) -> int:
    """Calls to the file system in the save; the child is killed before one of that number, or so
    many seconds after the beginning."""
    counted, count = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.write(count, str(_save_and_die(folder, ends)).encode())
            os._exit(0)
        os._exit(1)
    os.close(count)
    text = os.read(counted, 64)
    os.close(counted)
    status = os.waitpid(child, 0)[1]
    late = not isinstance(ends, int) and status == 0  # a moment may come after the end
    assert status == SIGKILL or late, status
    return int(text or -1)


def _save_and_die(folder: Path, ends: float | int | None) -> int:
    calls, watched = 0, False

    def hook(event: str, arguments: object) -> None:
        nonlocal calls, watched
        if watched and (event == "open" or event.startswith(("os.", "shutil."))):
            if isinstance(ends, int) and calls == ends:
                watched = False  # os.kill is an event too
                os.kill(os.getpid(), SIGKILL)
            calls += 1

    sys.addaudithook(hook)
    checkpointer = _checkpointer(folder)
    engine = _state_at(16)
    checkpointer.save(engine, 16, {}, last=True)  # type: ignore[arg-type]
    engine.step()
    if isinstance(ends, float):
        threading.Timer(ends, os.kill, (os.getpid(), SIGKILL)).start()
    watched = True
    checkpointer.save(engine, 24, {}, last=True)  # type: ignore[arg-type]
    watched = False
    return calls


def test_sigkill_at_fifty_points_of_a_save(tmp_path):
    """The newest committed state is restored, whole, and the next save succeeds."""
    # In memory where that can be: a process is killed here, no power fails, and thousands of
    # fsyncs take minutes on a slow disk.
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        assert ranks.run(f"{__name__}:die_in_mid_save", 1, folder, 50) == [[]]


def test_damaged_checkpoint_files(reference, run, tmp_path):
    """A changed byte in the newest, a missing file in the one before, a truncated one in the one
    before that: each is named, and the last good one is taken."""
    folder = tmp_path / "run"
    shutil.copytree(reference.folder, folder)
    newest, missing, truncated = (
        folder / "checkpoints" / f"samples-{n * EVERY:012d}" for n in (4, 3, 2)
    )
    weights = newest / "weights" / "rank-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (missing / "exp_avg" / "rank-00000.safetensors").unlink()
    os.truncate(truncated / "ema-64" / "rank-00001.safetensors", 4000)
    after = run()
    assert after.codes() == [0, 0], after.text()
    said = after.rank_text(0)
    for text in ("has changed since", "is missing", "has 4000 bytes", f"at {EVERY} samples"):
        assert text in said, (text, said)
    assert (
        sorted(p.name[:15] for p in (folder / "checkpoints").glob("damaged-*"))
        == ["damaged-samples"] * 3
    )
    equals(reference, [reference, after])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = f"a tmpfs cannot be mounted here: {done.stderr.strip()}"
        (pytest.fail if os.environ.get("CI", "").lower() == "true" else pytest.skip)(reason)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves no room."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(b"\0" * 4096):
            pass
    return path


@pytest.mark.soak
def test_full_disk(reference, small_disk):
    """In mid-run a warning, and the next checkpoint is written; at the end an error, and the
    checkpoint before is taken up."""
    output = small_disk / "run"
    holds = [Fault("load", 0, 0, samples) for samples in (64, 112, 160)]
    attempt = Attempt(output, 2, ("checkpoint.keep=1",), faults=holds)
    try:
        attempt.wait_at(holds[0])
        filler = fill(small_disk)
        attempt.go_on(holds[0])
        attempt.wait_at(holds[1])
        checkpoints = output / "checkpoints"
        whole = [p.parent.name for p in checkpoints.glob("*/COMMITTED")]
        assert whole == [f"samples-{EVERY:012d}"]
        filler.unlink()
        attempt.go_on(holds[1])
        attempt.wait_for(checkpoints / f"samples-{3 * EVERY:012d}" / "COMMITTED")
        attempt.wait_at(holds[2])
        filler = fill(small_disk)
        attempt.go_on(holds[2])
        assert attempt.codes() == [REFUSED, REFUSED], attempt.text()
    finally:
        attempt.kill()
    said = attempt.rank_text(0)
    assert "WARNING: checkpoint=" in said and "No space left" in said and "Traceback" not in said
    assert "error: checkpoint=" in said and "the checkpoint before it is untouched" in said
    filler.unlink()
    after = resume_until_done(output, 2, "checkpoint.keep=1")
    assert after.steps()[0]["samples"] == 3 * EVERY
    equals(reference, [attempt, after])


# --- numbers --------------------------------------------------------------------------------------

GUARD = ("guard={least: 4, window: 8, spike_z: 12.0, bad_steps: 2, skip_before: 16}",)
NAN, SPIKE = float("nan"), 1000.0


@pytest.mark.soak
def test_spike_nan_and_a_run_of_bad_steps(run, tmp_path):
    """A spike, one NaN sample, two bad steps in a row: what is left out is recorded, and the end is
    that of a run which never saw those samples."""
    troubles = [Loss(SPIKE, 64, 80), Loss(NAN, 101, 102), Loss(NAN, 128, 160)]
    troubled = run(settings=GUARD, losses=troubles)
    assert troubled.codes() == [0, 0], troubled.text()
    lines = (troubled.folder / "left_out.jsonl").read_text().splitlines()
    nan = "non-finite loss"
    assert [(e["samples"], e["why"]) for e in map(json.loads, lines)] == [
        ([64, 80], "loss spike"),
        ([96, 112], nan),
        ([128, 144], nan),
        ([144, 160], nan),
        ([112, 160], "left out after a rewind"),
        ([96, 112], nan),  # met again, on the way from 96
    ]
    left_out = [[64, 80], [96, 112], [112, 160]]
    progress = json.loads((troubled.folder / "_FINISHED").read_text())["progress"]
    assert progress["left_out"] == [[112, 160]] and progress["rewinds"] == 1
    assert (progress["steps"], progress["skipped"]) == (7, 5)
    assert "back to 96 samples, leaving out 112-159" in troubled.rank_text(0)

    never = Attempt(tmp_path / "never", 2, GUARD, left_out=left_out)
    assert never.codes() == [0, 0], never.text()
    learned = [n for n in ALL if not any(a <= n < b for a, b in left_out)]
    assert positions(never.steps()) == learned == positions(trajectory([troubled]))
    assert unequal(never.folder, troubled.folder) == []
    assert all(torch.isfinite(t).all() for t in faulty_run.state(troubled.folder).values())


def test_losses_that_stay_bad_end_the_run(run):
    attempt = run(settings=GUARD, losses=[Loss(NAN, 0, SAMPLES)])
    assert attempt.codes() == [REFUSED, REFUSED], attempt.text()
    said = attempt.rank_text(0)
    assert "2 bad steps in a row (samples 0-31, listed in" in said and "Traceback" not in said


# --- another number of ranks ----------------------------------------------------------------------


def test_a_number_of_ranks_that_does_not_divide(reference, run, tmp_path):
    shutil.copytree(reference.folder, tmp_path / "run")
    attempt = run(world=3)
    assert attempt.codes() == [REFUSED] * 3, attempt.text()
    said = attempt.rank_text(0)
    assert "on 3 ranks does not divide training.global_batch=16" in said
    assert "Traceback" not in said and not attempt.steps()
    assert unequal(reference.folder, tmp_path / "run") == []


@pytest.mark.soak  # tests/distributed/test_state.py has the ranks
def test_two_one_four_two_ranks(reference, run):
    """Stopped in mid-epoch and taken up on another number of ranks, three times."""
    attempts = []
    for world, samples in ((2, 32), (1, 64), (4, 128), (2, None)):
        # The contrast is among micro_batch x ranks samples: that product must stay.
        settings = (f"engine.micro_batch={BATCH // world}",)
        faults = [] if samples is None else [Fault("forward", SIGTERM, world - 1, samples)]
        attempts.append(run(world, settings=settings, faults=faults))
        expected = STOPPED if faults else 0
        assert attempts[-1].codes() == [expected] * world, attempts[-1].text()
    assert f"written by {4} ranks" in attempts[-1].rank_text(0)
    steps = trajectory(attempts)
    assert positions(steps) == ALL
    assert [len(a.steps()) for a in attempts] == [3, 2, 4, 3]
    pairs = zip(faulty_run.losses(steps), faulty_run.losses(reference.steps()), strict=True)
    loss = max(abs(a - b) for a, b in pairs)
    one, other = faulty_run.state(attempts[-1].folder), faulty_run.state(reference.folder)
    names = [n for n in one if n.startswith(("weights/", "ema-64/"))]
    weight = max((one[n] - other[n]).abs().max().item() for n in names)
    print(f"measured: loss {loss:.1e}, weights {weight:.1e}")
    assert loss < 1e-5 and weight < 1e-4  # as between engines: tests/distributed/test_engine.py
