"""Machines that ssh reaches: `deepspeed` over a hostfile, started again where a host is lost.

How it is run is in `launcher.attempts`; here are the plan and the verbs.
"""

import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from pydantic import Strict

from launcher import records, remote, secrets
from launcher.attempts import UNREACHABLE_EXIT_CODE, Attempts, variables
from launcher.handle import Handle, Status, marker_before
from launcher.job import JobSpec
from launcher.launch import Launch
from launcher.plan import Plan, PlanFile
from launcher.preflight import Finding, check, render
from launcher.strict import Described, JobError

HELP = "run on hosts that ssh reaches, listed in a file"

_LAUNCHERS = ("pdsh", "openmpi", "mpich")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")
_LINE = re.compile(r"(\S+)(?:\s+slots\s*=\s*(\d+))?")
# deepspeed joins its command line with spaces, and a shell on each host takes it apart again.
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_ASK_SECONDS = 60.0
# Fields of a job that this backend cannot honour, and what to do instead.
_ELSEWHERE = {
    "image": "it starts no container; give environment",
    "storage": "it sees what the hosts have mounted; remove it",
    "time_limit_minutes": "use `timeout` around the command",
    "preemptible": "remove it; min_nodes in backends.hostfile allows for lost hosts",
}


class Options(Described):
    """`backends.hostfile` of a job.

    hosts: a file with a host a line (`node1 slots=8`), as deepspeed has it, or a list of them.
    launcher: pdsh, openmpi or mpich: what deepspeed starts the ranks with.
    min_nodes: go on with that many where hosts are lost; None wants all of them.
    ssh_port: None leaves it to ssh. main_address: of the first host, as the others reach it.
    silent_seconds: after which a rank without a heartbeat is lost.
    backoff_seconds: before the first restart; it doubles.
    preflight: look at the hosts before the first attempt (`launcher.preflight`), at most 90 s.
    """

    hosts: str | Annotated[tuple[str, ...], Strict(False)] = "/job/hostfile"
    launcher: str = "pdsh"
    min_nodes: int | None = None
    ssh_port: int | None = None
    main_address: str | None = None
    silent_seconds: int = 120
    backoff_seconds: int = 5
    preflight: bool = True


def plan(job: JobSpec) -> Plan:
    """Files and the `deepspeed` command for ``job``. Reads the hostfile; writes nothing.

    Raises:
        JobError: the hosts are too few or cannot be read, or a name would not survive a shell.
    """
    options = job.options("hostfile", Options)
    launch = _launch(job, options)
    hosts = list(launch.hosts)
    ssh = " ".join(remote.SSH_OPTIONS)
    return Plan(
        backend="hostfile",
        name=job.name,
        output=job.output,
        log=f"{launch.folder}/launcher.log",
        folder=launch.folder,
        commands=(launch.command(hosts),),
        # A file of that name would go, value by value, onto every command line.
        env=(
            ("DS_ACCELERATOR", "cpu"),  # of deepspeed's runner here, not of the ranks
            ("DS_ENV_FILE", ".no-deepspeed-env"),
            ("PDSH_SSH_ARGS_APPEND", ssh),
        ),
        files=(
            PlanFile(f"{launch.folder}/hostfile", launch.hostfile(hosts)),
            PlanFile(f"{launch.folder}/launch.json", json.dumps(asdict(launch), indent=2) + "\n"),
        ),
        secrets=tuple(sorted(job.secrets.items())),
    )


def submit(plan: Plan) -> int:
    """Run ``plan`` to its end, and tell the truth about it.

    Returns:
        0 only if rank 0 wrote the run's end marker since the start and every rank ended with 0; 75
        if a signal stopped the run and its state was saved; 69 if hosts cannot be reached; else
        the exit code of the rank that failed first.
    """
    launch = _read(plan)
    values = secrets.resolve(dict(plan.secrets))
    plan.write_files()
    handle = Handle("hostfile", _this_process(), marker_before(plan.output))
    handle.save(plan.folder)
    attempts = Attempts(plan, launch, values)
    code = 1
    try:
        unfit = launch.options["preflight"] and _unfit(launch, attempts.env)
        code = UNREACHABLE_EXIT_CODE if unfit else attempts.run()
    finally:
        replace(handle, id=f"exit {code}").save(plan.folder)
    return code


def preflight(plan: Plan) -> int:
    """Look at the hosts and start nothing; 0 if all of them can run the job."""
    launch = _read(plan)
    findings = _look(launch, variables(launch, secrets.resolve(dict(plan.secrets))))
    return int(any(finding.bad for finding in findings))


def _look(launch: Launch, env: dict[str, str]) -> list[Finding]:
    began = time.monotonic()
    findings = check(launch, env)
    print(render(launch, findings, time.monotonic() - began), file=sys.stderr, flush=True)
    return findings


def _unfit(launch: Launch, env: dict[str, str]) -> bool:
    """Whether too few hosts can run the job. Attempts leave out those that cannot be reached; what
    else is wrong with one host would end them all."""
    least = launch.options["min_nodes"] or len(launch.hosts)
    findings = _look(launch, env)
    away = {f.host for f in findings if f.check == "reach"}
    wrong = {f.host for f in findings if f.bad} - away
    return bool(wrong) or len(launch.hosts) - len(away) < least


