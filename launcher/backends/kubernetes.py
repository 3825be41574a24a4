"""Kubernetes: an Indexed Job behind a headless service, a JobSet, or a Kubeflow TrainJob.

Every pod runs `launcher node`; pod 0 is where the ranks meet. Manifests here, kubectl for the rest.
"""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from launcher import shell
from launcher.backends._manifest import NODE, POD_LABEL, Manifest, Options
from launcher.handle import Handle, Status, marker_before
from launcher.job import JobError, JobSpec
from launcher.plan import Plan, PlanFile
from launcher.secrets import require_schemes

HELP = "run on Kubernetes: an Indexed Job, a JobSet or a Kubeflow TrainJob, through kubectl"

_REMEDY = "install kubectl"


def plan(job: JobSpec) -> Plan:
    """The manifests of ``job``, and the kubectl that creates them.

    Raises:
        JobError: something of the job cannot be had on Kubernetes.
    """
    options = job.options("kubernetes", Options)
    _check(job, options)
    folder = job.folder("kubernetes")
    objects = Manifest(job, options).objects()
    files = [PlanFile(f"{folder}/{o['kind'].lower()}.yaml", _yaml(o)) for o in objects]
    kubectl = _kubectl(options)
    commands = [(*kubectl, "apply", "--filename", file.path) for file in files[:-1]]
    commands.append((*kubectl, "create", "--output", "name", "--filename", files[-1].path))
    return Plan(
        backend="kubernetes",
        name=job.name,
        output=job.output,
        log=f"of the pods with {POD_LABEL[options.kind]}={job.name}",
        commands=tuple(commands),
        files=tuple(files),
        folder=folder,
    )


def _check(job: JobSpec, options: Options) -> None:
    if job.image is None:
        raise JobError("image is not given; build one from the Dockerfile, push it, and name it")
    job.require_lasting_output("kubernetes")
    require_schemes(job.secrets, "kubernetes", ("kubernetes", "file"))
    if job.preemptible and not options.preemptible_nodes:
        raise JobError(
            "preemptible=True, but Kubernetes knows it by the nodes' labels only; set "
            "backends.kubernetes.preemptible_nodes, on GKE {cloud.google.com/gke-spot: 'true'}"
        )
    if options.kind == "trainjob" and job.retries:
        raise JobError(
            f"retries={job.retries} has no meaning for a TrainJob, whose runtime sets them; remove "
            "it, or use backends.kubernetes.kind: jobset"
        )
    if options.kind == "trainjob" and options.priority_class:
        raise JobError(
            f"backends.kubernetes.priority_class={options.priority_class!r} has no meaning for a "
            "TrainJob, whose runtime sets it; remove it"
        )
    middle = "" if options.kind == "job" else f"-{NODE}-0"
    last = f"{job.name}{middle}-{job.nodes - 1}"
    if len(last) > 63 or not job.name[0].isalpha():
        raise JobError(
            f"name={job.name!r} makes no host names such as {last!r} (at most 63 letters, the "
            "first no digit); give another name"
        )


def submit(plan: Plan) -> int:
    """0 as soon as the cluster has accepted the job."""
    plan.write_files()
    before = marker_before(plan.output)
    for command in plan.commands:
        printed = shell.call(command, remedy=_REMEDY)
    kind_and_name = printed.strip()
    Handle("kubernetes", kind_and_name, before).save(plan.folder)
    print(f"{plan.name}: {kind_and_name} created")
    return 0


def status(plan: Plan) -> Status:
    """By the object's conditions; the exit code is that of the first pod that failed."""
    thing = Handle.load(plan).id
    text = shell.call(
        (*_prefix(plan), "get", thing, "--ignore-not-found", "--output", "json"), remedy=_REMEDY
    )
    if not text.strip():
        return Status("cancelled", detail=f"{thing} is no longer in the cluster")
    found = json.loads(text).get("status", {})
    true = {c["type"]: c for c in found.get("conditions") or [] if c.get("status") == "True"}
    for condition in ("Failed", "FailureTarget"):
        if condition in true:
            why = " ".join(true[condition].get(k) or "" for k in ("reason", "message")).strip()
            return Status("failed", _exit_code(plan), f"{thing}: {why}")
    if {"Complete", "Completed"} & set(true):
        return Status("succeeded", 0, thing)
    jobs = found.get("replicatedJobsStatus") or found.get("jobsStatus") or [found]
    running = any(one.get("ready") or one.get("active") for one in jobs)
    return Status("running" if running else "queued", detail=thing)


def _exit_code(plan: Plan) -> int | None:
    text = shell.call((*_prefix(plan), "get", "pods", *_selector(plan), "--output", "json"))
    ends = [
        state["terminated"]
        for pod in json.loads(text)["items"]
        for container in pod.get("status", {}).get("containerStatuses") or []
        if "terminated" in (state := container.get("state", {}))
    ]
    failed = [end for end in ends if end.get("exitCode")]
    return min(failed, key=lambda end: end.get("finishedAt") or "")["exitCode"] if failed else None


def logs(plan: Plan) -> Iterator[str]:
    nodes = "--max-log-requests=10000"
    text = shell.call(
        (*_prefix(plan), "logs", *_selector(plan), "--prefix", "--tail=-1", nodes), remedy=_REMEDY
    )
    yield from text.splitlines()


def cancel(plan: Plan) -> None:
    """Delete the objects; the pods get TERM and their grace period. Their logs go with them."""
    for file in plan.files:
        shell.call(
            (*_prefix(plan), "delete", "--ignore-not-found", "--filename", file.path),
            remedy=_REMEDY,
        )


def _kubectl(options: Options) -> tuple[str, ...]:
    context = ("--context", options.context) if options.context else ()
    return ("kubectl", *context, "--namespace", options.namespace)


def _prefix(plan: Plan) -> tuple[str, ...]:
    command = plan.commands[-1]
    return command[: command.index("create")]


def _selector(plan: Plan) -> tuple[str, str]:
    return ("--selector", plan.log.rpartition(" ")[2])


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000)
