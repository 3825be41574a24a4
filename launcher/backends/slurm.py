"""Slurm: a batch script that starts `launcher node` once on every node, and requeues what was
stopped.

Ranks are stopped by SIGUSR1 to the step: a TERM to srun kills them at once. The script therefore
traps the TERM that Slurm sends before the time limit and passes it on in that way.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from pydantic import model_validator

from launcher import shell
from launcher.handle import ENDED, Handle, State, Status, marker_before
from launcher.job import JobError, JobSpec
from launcher.plan import Plan, PlanFile
from launcher.secrets import require_schemes, resolve, scheme_of
from launcher.strict import Described, Texts, check_match, check_text

HELP = "submit to Slurm: sbatch and srun, requeued until it is done"

_WORD = re.compile(r"[\w.,:=&|*@\[\]-]*[\w\]]", re.ASCII)
_WAIT_SECONDS = 900  # after the first node has ended; then srun kills the others
_REMEDY = "install Slurm's client commands"
_ELSEWHERE = {
    "image": "give environment: a Python and a folder that every node sees",
    "storage": "the nodes' own file systems are what the run sees; remove it",
}


class Options(Described):
    """What sbatch is told besides the job, in the site's own terms.

    gpu_type: of --gpus-per-node (TYPE:COUNT). max_requeues: how often a run that stopped in order
    (exit code 75) is put back into the queue. setup: shell lines before the run, as they stand
    ("module load cuda").
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gpu_type: str | None = None
    max_requeues: int = 1_000
    setup: Texts = ()

    @model_validator(mode="after")
    def _check(self) -> "Options":
        for field in ("partition", "account", "qos", "constraint", "exclude", "gpu_type"):
            value = getattr(self, field)
            if value is not None:
                check_match(field, value, _WORD, "give the name as the site's documentation has it")
                if value.startswith("-"):
                    raise JobError(f"{field}={value!r} begins with a dash; give a name")
        for line in self.setup:
            check_text("setup", line)
        if self.max_requeues < 0:
            raise JobError(f"max_requeues={self.max_requeues} must be 0 or more")
        return self


def plan(job: JobSpec) -> Plan:
    """The batch script of ``job``, and the sbatch that submits it."""
    job.refuse("slurm", _ELSEWHERE)
    options = job.options("slurm", Options)
    require_schemes(job.secrets, "slurm", ("env", "file"))
    if job.preemptible and not (options.partition or options.qos):
        raise JobError(
            "preemptible=True, but Slurm knows it by partition or QOS only; set "
            "backends.slurm.partition or backends.slurm.qos to the site's preemptible one"
        )
    base = Path(job.environment.folder or ".")
    folder = str(base / job.folder("slurm"))
    script = f"{folder}/job.sbatch"
    command = ["sbatch", "--parsable", "--export=ALL"]
    if job.environment.folder:
        command += ["--chdir", job.environment.folder]
    return Plan(
        backend="slurm",
        name=job.name,
        output=job.output if "://" in job.output else str(base / job.output),
        log=f"{folder}/JOB.log and, of each node, JOB.node-N.log",
        commands=((*command, script),),
        files=(PlanFile(script, _script(job, options)),),
        secrets=tuple(sorted((n, r) for n, r in job.secrets.items() if scheme_of(r) == "env")),
        folder=folder,
    )


def submit(plan: Plan) -> int:
    """0 as soon as the job is queued."""
    values = resolve(dict(plan.secrets))
    plan.write_files()
    before = marker_before(plan.output)
    printed = shell.call(plan.commands[0], values, _REMEDY)
    number = printed.strip().partition(";")[0]  # NUMBER[;CLUSTER]
    if not number.isdigit():
        raise JobError(f"sbatch printed {printed!r} instead of the number of a job")
    Handle("slurm", number, before).save(plan.folder)
    print(f"{plan.name}: Slurm job {number}, logs in {plan.folder}")
    return 0


