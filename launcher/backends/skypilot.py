"""SkyPilot: a managed job on whatever cloud it finds, by default on spot machines it replaces.

The task is a YAML file; the `sky` command does the rest, and moves the job when it is preempted.
"""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import model_validator

from launcher import shell
from launcher.handle import Handle, State, Status, marker_before
from launcher.job import JobError, JobSpec, Mount
from launcher.plan import Plan, PlanFile
from launcher.secrets import require_schemes, resolve, scheme_of
from launcher.strict import Described, Texts, check_match, check_path, check_text

HELP = "run as a managed job of SkyPilot, on spot machines of any cloud"

_NAME = re.compile(r"[a-z0-9]+(-{1,2}[a-z0-9]+)*")
_WORD = re.compile(r"[A-Za-z0-9][\w.+*/-]*", re.ASCII)
_REMEDY = "pip install skypilot into an environment of its own, and put its `sky` on PATH"


class Options(Described):
    """What SkyPilot needs to know besides the job.

    accelerator: its name for them, such as A100-80GB. infra: where, such as aws/eu-central-1 or
    gcp; None lets it choose. image_folder: of the code in the image (WORKDIR of the Dockerfile).
    setup: shell lines that prepare a machine, where no image does.
    """

    accelerator: str | None = None
    infra: str | None = None
    disk_gib: int | None = None
    image_folder: str = "/work"
    setup: Texts = ()

    @model_validator(mode="after")
    def _check(self) -> "Options":
        for field in ("accelerator", "infra"):
            value = getattr(self, field)
            if value is not None:
                check_match(field, value, _WORD, "give the name as `sky show-gpus` has it")
        check_path("image_folder", self.image_folder)
        for line in self.setup:
            check_text("setup", line)
        return self


def plan(job: JobSpec) -> Plan:
    """The task of ``job``, and the `sky jobs launch` that starts it.

    Raises:
        JobError: something of the job cannot be had through SkyPilot.
    """
    options = job.options("skypilot", Options)
    job.require_lasting_output("skypilot")
    require_schemes(job.secrets, "skypilot", ("env", "file"))
    check_match("name", job.name, _NAME, "use no more than two dashes in a row for SkyPilot")
    if job.accelerators_per_node and not options.accelerator:
        raise JobError(
            f"accelerators_per_node={job.accelerators_per_node}, but SkyPilot asks for them by "
            "name; set backends.skypilot.accelerator, such as A100-80GB"
        )
    secrets = {n: r for n, r in sorted(job.secrets.items()) if scheme_of(r) == "env"}
    path = f"{job.folder('skypilot')}/task.yaml"
    task = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": _resources(job, options),
        # Without an image the folder goes to every machine.
        "workdir": None if job.image else job.environment.folder or ".",
        "file_mounts": {mount.path: _mount(mount) for mount in job.storage} or None,
        "secrets": dict.fromkeys(secrets),  # the values come with --secret
        "setup": "\n".join(options.setup) or None,
        "run": _run(job, options),
    }
    text = yaml.safe_dump(
        {name: value for name, value in task.items() if value},
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
    )
    launch = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name]
    launch += [word for name in secrets for word in ("--secret", name)]
    return Plan(
        backend="skypilot",
        name=job.name,
        output=job.output,
        log=f"sky jobs logs --name {job.name}",
        commands=((*launch, path),),
        files=(PlanFile(path, text),),
        secrets=tuple(secrets.items()),
        folder=job.folder("skypilot"),
    )


def _resources(job: JobSpec, options: Options) -> dict[str, Any]:
    count = job.accelerators_per_node
    resources = {
        "infra": options.infra,
        "accelerators": f"{options.accelerator}:{count}" if count else None,
        "cpus": job.cores_per_node and f"{job.cores_per_node}+",
        "memory": job.memory_gib_per_node and f"{job.memory_gib_per_node}+",
        "disk_size": options.disk_gib,
        "image_id": job.image and f"docker:{job.image}",
        "use_spot": job.preemptible,
        # 75: stopped and saved, to be continued. Being preempted is no restart on error.
        "job_recovery": {
            "max_restarts_on_errors": job.retries,
            "recover_on_exit_codes": [75],
        },
    }
    return {name: value for name, value in resources.items() if value is not None}


def _mount(mount: Mount) -> dict[str, str]:
    if mount.read_only:
        raise JobError(
            f"storage.read_only=True of {mount.path!r} is not known to SkyPilot; remove it"
        )
    if not mount.source.startswith(("s3://", "gs://")):
        raise JobError(
            f"storage.source={mount.source!r} cannot be mounted by skypilot; give s3://BUCKET or "
            "gs://BUCKET, or use the URL in the run's config"
        )
    return {"source": mount.source, "mode": "MOUNT"}


def _run(job: JobSpec, options: Options) -> str:
    """The script of a node. Variables stand here, quoted for bash, and not under `envs`, so that
    nothing else reads them before."""
    limit = ""
    if job.time_limit_minutes:
        seconds = max(1, job.time_limit_minutes * 60 - job.grace_seconds)
        limit = f"timeout --preserve-status --kill-after={job.grace_seconds} {seconds} "
    return "\n".join(
        [
            *([f"cd {shlex.quote(options.image_folder)}"] if job.image else []),
            *(f"export {name}={shlex.quote(value)}" for name, value in job.variables().items()),
            f"exec {limit}{shlex.join(job.node_command('skypilot'))}",
            "",
        ]
    )


def submit(plan: Plan) -> int:
    """0 as soon as SkyPilot has taken the job."""
    values = resolve(dict(plan.secrets))
    plan.write_files()
    before = marker_before(plan.output)
    print(shell.call(plan.commands[0], values, _REMEDY).rstrip())
    Handle("skypilot", plan.name, before).save(plan.folder)
    return 0


def status(plan: Plan) -> Status:
    """Of the newest job of this name."""
    name = Handle.load(plan).id
    text = shell.call(("sky", "jobs", "queue", "--output", "json"), remedy=_REMEDY)
    jobs = [job for job in json.loads(text) if job.get("job_name") == name]
    if not jobs:
        return Status("unknown", detail=f"SkyPilot knows no job {name}")
    newest = max(jobs, key=lambda job: int(job["job_id"]))
    word = str(newest.get("status")).rpartition(".")[2]
    why = newest.get("failure_reason")
    return Status(_state(word), detail=f"job {newest['job_id']}: {word}{f', {why}' if why else ''}")


def _state(word: str) -> State:
    if word.startswith("FAILED"):
        return "failed"
    known: dict[str, State] = {
        "PENDING": "queued",
        "SUBMITTED": "queued",
        "STARTING": "queued",
        "RECOVERING": "queued",
        "RUNNING": "running",
        "WINDING_DOWN": "running",
        "CANCELLING": "running",
        "CANCELLED": "cancelled",
        "SUCCEEDED": "succeeded",
    }
    return known.get(word, "unknown")


def logs(plan: Plan) -> Iterator[str]:
    name = Handle.load(plan).id
    command = ("sky", "jobs", "logs", "--no-follow", "--name", name)
    yield from shell.call(command, remedy=_REMEDY).splitlines()


def cancel(plan: Plan) -> None:
    name = Handle.load(plan).id
    shell.call(("sky", "jobs", "cancel", "--yes", "--name", name), remedy=_REMEDY)
