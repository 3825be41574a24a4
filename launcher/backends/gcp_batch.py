"""Google Cloud Batch: one task on each VM of a task group, through google-cloud-batch.

Batch gives every task its number and the main node's host name.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import model_validator

from launcher import shell
from launcher.handle import Handle, State, Status, marker_before
from launcher.job import JobError, JobSpec
from launcher.plan import Call, Plan
from launcher.secrets import require_schemes, scheme_of
from launcher.strict import Described, check_match

HELP = "run on Google Cloud Batch: a task on each VM, through google-cloud-batch"

_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")
_WORD = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_ACCOUNT = re.compile(r"[a-z0-9._-]+@[a-z0-9.-]+")
_NETWORK = re.compile(r"[a-z0-9/._-]+")
_PREEMPTED = 50_001  # Batch's own exit code
_STATES: dict[str, State] = {
    "QUEUED": "queued",
    "SCHEDULED": "queued",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "CANCELLATION_IN_PROGRESS": "running",
    "CANCELLED": "cancelled",
    "DELETION_IN_PROGRESS": "cancelled",
}


class Options(Described):
    """What Batch needs to know besides the job.

    project, location: where it runs, such as europe-west4. machine_type: of the VMs.
    accelerator_type: as `gcloud compute accelerator-types list` has it, where the machine type does
        not bring them along. service_account: what the run may do, and read as secrets.
    network, subnetwork: projects/P/global/networks/N and projects/P/regions/R/subnetworks/S.
    """

    project: str
    location: str
    machine_type: str
    accelerator_type: str | None = None
    service_account: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    boot_disk_gib: int = 200
    shm_gib: int = 8

    @model_validator(mode="after")
    def _check(self) -> "Options":
        check_match("project", self.project, _PROJECT, "give the project's id")
        for field in ("location", "machine_type", "accelerator_type"):
            value = getattr(self, field)
            if value is not None:
                check_match(field, value, _WORD, "give the name that `gcloud compute` lists")
        if self.service_account is not None:
            check_match("service_account", self.service_account, _ACCOUNT, "give its address")
        for field in ("network", "subnetwork"):
            value = getattr(self, field)
            if value is not None:
                check_match(field, value, _NETWORK, "give projects/PROJECT/...")
        for field in ("boot_disk_gib", "shm_gib"):
            if not 1 <= getattr(self, field) <= 65_536:
                raise JobError(f"{field}={getattr(self, field)} must be from 1 to 65536")
        return self


def plan(job: JobSpec) -> Plan:
    """The request that creates ``job``.

    Raises:
        JobError: something of the job cannot be had on Google Cloud Batch.
    """
    options = job.options("gcp_batch", Options)
    _check(job, options)
    parent = f"projects/{options.project}/locations/{options.location}"
    task = {
        "runnables": [_runnable(job, options)],
        "computeResource": _resources(job),
        "maxRetryCount": job.retries,
        "lifecyclePolicies": [
            # The first that fits counts: a mistake, which no retry mends; the rest.
            {"action": "FAIL_TASK", "actionCondition": {"exitCodes": [2]}},
            {"action": "RETRY_TASK", "actionCondition": {"exitCodes": [75, _PREEMPTED]}},
        ],
        "volumes": [_volume(m.source, m.path) for m in job.storage if m.of("host") is None],
    }
    if job.time_limit_minutes:
        task["maxRunDuration"] = f"{job.time_limit_minutes * 60}s"
    group = {
        "taskCount": job.nodes,
        "parallelism": job.nodes,
        "taskCountPerNode": 1,
        "requireHostsFile": True,
        "taskSpec": {name: value for name, value in task.items() if value != []},
    }
    body = {
        "taskGroups": [group],
        "allocationPolicy": _allocation(job, options),
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
        "labels": {"launcher": "diffdis-pretrain", "name": job.name},
    }
    return Plan(
        backend="gcp_batch",
        name=job.name,
        output=job.output,
        log=f"Cloud Logging of project {options.project}",
        calls=(Call.of("batch.create_job", {"parent": parent, "job_id": job.name, "job": body}),),
        folder=job.folder("gcp_batch"),
    )


def _check(job: JobSpec, options: Options) -> None:
    if job.image is None:
        raise JobError("image is not given; build one from the Dockerfile, push it, and name it")
    job.refuse("gcp_batch", {"grace_seconds": "Batch has a grace of its own; remove it"})
    job.require_lasting_output("gcp_batch")
    require_schemes(job.secrets, "gcp_batch", ("gcp", "file"))
    if not job.name[0].isalpha():
        raise JobError(f"name={job.name!r} must begin with a letter here; give another name")
    if options.accelerator_type and not job.accelerators_per_node:
        raise JobError(
            f"backends.gcp_batch.accelerator_type={options.accelerator_type!r}, but "
            "accelerators_per_node is not given; give their number"
        )


def _runnable(job: JobSpec, options: Options) -> dict[str, Any]:
    entrypoint, *words = job.node_command("gcp_batch")
    container: dict[str, Any] = {
        "imageUri": job.image,
        "entrypoint": entrypoint,
        "commands": words,
        # The VMs' own network, which the main node's host name is of.
        "options": f"--network=host --shm-size={options.shm_gib}g --ulimit=memlock=-1",
    }
    volumes = [
        f"{mount.of('host') or mount.path}:{mount.path}:{'ro' if mount.read_only else 'rw'}"
        for mount in job.storage
    ]
    if volumes:
        container["volumes"] = volumes
    environment: dict[str, Any] = {"variables": job.variables()}
    secrets = {
        name: reference.partition(":")[2]
        for name, reference in sorted(job.secrets.items())
        if scheme_of(reference) == "gcp"
    }
    if secrets:
        environment["secretVariables"] = secrets
    return {"container": container, "environment": environment}


def _resources(job: JobSpec) -> dict[str, Any]:
    """Of a task, so that one fills a VM. What is not given Batch takes from the machine type."""
    cores, memory = job.cores_per_node, job.memory_gib_per_node
    return {
        **({"cpuMilli": 1000 * cores} if cores else {}),
        **({"memoryMib": 1024 * memory} if memory else {}),
    }


def _allocation(job: JobSpec, options: Options) -> dict[str, Any]:
    policy: dict[str, Any] = {
        "machineType": options.machine_type,
        "provisioningModel": "SPOT" if job.preemptible else "STANDARD",
        "bootDisk": {"sizeGb": options.boot_disk_gib},
    }
    if options.accelerator_type:
        policy["accelerators"] = [
            {"type": options.accelerator_type, "count": job.accelerators_per_node}
        ]
    instance: dict[str, Any] = {"policy": policy}
    if job.accelerators_per_node:
        instance["installGpuDrivers"] = True
    allocation: dict[str, Any] = {"instances": [instance]}
    if options.service_account:
        allocation["serviceAccount"] = {"email": options.service_account}
    if options.network or options.subnetwork:
        network = {"network": options.network, "subnetwork": options.subnetwork}
        allocation["network"] = {
            "networkInterfaces": [{name: value for name, value in network.items() if value}]
        }
    return allocation


def _volume(source: str, path: str) -> dict[str, Any]:
    kind, _, rest = source.partition(":")
    if kind == "gs":
        return {"gcs": {"remotePath": rest.removeprefix("//")}, "mountPath": path}
    if kind == "nfs":
        server, _, remote = rest.partition(":")
        return {"nfs": {"server": server, "remotePath": remote}, "mountPath": path}
    raise JobError(
        f"storage.source={source!r} cannot be mounted on gcp_batch; give gs://BUCKET, "
        "nfs:SERVER:/PATH or host:/PATH, or use the URL in the run's config"
    )


def submit(plan: Plan) -> int:
    """0 as soon as Batch has accepted the job."""
    client = _client()
    from google.cloud import batch_v1

    before = marker_before(plan.output)
    request = plan.calls[0].arguments()
    job = batch_v1.Job.from_json(json.dumps(request["job"]), ignore_unknown_fields=False)
    made = _ask("create_job", client, parent=request["parent"], job_id=request["job_id"], job=job)
    Handle("gcp_batch", made.name, before).save(plan.folder)
    print(f"{plan.name}: Google Cloud Batch job {made.name}")
    return 0


def status(plan: Plan) -> Status:
    """What Batch says; the exit code is the first that a task ended with."""
    name = Handle.load(plan).id
    found = _ask("get_job", name=name).status
    state = _STATES.get(found.state.name, "unknown")
    events = "; ".join(event.description for event in list(found.status_events)[-1:])
    detail = f"{name}: {found.state.name}{f', {events}' if events else ''}"
    if state not in ("failed", "succeeded"):
        return Status(state, detail=detail)
    codes = [
        event.task_execution.exit_code
        for task in _ask("list_tasks", parent=f"{name}/taskGroups/group0")
        for event in task.status.status_events
        if event.task_execution.exit_code
    ]
    return Status(state, codes[0] if codes and state == "failed" else None, detail)


def logs(plan: Plan) -> Iterator[str]:
    """Through the gcloud command, which is installed wherever its credentials are."""
    name = Handle.load(plan).id
    uid, project = _ask("get_job", name=name).uid, name.split("/")[1]
    words = ("--project", project, "--order=asc", "--format=value(labels.task_id,textPayload)")
    text = shell.call(
        ("gcloud", "logging", "read", f'labels.job_uid="{uid}"', *words),
        remedy="install the Google Cloud SDK",
    )
    yield from text.splitlines()


def cancel(plan: Plan) -> None:
    _ask("cancel_job", name=Handle.load(plan).id)


def _client() -> Any:
    try:
        from google.cloud import batch_v1
    except ImportError:
        raise JobError(
            "package='google-cloud-batch' is not installed; "
            "run: pip install --requirement requirements-cloud.txt"
        ) from None
    from google.auth.exceptions import GoogleAuthError

    try:
        return batch_v1.BatchServiceClient()
    except GoogleAuthError as error:
        raise JobError(
            f"Google's credentials are not found ({error}); "
            "run: gcloud auth application-default login"
        ) from None


def _ask(method: str, client: Any = None, **request: Any) -> Any:
    client = client or _client()
    from google.api_core.exceptions import Conflict, GoogleAPIError

    try:
        return getattr(client, method)(request)
    except Conflict:
        raise JobError(
            f"name={request.get('job_id')!r} is taken by an earlier job, which Batch keeps for 60 "
            "days; pass another --name (the run goes on where its output folder stands)"
        ) from None
    except GoogleAPIError as error:
        raise JobError(f"Google Cloud Batch refused {method}: {error}") from None
