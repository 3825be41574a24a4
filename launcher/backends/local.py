"""This machine: every rank under one `deepspeed` launcher, watched until the end."""

import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import records, supervise
from launcher.handle import Handle, Status
from launcher.job import JobError, JobSpec
from launcher.marker import read_marker
from launcher.plan import Plan
from launcher.secrets import require_schemes, resolve

if TYPE_CHECKING:
    import psutil

HELP = "run on this machine, on its GPUs or on CPU ranks"

_CPU_RANKS = (
    2  # enough to exercise every collective; more ranks than that on one CPU only share its cores
)
# A run that was killed a moment ago still holds its port until the kernel has taken it down.
_PORT_SECONDS = 10.0
# Fields of a job that this backend cannot honour, and what to do instead.
_ELSEWHERE = {
    "image": "it runs what is installed here; remove it, or run this command in the image",
    "environment": "it runs its own Python, in this folder; remove it",
    "storage": "it sees this machine's own folders; remove it",
    "time_limit_minutes": "remove it, and put `timeout` before the command",
    "memory_gib_per_node": "it takes what this machine has; remove it",
    "grace_seconds": f"it grants {supervise.GRACE_SECONDS:.0f} s; remove it",
    "retries": "the same command continues a run; remove it",
    "preemptible": "remove it",
}
_DEVICE_FILES = ("nvidia[0-9]*", "kfd", "dxg", "accel[0-9]*")


@dataclass(frozen=True)
class Host:
    """What a plan depends on besides the job: cores, accelerators, variables already set."""

    cores: int
    accelerators: int
    env: frozenset[str] = frozenset()
    python_path: str = ""

    @classmethod
    def here(cls) -> "Host":
        """This machine, looked at without importing torch."""
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        devices = [path for pattern in _DEVICE_FILES for path in Path("/dev").glob(pattern)]
        return cls(cores, len(devices), frozenset(os.environ), os.environ.get("PYTHONPATH", ""))


