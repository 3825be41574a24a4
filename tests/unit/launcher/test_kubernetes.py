"""The Kubernetes backend: manifests by the projects' own types, and kubectl's answers.

No cluster can be had here: admission, scheduling and DNS are not tested.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.backends import kubernetes
from launcher.handle import Handle, Status
from launcher.job import JobError
from tests.support.jobs import job
from tests.support.programs import Programs, programs

__all__ = ["programs"]  # the fixture
VERSION = "1.34"  # of Kubernetes, whose schema is held against the manifests
SPOT = {"cloud.google.com/gke-spot": "true"}
FULL: dict[str, Any] = {
    "nodes": 3,
    "accelerators_per_node": 8,
    "cores_per_node": 96,
    "memory_gib_per_node": 900,
    "time_limit_minutes": 60,
    "preemptible": True,
    "port": 23_456,
    "env": {"A": "$(B)"},
    "secrets": {"HF_TOKEN": "kubernetes:hub/token", "OTHER": "file:/run/other"},
    "storage": [
        {"source": "pvc:data", "path": "/data", "read_only": True},
        {"source": "nfs:server.example.com:/export", "path": "/nfs"},
        {"source": "host:/scratch", "path": "/scratch"},
    ],
}
OPTIONS: dict[str, Any] = {
    "namespace": "training",
    "context": "prod",
    "service_account": "trainer",
    "image_pull_secret": "registry",
    "node_selector": {"pool": "a100"},
    "preemptible_nodes": SPOT,
    "priority_class": "high",
    "queue": "gpus",
}


def objects(kind: str, full: bool) -> list[dict[str, Any]]:
    fields = {**FULL, "retries": 0 if kind == "trainjob" else 2} if full else {}
    options = {**(OPTIONS if full else {}), "kind": kind}
    if kind == "trainjob":
        options.pop("priority_class", None)
    plan = kubernetes.plan(job("kubernetes", **fields, backends={"kubernetes": options}))
    return [yaml.safe_load(file.text) for file in plan.files]


def wrong(manifest: dict[str, Any]) -> str:
    """What Kubernetes' own schema, with no unknown field allowed, says of it; "" if nothing."""
    validate = importlib.import_module("kubernetes_validate")
    try:
        validate.validate(manifest, VERSION, strict=True)
    except validate.ValidationError as error:
        return str(error.message)
    return ""


def unknown(manifest: dict[str, Any]) -> str:
    """What the types that the Kubeflow Trainer publishes (its own, and JobSet's) say of it.

    They ignore fields that they do not know, so what goes in must come out again.
    """
    models = importlib.import_module("kubeflow_trainer_api.models")
    kinds = {"JobSet": models.JobsetV1alpha2JobSet, "TrainJob": models.TrainerV1alpha1TrainJob}
    try:
        made = kinds[manifest["kind"]].from_dict(manifest)
    except ValueError as error:
        return str(error)
    return _difference(manifest, json.loads(made.to_json()))


def _difference(given: Any, kept: Any, where: str = "") -> str:
    if isinstance(given, dict) and isinstance(kept, dict):
        found = [_difference(v, kept.get(k), f"{where}.{k}") for k, v in given.items()]
        return "; ".join(filter(None, found))
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return "; ".join(filter(None, (_difference(*pair, f"{where}[{i}]") for i, pair in pairs)))
    return "" if given == kept else f"{where}: {given!r} became {kept!r}"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_jobs_by_kubernetes_own_schema(kind: str, full: bool) -> None:
    """The service, the Job, and the Job within a JobSet."""
    for manifest in objects(kind, full):
        if manifest["kind"] == "JobSet":
            (replicated,) = manifest["spec"]["replicatedJobs"]
            inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
            manifest = {**inner, "spec": replicated["template"]["spec"]}
        assert wrong(manifest) == ""


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_jobsets_and_trainjobs_by_their_projects_types(kind: str, full: bool) -> None:
    (manifest,) = objects(kind, full)
    assert unknown(manifest) == ""


@pytest.mark.parametrize("full", [False, True])
def test_the_pod_of_a_trainjob_by_kubernetes_own_schema(full: bool) -> None:
    """The trainer and the patch, put together as the runtime does."""
    (manifest,) = objects("trainjob", full)
    trainer = manifest["spec"]["trainer"]
    (patch,) = manifest["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    container = {k: trainer[k] for k in ("image", "command", "env") if k in trainer}
    if "resourcesPerNode" in trainer:
        container["resources"] = trainer["resourcesPerNode"]
    spec = {**pod, "containers": [{**pod["containers"][0], **container}]}
    assert wrong({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}) == ""


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("job", ("spec", "completons"), 2),
        ("job", ("spec", "completions"), "2"),
        ("job", ("spec", "template", "spec", "restartPolicy"), 1),
        ("jobset", ("spec", "failurPolicy"), {}),
        ("jobset", ("spec", "failurePolicy", "maxRestarts"), "2"),
        ("jobset", ("spec", "network", "subdomian"), "x"),
        ("trainjob", ("spec", "trainer", "numNodes"), "2"),
        ("trainjob", ("spec", "podTemplateOverrides"), []),
        ("trainjob", ("spec", "runtimeRef"), {}),
    ],
)
def test_the_checks_can_fail(kind: str, path: tuple[str, ...], value: Any) -> None:
    manifest = objects(kind, full=True)[-1]
    node = manifest
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert wrong(manifest) if kind == "job" else unknown(manifest)