def status(plan: Plan) -> Status:
    """Of the `submit` that ran last; the hosts are not asked."""
    handle = Handle.load(plan)
    word, _, number = handle.id.partition(" ")
    if word == "exit":
        return Status("succeeded" if number == "0" else "failed", int(number))
    ranks = records.folder(plan.output)
    attempt = records.current(ranks)
    detail = f"attempt {attempt}, {len(records.ends(ranks, attempt))} ranks have ended"
    if _is_here(handle) and _process(handle) is None:
        return Status("failed", 137, f"its launcher ({handle.id}) was killed; {detail}")
    return Status("running", detail=detail)


def logs(plan: Plan) -> Iterator[str]:
    """What each rank of the last attempt has printed, rank by rank."""
    ranks = records.folder(_read(plan).output)
    attempt = records.current(ranks)
    for path in sorted(ranks.glob(f"{attempt}/[0-9]*.log")):
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                yield f"[rank {int(path.stem)}] {line.rstrip()}"


def cancel(plan: Plan) -> None:
    """Ask the launcher to stop, which lets the ranks save; the ranks themselves if it is gone."""
    handle = Handle.load(plan)
    if handle.id.startswith("exit "):
        return
    process = _process(handle)
    if process is not None:
        os.kill(process.pid, signal.SIGTERM)
        return
    launch = _read(plan)
    request = {"do": "signal", "ranks": str(records.folder(plan.output)), "number": 15}
    remote.ask(launch.reach, dict.fromkeys(launch.hosts, request), _ASK_SECONDS)


def _this_process() -> str:
    process = records.Process.of(os.getpid())
    return f"{os.uname().nodename} {os.getpid()} {process.ticks if process else 0}"


def _is_here(handle: Handle) -> bool:
    return handle.id.split()[0] == os.uname().nodename


def _process(handle: Handle) -> records.Process | None:
    """The process that submitted, if it still runs and does so on this machine."""
    _, pid, ticks = handle.id.split()
    found = records.Process.of(int(pid)) if _is_here(handle) else None
    return found if found is not None and found.ticks == int(ticks) else None


def _launch(job: JobSpec, options: Options) -> Launch:
    if options.launcher not in _LAUNCHERS:
        raise JobError(
            f"backends.hostfile.launcher={options.launcher!r} must be one of "
            f"{', '.join(_LAUNCHERS)}"
        )
    job.refuse("hostfile", _ELSEWHERE)
    secrets.require_schemes(job.secrets, "hostfile", ("env", "file"))
    hosts = _hosts(options.hosts, job)
    code = str(Path(job.environment.folder or ".").absolute())
    python = sys.executable if job.environment.python == "python" else job.environment.python
    for name, value in (("environment.folder", code), ("environment.python", python)):
        if not _PLAIN.fullmatch(value):
            raise JobError(
                f"{name}={value!r} holds characters that deepspeed leaves to a shell; "
                "use a path of letters, digits, dots, dashes and slashes"
            )
    if Path(code) != Path.cwd() and "://" not in job.output and not Path(job.output).is_absolute():
        raise JobError(
            f"output={job.output!r} would be one folder here and another in {code}; "
            "give the whole path"
        )
    if options.main_address is not None and not _HOST.fullmatch(options.main_address):
        raise JobError(
            f"backends.hostfile.main_address={options.main_address!r} is no host name or address"
        )
    if options.min_nodes is not None and not 1 <= options.min_nodes <= len(hosts):
        raise JobError(
            f"backends.hostfile.min_nodes={options.min_nodes} must be from 1 to {len(hosts)}"
        )
    digest = hashlib.sha256(f"{job.name}\n{job.output}".encode()).digest()
    return Launch(
        name=job.name,
        config=job.config,
        output=job.output,
        folder=job.folder("hostfile"),
        python=python,
        code=code,
        hosts=hosts,
        argv=(python, "-u", "-m", job.module, *job.arguments()),
        env={"PYTHONPATH": code, **job.env},
        options=options.model_dump(),
        port=job.port or 20_000 + int.from_bytes(digest[:4], "big") % 10_000,
        retries=job.retries,
        grace_seconds=job.grace_seconds,
    )


def _hosts(given: str | tuple[str, ...], job: JobSpec) -> dict[str, int]:
    """The first ``job.nodes`` hosts, with the ranks of each."""
    field = "backends.hostfile.hosts"
    lines = given if isinstance(given, tuple) else _lines(given, field)
    found: dict[str, int] = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        match = _LINE.fullmatch(line)
        if match is None or not _HOST.fullmatch(match[1]) or match[1] in found:
            raise JobError(f"{field}: {line!r} must be a new host's name, as in `node1 slots=8`")
        found[match[1]] = job.ranks_per_node or job.accelerators_per_node or int(match[2] or 1)
    if len(found) < job.nodes or min(found.values()) < 1:
        raise JobError(f"nodes={job.nodes}, but {field} lists {len(found)} hosts")
    return dict(list(found.items())[: job.nodes])


def _lines(path: str, field: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(
            f"{field}={path!r} cannot be read ({error}); write a host a line, such as "
            "`node1 slots=8`, or give a list of them"
        ) from None


def _read(plan: Plan) -> Launch:
    (text,) = (f.text for f in plan.files if f.path.endswith("/launch.json"))
    return Launch.parse(text)