def status(plan: Plan) -> Status:
    """What the controller says; of a job that it has forgotten, the accounting."""
    number = Handle.load(plan).id
    try:
        text = shell.call(("scontrol", "show", "job", "--oneliner", number), remedy=_REMEDY)
        fields = dict(re.findall(r"(\w+)=(\S*)", text))
        state, code, why = fields["JobState"], fields.get("ExitCode", ""), fields.get("Reason", "")
    except (JobError, KeyError):
        columns = "--format=State,ExitCode,Reason"
        text = shell.call(
            ("sacct", "--jobs", number, "--allocations", "--noheader", "--parsable2", columns),
            remedy=_REMEDY,
        )
        state, code, why = (*text.strip().partition("\n")[0].split("|"), "", "", "")[:3]
    word = state.split()[0] if state.split() else ""  # "CANCELLED by 1000"
    detail = f"job {number}: {state or 'unknown to Slurm'}"
    known = _STATES.get(word, "failed" if word else "unknown")
    return Status(
        known,
        _code(code) if known in ENDED else None,
        detail if why in ("", "None") else f"{detail}, {why}",
    )


def logs(plan: Plan) -> Iterator[str]:
    number = Handle.load(plan).id
    for path in sorted(Path(plan.folder).glob(f"{number}.*log")):
        yield f"==> {path} <=="
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from (line.rstrip("\n") for line in file)


def cancel(plan: Plan) -> None:
    number = Handle.load(plan).id
    Path(plan.folder, f"{number}.cancelled").touch()  # the script asks for it before it requeues
    shell.call(("scancel", number), remedy=_REMEDY)


_STATES: dict[str, State] = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued",
    "SUSPENDED": "queued",
    "STOPPED": "queued",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "RESIZING": "running",
    "COMPLETED": "succeeded",
    "CANCELLED": "cancelled",
}


def _code(text: str) -> int | None:
    """Slurm's CODE:SIGNAL as a shell's exit code."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return (
        None if match is None else int(match[1]) or (128 + int(match[2]) if match[2] != "0" else 0)
    )


def _script(job: JobSpec, options: Options) -> str:
    cores = [] if job.cores_per_node is None else [f"--cpus-per-task={job.cores_per_node}"]
    folder = job.folder("slurm")
    srun = [
        *("srun", "--ntasks-per-node=1", *cores, "--cpu-bind=none"),
        # A node that has saved ends with 75, which must not cut off the others' saving, and rank 0
        # may still send what was tracked. A node sees by itself that another has failed.
        *("--kill-on-bad-exit=0", f"--wait={max(_WAIT_SECONDS, job.grace_seconds)}"),
        *("--export=ALL", "--open-mode=append", f"--output={folder}/%j.node-%t.log"),
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in _directives(job, options, cores)),
            "set -u",
            *(f"export {name}={shlex.quote(value)}" for name, value in job.variables().items()),
            *options.setup,
            _RUN.format(
                folder=folder,
                srun=f"{shlex.join(srun)} \\\n  {shlex.join(job.node_command('slurm'))}",
                retries=job.retries,
                max_requeues=options.max_requeues,
            ),
        ]
    )


def _directives(job: JobSpec, options: Options, cores: list[str]) -> list[str]:
    gpus = job.accelerators_per_node
    given = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": (f"{options.gpu_type}:{gpus}" if options.gpu_type else gpus) or None,
        "mem": job.memory_gib_per_node and f"{job.memory_gib_per_node}G",
        "time": job.time_limit_minutes,
        "signal": job.time_limit_minutes and f"B:TERM@{job.grace_seconds}",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "output": f"{job.folder('slurm')}/%j.log",
        "open-mode": "append",
    }
    # Without a number of cores the job gets whole nodes.
    return ["--requeue", *(cores or ["--exclusive"])] + [
        f"--{name}={value}" for name, value in given.items() if value is not None
    ]


# Exit codes of a run: 0 complete, 75 stopped and saved, 2 a mistake that no retry mends.
_RUN = """\
record={folder}/$SLURM_JOB_ID
interrupted=
pass_on() {{
  interrupted=1
  scancel --signal=USR1 "$SLURM_JOB_ID"
}}
trap pass_on TERM USR1
{srun} &
step=$!
code=
while [ -z "$code" ]; do
  interrupted=
  wait "$step"
  ended=$?
  if [ -z "$interrupted" ]; then code=$ended; fi # else the signal ended `wait`, not the step
done
requeue() {{
  [ ! -e "$record.cancelled" ] || return
  [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ] || return
  echo "launcher: exit code $code, back into the queue"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
}}
case $code in
  0 | 2) ;;
  75) requeue ;;
  *)
    echo "$code" >>"$record.failures"
    if [ "$(wc -l <"$record.failures")" -le {retries} ]; then requeue; fi
    ;;
esac
exit "$code"
"""