def test_pods_meet_at_the_first() -> None:
    """The names that the headless service, and JobSet's, publish."""
    service, made = objects("job", full=True)
    pod = made["spec"]["template"]["spec"]
    env = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    assert env["MASTER_ADDR"] == "contract-0.contract"  # POD.SERVICE
    assert service["metadata"]["name"] == pod["subdomain"] == "contract"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": made["metadata"]["name"]}
    assert env["MASTER_PORT"] == str(service["spec"]["ports"][0]["port"]) == "23456"
    assert env["NNODES"] == "3" == str(made["spec"]["completions"])
    (made,) = objects("jobset", full=True)
    (node,) = made["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    env = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    assert env["MASTER_ADDR"] == "contract-node-0-0.contract"  # JOBSET-REPLICATED-JOB-POD.JOBSET
    assert "subdomain" not in pod and "subdomain" not in made["spec"]["network"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": None}, "image is not given"),
        ({"output": "runs/x"}, "output='runs/x' would be lost"),
        ({"preemptible": True}, "preemptible=True"),
        ({"storage": [{"source": "s3://b", "path": "/b"}]}, "storage.source='s3://b' cannot be"),
        ({"storage": [{"source": "pvc:A_b", "path": "/b"}]}, "storage.source='A_b' is not usable"),
        ({"name": "a" * 62, "nodes": 11}, "name="),
        ({"name": "1a"}, "name='1a'"),
        ({"backends": {"kubernetes": {"kind": "pod"}}}, "backends.kubernetes.kind='pod'"),
        ({"backends": {"kubernetes": {"shm_gib": 0}}}, "backends.kubernetes.shm_gib=0"),
        ({"retries": 1, "backends": {"kubernetes": {"kind": "trainjob"}}}, "retries=1"),
        (
            {"backends": {"kubernetes": {"kind": "trainjob", "priority_class": "high"}}},
            "backends.kubernetes.priority_class='high'",
        ),
    ],
)
def test_what_kubernetes_cannot_do(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as refused:
        kubernetes.plan(job("kubernetes", **fields))
    assert str(refused.value).startswith(said)


def test_output_below_a_mount_lasts() -> None:
    kubernetes.plan(
        job("kubernetes", output="/data/x", storage=[{"source": "pvc:d", "path": "/data"}])
    )


# --- what kubectl answers -------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kubernetes, "marker_before", lambda output: None)
    programs.answer("kubectl", "--context", "prod", text="job.batch/contract\n")
    plan = kubernetes.plan(job("kubernetes", backends={"kubernetes": {"context": "prod"}}))
    assert kubernetes.submit(plan) == 0
    return plan


def test_submit_creates_what_was_printed(submitted: Any, programs: Programs) -> None:
    assert [call["argv"] for call in programs.calls()] == [list(c) for c in submitted.commands]
    assert Handle.load(submitted).id == "job.batch/contract"


def condition(kind: str) -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": "True", "reason": "Why", "message": "so"}]}


@pytest.mark.parametrize(
    ("status", "state", "code", "detail"),
    [
        ({}, "queued", None, ""),
        ({"active": 2, "ready": 0}, "running", None, ""),
        ({"replicatedJobsStatus": [{"name": "node", "active": 0}]}, "queued", None, ""),
        ({"replicatedJobsStatus": [{"name": "node", "ready": 1}]}, "running", None, ""),
        (condition("Complete"), "succeeded", 0, ""),
        (condition("Completed"), "succeeded", 0, ""),
        (condition("Failed"), "failed", 71, ": Why so"),
        (condition("FailureTarget"), "failed", 71, ": Why so"),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, "queued", None, ""),
    ],
)
def test_status(
    submitted: Any, programs: Programs, status: Any, state: Any, code: int, detail: str
) -> None:
    kubectl = ("kubectl", "--context", "prod", "--namespace", "default", "get")
    ends = [(1, "2026-01-01T00:00:09Z"), (71, "2026-01-01T00:00:03Z"), (0, "2026-01-01T00:00:01Z")]
    states = [{"terminated": {"exitCode": code, "finishedAt": at}} for code, at in ends]
    pods = [{"status": {"containerStatuses": [{"state": state}]}} for state in states]
    programs.answer(*kubectl, "pods", text=json.dumps({"items": [*pods, {"status": {}}]}))
    programs.answer(*kubectl, "job.batch/contract", text=json.dumps({"status": status}))
    expected = Status(state, code, f"job.batch/contract{detail}")
    assert kubernetes.status(submitted) == expected


def test_a_job_that_is_gone(submitted: Any, programs: Programs) -> None:
    programs.answer("kubectl", text="")
    assert kubernetes.status(submitted).state == "cancelled"


def test_cancel_and_logs(submitted: Any, programs: Programs) -> None:
    programs.answer("kubectl", text="[pod/contract-0] one\n[pod/contract-1] two\n")
    assert list(kubernetes.logs(submitted)) == ["[pod/contract-0] one", "[pod/contract-1] two"]
    selector = "batch.kubernetes.io/job-name=contract"
    assert programs.calls()[-1]["argv"][5:8] == ["logs", "--selector", selector]
    kubernetes.cancel(submitted)
    ended = [call["argv"][5:] for call in programs.calls()[-2:]]
    assert ended == [
        ["delete", "--ignore-not-found", "--filename", f.path] for f in submitted.files
    ]
