"""The Google Cloud Batch backend: requests by Google's own types, sent over HTTP by its client.

No emulator of the service exists: the server here only keeps what it is sent, by the same types.
"""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import batch_v1
from google.protobuf.json_format import ParseError

from launcher.__main__ import main
from launcher.backends import gcp_batch
from launcher.handle import Handle, Status
from launcher.job import JobError, JobSpec
from tests.support.jobs import EXTRA, job
from tests.support.programs import Programs, programs

__all__ = ["programs"]  # the fixture
NAME = "projects/my-project/locations/europe-west4/jobs/contract"
FULL: dict[str, Any] = {
    "nodes": 3,
    "accelerators_per_node": 8,
    "cores_per_node": 96,
    "memory_gib_per_node": 1300,
    "time_limit_minutes": 60,
    "retries": 2,
    "preemptible": True,
    "env": {"NOTE": "it's $(x)"},
    "secrets": {"HF_TOKEN": "gcp:projects/p/secrets/hub/versions/3", "OTHER": "file:/run/other"},
    "storage": [
        {"source": "gs://data/sets", "path": "/data", "read_only": True},
        {"source": "nfs:10.0.0.2:/export", "path": "/nfs"},
        {"source": "host:/scratch", "path": "/fast"},
    ],
}
OPTIONS = {
    "accelerator_type": "nvidia-tesla-v100",
    "service_account": "training@my-project.iam.gserviceaccount.com",
    "network": "projects/my-project/global/networks/n",
    "subnetwork": "projects/my-project/regions/europe-west4/subnetworks/s",
}


def full() -> JobSpec:
    options = {**EXTRA["gcp_batch"]["backends"]["gcp_batch"], **OPTIONS}
    return job("gcp_batch", **FULL, backends={"gcp_batch": options})


def parsed(asked: JobSpec) -> Any:
    request = gcp_batch.plan(asked).calls[0].arguments()["job"]
    return batch_v1.Job.from_json(json.dumps(request), ignore_unknown_fields=False)


@pytest.mark.parametrize("asked", [job("gcp_batch"), full()], ids=["small", "full"])
def test_requests_by_googles_types(asked: JobSpec) -> None:
    """Unknown fields, wrong types and names raise; the rest comes out as it went in."""
    made = parsed(asked)
    (group,) = made.task_groups
    assert (group.task_count, group.parallelism, group.task_count_per_node) == (
        asked.nodes,
    ) * 2 + (1,)
    kept = json.loads(batch_v1.Job.to_json(made, use_integers_for_enums=False))
    sent = gcp_batch.plan(asked).calls[0].arguments()["job"]
    assert not list(lost(sent, kept))


def lost(sent: Any, kept: Any, where: str = "") -> Iterator[str]:
    """What was sent and has another value in what is kept; 64-bit numbers come back as text."""
    if isinstance(sent, dict):
        for name, value in sent.items():
            yield from lost(value, kept.get(name), f"{where}.{name}")
    elif isinstance(sent, list):
        for i, value in enumerate(sent):
            yield from lost(value, kept[i], f"{where}[{i}]")
    elif str(sent) != str(kept):
        yield f"{where}: {sent!r} became {kept!r}"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("taskGroup",), []),
        (("taskGroups", 0, "taskCount"), "three"),
        (("taskGroups", 0, "taskSpec", "maxRunDuration"), "60m"),
        (("allocationPolicy", "instances", 0, "policy", "provisioningModel"), "CHEAP"),
        (("taskGroups", 0, "taskSpec", "lifecyclePolicies", 0, "action"), "STOP"),
    ],
)
def test_the_check_can_fail(path: tuple[Any, ...], value: Any) -> None:
    request = gcp_batch.plan(full()).calls[0].arguments()["job"]
    node = request
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(ParseError):
        batch_v1.Job.from_json(json.dumps(request), ignore_unknown_fields=False)