def plan(job: JobSpec, host: Host | None = None) -> Plan:
    """The `deepspeed` command for ``job`` on ``host`` (this machine unless given). Writes nothing.

    Raises:
        JobError: the job wants more than one node, or what this machine cannot give.
    """
    if job.nodes != 1:
        raise JobError(
            f"nodes={job.nodes}, but local is one machine; set nodes=1 or use another backend"
        )
    job.refuse("local", _ELSEWHERE)
    require_schemes(job.secrets, "local", ("env", "file"))
    host = host or Host.here()
    ranks = (
        job.ranks_per_node
        or job.accelerators_per_node
        or host.accelerators
        or min(_CPU_RANKS, host.cores)
    )
    env = {"PYTHONPATH": _python_path(host)}
    if "OMP_NUM_THREADS" not in host.env:  # or every rank takes every core
        env["OMP_NUM_THREADS"] = str(max(1, (job.cores_per_node or host.cores) // ranks))
    if not host.accelerators and "DS_ACCELERATOR" not in host.env:
        env["DS_ACCELERATOR"] = "cpu"
    env.update(job.env)
    deepspeed = [
        "deepspeed",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(job.port or _port(job)),
    ]
    deepspeed += ["--no_local_rank", "--log_level", "error", "--module", job.module]
    return Plan(
        backend="local",
        name=job.name,
        output=job.output,
        log=_log(job),
        commands=((*deepspeed, *job.arguments()),),
        env=tuple(sorted(env.items())),
        secrets=tuple(sorted(job.secrets.items())),
        folder=str(Path(_log(job)).parent),
    )


def submit(plan: Plan) -> int:
    """Run ``plan`` to its end and tell the truth about it.

    Returns:
        0 only if rank 0 wrote the run's end marker since the start and every process ended with 0;
        else the exit code of `deepspeed`, or 128 + the signal that stopped the run, or 1.
    Raises:
        JobError: the port is taken, or `deepspeed` is not installed.
    """
    env = {**dict(plan.env), **resolve(dict(plan.secrets))}
    for command in plan.commands:
        _check_port(command)  # before the handle: a run that holds the port keeps its own
    plan.write_files()
    before = read_marker(plan.output)
    handle = Handle("local", _this_process(), before)
    handle.save(plan.folder)
    code = 1
    try:
        code = _run(plan, env, before)
    finally:
        replace(handle, id=f"exit {code}").save(plan.folder)
    return code


def status(plan: Plan) -> Status:
    """Of the `submit` that ran last, in this or another process of this machine."""
    handle = Handle.load(plan)
    word, _, number = handle.id.partition(" ")
    if word == "exit":
        return Status("succeeded" if number == "0" else "failed", int(number))
    if _process(handle) is not None:
        return Status("running", detail=handle.id)
    return Status("failed", 137, f"{handle.id} is gone: it was killed")


def logs(plan: Plan) -> Iterator[str]:
    if Path(plan.log).exists():
        with open(plan.log, encoding="utf-8", errors="replace") as log:
            yield from (line.rstrip("\n") for line in log)


def cancel(plan: Plan) -> None:
    process = _process(Handle.load(plan))
    if process is not None:
        process.send_signal(signal.SIGTERM)  # the supervisor lets the ranks save first


def _this_process() -> str:
    import psutil

    return f"pid {os.getpid()} {psutil.Process().create_time()}"


def _process(handle: Handle) -> "psutil.Process | None":
    """The process that submitted, if it still runs: a process id alone may be another's by now."""
    import psutil

    word, *rest = handle.id.split()
    if word != "pid":
        return None
    try:
        process = psutil.Process(int(rest[0]))
        same = abs(process.create_time() - float(rest[1])) < 0.1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _run(plan: Plan, env: dict[str, str], before: tuple[str, str] | None) -> int:
    outcome = supervise.Outcome(0)
    log = Path(plan.log)
    since = log.stat().st_size if log.exists() else 0
    for command in plan.commands:
        try:
            outcome = supervise.run(_program(command), env, log)
        except FileNotFoundError:
            raise JobError(
                f"program={command[0]!r} is not installed beside {sys.executable}; run `make env`"
            ) from None
        if outcome.code or outcome.stopped_by:
            break
    after = read_marker(plan.output)
    return _verdict(plan, outcome, since, finished=after is not None and after != before)


def _verdict(plan: Plan, outcome: supervise.Outcome, since: int, finished: bool) -> int:
    if finished and outcome.code == 0:
        return 0
    if finished:
        said, code = f"wrote its end marker, but a process exited with {outcome.code}", outcome.code
    elif outcome.stopped_by is not None:
        said = f"was stopped by {outcome.stopped_by.name}; the same command continues it"
        code = outcome.code or 128 + outcome.stopped_by
    else:
        said = f"ended with exit code {outcome.code} and without the end marker in {plan.output}"
        code = outcome.code or 1
    first = records.first_traceback(Path(plan.log), since)
    shown = "first traceback in" if first else "end of"
    print(f"run {plan.name!r} {said}. The {shown} {plan.log}:", file=sys.stderr)
    print(first or supervise.tail(Path(plan.log)), file=sys.stderr)
    return code


def _program(command: tuple[str, ...]) -> tuple[str, ...]:
    """``command`` with `deepspeed` as a module of this Python.

    pip's script of that name holds the environment's path in its first line, which the system
    cannot read where the path has a space, is long, or has been moved.
    """
    if command[0] != "deepspeed":
        return command
    if find_spec("deepspeed") is None:
        raise JobError(f"program='deepspeed' is not installed for {sys.executable}; run `make env`")
    return (sys.executable, "-m", "deepspeed.launcher.runner", *command[1:])


def _port(job: JobSpec) -> int:
    # Two runs on one machine must not meet; the same run keeps its port, so its plan is stable.
    digest = hashlib.sha256(f"{job.name}\n{job.output}".encode()).digest()
    return 20_000 + int.from_bytes(digest[:4], "big") % 10_000


def _check_port(command: tuple[str, ...]) -> None:
    if "--master_port" not in command:
        return
    port = int(command[command.index("--master_port") + 1])
    give_up = time.monotonic() + _PORT_SECONDS
    while not _is_free(port):
        if time.monotonic() > give_up:
            raise JobError(
                f"port={port} is in use here; is this run already going? Else pass --port"
            )
        time.sleep(0.1)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _log(job: JobSpec) -> str:
    # A log is appended to while it is read, which an object store cannot do.
    folder = Path("runs", job.name) if "://" in job.output else Path(job.output)
    return str(folder / "launcher.log")


def _python_path(host: Host) -> str:
    checkout = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(part for part in (checkout, host.python_path) if part)