def test_what_the_job_says() -> None:
    made = parsed(full())
    task = made.task_groups[0].task_spec
    (runnable,) = task.runnables
    assert runnable.container.volumes == ["/data:/data:ro", "/nfs:/nfs:rw", "/scratch:/fast:rw"]
    assert dict(runnable.environment.secret_variables) == {
        "HF_TOKEN": "projects/p/secrets/hub/versions/3"
    }
    assert "OTHER=file:/run/other" in runnable.container.commands
    assert task.max_run_duration.total_seconds() == 3600 and task.max_retry_count == 2
    assert [list(p.action_condition.exit_codes) for p in task.lifecycle_policies] == [
        [2],
        [75, 50001],
    ]
    (instance,) = made.allocation_policy.instances
    assert instance.policy.provisioning_model.name == "SPOT" and instance.install_gpu_drivers
    assert [(a.type_, a.count) for a in instance.policy.accelerators] == [("nvidia-tesla-v100", 8)]
    small = parsed(job("gcp_batch")).allocation_policy.instances[0]
    assert small.policy.provisioning_model.name == "STANDARD" and not small.install_gpu_drivers


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": None}, "image is not given"),
        ({"output": "runs/x"}, "output='runs/x' would be lost"),
        ({"name": "1a"}, "name='1a' must begin with a letter"),
        ({"storage": [{"source": "pvc:x", "path": "/x"}]}, "storage.source='pvc:x' cannot be"),
        ({"backends": {}}, "backends.gcp_batch.project: required"),
        ({"backends": {"gcp_batch": {**OPTIONS}}}, "backends.gcp_batch.project: required"),
    ],
)
def test_what_google_batch_cannot_do(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as refused:
        gcp_batch.plan(job("gcp_batch", **fields))
    assert str(refused.value).startswith(said)


class Service(BaseHTTPRequestHandler):
    """create, get, cancel and the tasks of jobs, by their paths in Google's own annotations."""

    jobs: dict[str, Any]
    tasks: list[Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        create = re.fullmatch(r"/v1/(projects/[^/]+/locations/[^/]+)/jobs\?(.*)", self.path)
        if create:
            made = batch_v1.Job.from_json(body.decode(), ignore_unknown_fields=False)
            query = dict(pair.split("=") for pair in create[2].split("&"))
            made.name = f"{create[1]}/jobs/{query['jobId']}"
            if made.name in self.jobs:
                return self._send(409, {"error": {"code": 409, "status": "ALREADY_EXISTS"}})
            made.uid, made.status.state = "contract-1234", batch_v1.JobStatus.State.QUEUED
            self.jobs[made.name] = made
            return self._send(200, json.loads(batch_v1.Job.to_json(made)))
        name = self.path.removeprefix("/v1/").partition(":cancel")[0]
        self.jobs[name].status.state = batch_v1.JobStatus.State.CANCELLED
        return self._send(200, {"name": "projects/p/locations/l/operations/o", "done": False})

    def do_GET(self) -> None:
        path = self.path.removeprefix("/v1/").partition("?")[0]
        if path.endswith("/taskGroups/group0/tasks"):
            return self._send(200, {"tasks": self.tasks})
        if path not in self.jobs:
            return self._send(404, {"error": {"code": 404, "message": f"no {path}"}})
        return self._send(200, json.loads(batch_v1.Job.to_json(self.jobs[path])))

    def _send(self, code: int, tree: Any) -> None:
        text = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Service]]:
    """The real client, over HTTP instead of gRPC, to `Service`."""
    handler = type("Handler", (Service,), {"jobs": {}, "tasks": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rest = batch_v1.BatchServiceClient.get_transport_class("rest")

    def client() -> Any:
        host = f"127.0.0.1:{server.server_port}"
        transport = rest(host=host, credentials=AnonymousCredentials(), url_scheme="http")
        return batch_v1.BatchServiceClient(transport=transport, client_options=ClientOptions())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gcp_batch, "_client", client)
    monkeypatch.setattr(gcp_batch, "marker_before", lambda output: None)
    yield handler
    server.shutdown()
    server.server_close()


def test_submit_status_cancel(service: type[Service], programs: Programs) -> None:
    plan = gcp_batch.plan(full())
    assert gcp_batch.submit(plan) == 0
    assert Handle.load(plan).id == NAME and list(service.jobs) == [NAME]
    assert service.jobs[NAME].task_groups == parsed(full()).task_groups
    assert gcp_batch.status(plan) == Status("queued", None, f"{NAME}: QUEUED")
    with pytest.raises(JobError, match="name='contract' is taken by an earlier job"):
        gcp_batch.submit(plan)
    programs.answer("gcloud", "logging", "read", text="task-0 one\ntask-1 two\n")
    assert list(gcp_batch.logs(plan)) == ["task-0 one", "task-1 two"]
    assert programs.calls()[-1]["argv"][3:6] == [
        *('labels.job_uid="contract-1234"', "--project", "my-project")
    ]
    gcp_batch.cancel(plan)
    assert gcp_batch.status(plan).state == "cancelled"


def test_the_exit_code_is_the_first_that_a_task_ended_with(service: type[Service]) -> None:
    plan = gcp_batch.plan(full())
    gcp_batch.submit(plan)
    service.jobs[NAME].status = batch_v1.JobStatus(
        state="FAILED", status_events=[{"description": "task 1 failed"}]
    )
    service.tasks = [
        {"name": f"{NAME}/taskGroups/group0/tasks/0", "status": {"state": "SUCCEEDED"}},
        {
            "name": f"{NAME}/taskGroups/group0/tasks/1",
            "status": {"statusEvents": [{}, {"taskExecution": {"exitCode": 71}}]},
        },
    ]
    assert gcp_batch.status(plan) == Status("failed", 71, f"{NAME}: FAILED, task 1 failed")
    service.jobs[NAME].status.state = batch_v1.JobStatus.State.SUCCEEDED
    assert gcp_batch.status(plan).code is None


def test_what_google_refuses_is_told(service: type[Service]) -> None:
    plan = gcp_batch.plan(full())
    Handle("gcp_batch", NAME).save(plan.folder)
    with pytest.raises(JobError, match=r"Google Cloud Batch refused get_job: .*no projects/my-pro"):
        gcp_batch.status(plan)


def test_without_credentials_or_client(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import google.auth

    def none(*_: Any, **__: Any) -> Any:
        raise DefaultCredentialsError("none here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(google.auth, "default", none)
    Handle("gcp_batch", NAME).save(gcp_batch.plan(full()).folder)
    with pytest.raises(JobError, match=r"credentials are not found .*gcloud auth"):
        gcp_batch.status(gcp_batch.plan(full()))
    monkeypatch.setitem(__import__("sys").modules, "google.cloud.batch_v1", None)
    monkeypatch.delattr("google.cloud.batch_v1")
    monkeypatch.chdir(__import__("pathlib").Path(__file__).parents[3])
    arguments = ["gcp_batch", "--config", "configs/jobs/gcp_batch.yaml"]
    assert main([*arguments, "--dry-run"]) == 0  # a plan needs no client
    assert main(arguments) == 2
    assert "pip install --requirement requirements-cloud.txt" in capsys.readouterr().err
