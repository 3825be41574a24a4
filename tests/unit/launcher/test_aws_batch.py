"""The AWS Batch backend: requests by botocore's own model, and a server of moto's over HTTP.

moto keeps jobs and definitions; it starts no node. Nodes that start with Batch's variables:
tests/cluster.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.backends import aws_batch
from launcher.handle import Handle
from launcher.job import JobError, JobSpec
from launcher.plan import REGISTERED
from tests.support.jobs import EXTRA, job

ROLE = "arn:aws:iam::123456789012:role/batch"
SECRET = "aws:arn:aws:secretsmanager:eu-central-1:123456789012:secret:hub-AbCdEf"
FULL: dict[str, Any] = {
    "nodes": 3,
    "accelerators_per_node": 8,
    "time_limit_minutes": 60,
    "retries": 9,
    "env": {"NOTE": "it's $(x)"},
    "secrets": {"HF_TOKEN": SECRET, "OTHER": "file:/run/other"},
    "storage": [
        {"source": "efs:fs-0123456789abcdef0", "path": "/data", "read_only": True},
        {"source": "host:/scratch", "path": "/scratch"},
    ],
}
OPTIONS = {
    "instance_type": "p4d.24xlarge",
    "execution_role_arn": ROLE,
    "job_role_arn": ROLE,
    "shm_gib": 64,
}


def full(**fields: Any) -> JobSpec:
    options = {**EXTRA["aws_batch"]["backends"]["aws_batch"], **OPTIONS}
    return job("aws_batch", **{**FULL, **fields}, backends={"aws_batch": options})


def problems(method: str, arguments: dict[str, Any]) -> list[str]:
    """What botocore's model of AWS Batch says of a request: names, types, and values of enums."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("batch")
    shape = model.operation_model(method).input_shape
    report = ParamValidator().validate(arguments, shape).generate_report()
    return [*report.splitlines(), *_enums(shape, arguments, method)]


def _enums(shape: Any, value: Any, where: str) -> Iterator[str]:
    if shape.type_name == "structure" and isinstance(value, dict):
        for name, inner in value.items():
            if name in shape.members:
                yield from _enums(shape.members[name], inner, f"{where}.{name}")
    elif shape.type_name == "list" and isinstance(value, list):
        for inner in value:
            yield from _enums(shape.member, inner, where)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{where}: {value!r} is not one of {shape.enum}"


@pytest.mark.parametrize(
    "asked",
    [job("aws_batch"), full(), full(nodes=1, preemptible=True)],
    ids=["small", "full", "one"],
)
def test_requests_by_botocores_model(asked: JobSpec) -> None:
    register, submit = aws_batch.plan(asked).calls
    assert problems("RegisterJobDefinition", register.arguments()) == []
    assert problems("SubmitJob", submit.arguments()) == []
    assert submit.arguments()["jobDefinition"] == REGISTERED


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("nodePropertys",), {}, "Unknown parameter"),
        (("nodeProperties", "numNodes"), "3", "Invalid type"),
        (("type",), "multi-node", "not one of"),
        (("retryStrategy", "evaluateOnExit", 0, "action"), "STOP", "not one of"),
        (("retryStrategy", "evaluateOnExit", 0), {}, "Missing required"),
    ],
)
def test_the_check_can_fail(path: tuple[Any, ...], value: Any, said: str) -> None:
    request = aws_batch.plan(full()).calls[0].arguments()
    node: Any = request
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert any(said in problem for problem in problems("RegisterJobDefinition", request))


def test_what_the_definition_says() -> None:
    request = aws_batch.plan(full()).calls[0].arguments()
    (nodes,) = request["nodeProperties"]["nodeRangeProperties"]
    assert (request["type"], nodes["targetNodes"]) == ("multinode", "0:")
    assert request["retryStrategy"]["attempts"] == 10
    assert request["timeout"] == {"attemptDurationSeconds": 3600}
    container = nodes["container"]
    assert container["secrets"] == [{"name": "HF_TOKEN", "valueFrom": SECRET.removeprefix("aws:")}]
    assert "OTHER=file:/run/other" in container["command"]
    assert {r["type"]: r["value"] for r in container["resourceRequirements"]} == {
        **{"VCPU": "8", "MEMORY": "30720", "GPU": "8"}
    }
    one = aws_batch.plan(full(nodes=1)).calls[0].arguments()
    assert one["type"] == "container" and "instanceType" not in one["containerProperties"]
    assert {"name": "NNODES", "value": "1"} in one["containerProperties"]["environment"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": None}, "image is not given"),
        ({"cores_per_node": None}, "cores_per_node is not given"),
        ({"memory_gib_per_node": None}, "memory_gib_per_node is not given"),
        ({"output": "runs/x"}, "output='runs/x' would be lost"),
        ({"grace_seconds": 60}, "grace_seconds=60 has no meaning on aws_batch; Batch grants"),
        ({"nodes": 2, "preemptible": True}, "preemptible=True, but AWS Batch has no Spot"),
        ({"secrets": {"HF_TOKEN": SECRET}}, "backends.aws_batch.execution_role_arn is not given"),
        ({"env": {"AWS_BATCH_X": "1"}}, "env.AWS_BATCH_X"),
        ({"overrides": ("a=Ref::b",)}, "command: 'a=Ref::b'"),
        ({"storage": [{"source": "pvc:x", "path": "/x"}]}, "storage.source='pvc:x' cannot be"),
        ({"storage": [{"source": "efs:x", "path": "/x"}]}, "storage.source='x' is not usable"),
        ({"backends": {}}, "backends.aws_batch.queue: required"),
    ],
)
def test_what_aws_batch_cannot_do(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as refused:
        aws_batch.plan(job("aws_batch", **fields))
    assert str(refused.value).startswith(said)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A real HTTP server of moto's, in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def account(server: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An AWS account with a queue and a bucket; a client for what the test looks up itself."""
    import boto3

    monkeypatch.chdir(tmp_path)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setattr(aws_batch, "marker_before", lambda output: None)
    region = {"region_name": "eu-central-1"}
    trust = {"RoleName": "batch", "AssumeRolePolicyDocument": "{}"}
    role = boto3.client("iam", **region).create_role(**trust)["Role"]["Arn"]
    batch = boto3.client("batch", **region)
    environment = batch.create_compute_environment(
        computeEnvironmentName="env", type="UNMANAGED", state="ENABLED", serviceRole=role
    )["computeEnvironmentArn"]
    batch.create_job_queue(
        jobQueueName="gpu",
        state="ENABLED",
        priority=1,
        computeEnvironmentOrder=[{"order": 1, "computeEnvironment": environment}],
    )
    yield batch
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST"))


def test_register_submit_describe_cancel(account: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Two submissions of one job: two revisions of its definition, the newer one's status."""
    asked = full()
    plan = aws_batch.plan(asked)
    assert aws_batch.submit(plan) == 0 and aws_batch.submit(plan) == 0
    definitions = account.describe_job_definitions(jobDefinitionName="contract")["jobDefinitions"]
    newer = max(definitions, key=lambda definition: definition["revision"])
    sent = plan.calls[0].arguments()
    assert len(definitions) == 2 and newer["type"] == "multinode"
    assert newer["timeout"] == sent["timeout"]
    number = Handle.load(plan).id
    (described,) = account.describe_jobs(jobs=[number])["jobs"]
    assert described["nodeProperties"] == sent["nodeProperties"]
    assert described["jobDefinition"] == newer["jobDefinitionArn"]
    assert described["jobName"] == "contract" and "queue/gpu" in described["jobQueue"]
    status = aws_batch.status(plan)
    assert status.state in ("queued", "running", "succeeded", "failed")
    assert status.detail.startswith(f"job {number}: ")
    aws_batch.cancel(plan)
    assert number in capsys.readouterr().out


def test_what_aws_refuses_is_told(account: Any) -> None:
    options = {**EXTRA["aws_batch"]["backends"]["aws_batch"], "queue": "none"}
    with pytest.raises(JobError, match=r"AWS refused submit_job: .*none"):
        aws_batch.submit(aws_batch.plan(job("aws_batch", backends={"aws_batch": options})))
    plan = aws_batch.plan(job("aws_batch"))
    Handle("aws_batch", "00000000-0000-0000-0000-000000000000").save(plan.folder)
    assert aws_batch.status(plan).state == "unknown"


class Answers:
    """A client with fixed answers, for states of a job that moto never reaches."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, []

    def __getattr__(self, name: str) -> Any:
        def method(**arguments: Any) -> Any:
            self.asked.append(arguments)
            answer = self.answers[name]
            return answer(**arguments) if callable(answer) else answer

        method.__name__ = name
        return method


def test_the_exit_code_is_the_main_nodes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(jobs: list[str]) -> Any:
        if jobs == ["n"]:
            return {"jobs": [{"jobId": "n", "status": "FAILED", "statusReason": "Node 0 exited"}]}
        return {"jobs": [{"jobId": "n#0", "status": "FAILED", "container": {"exitCode": 71}}]}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(aws_batch, "_client", lambda *_: Answers(describe_jobs=describe))
    plan = aws_batch.plan(full())
    Handle("aws_batch", "n").save(plan.folder)
    status = aws_batch.status(plan)
    assert (status.state, status.code) == ("failed", 71)
    assert status.detail == "job n: FAILED, Node 0 exited"


def test_logs_of_all_nodes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(jobs: list[str]) -> Any:
        assert jobs == ["n#0", "n#1", "n#2"]
        streams: list[Any] = [{"logStreamName": "s0"}, {"logStreamName": "s1"}, {}]
        return {"jobs": [{"jobId": j, "container": s} for j, s in zip(jobs, streams, strict=True)]}

    def events(logStreamName: str, nextToken: str = "", **_: Any) -> Any:
        pages = {"": ("one", "a"), "a": ("two", "b"), "b": (None, "b")}
        text, token = pages[nextToken]
        messages = [{"message": f"{logStreamName} {text}"}] if text else []
        return {"events": messages, "nextForwardToken": token}

    client = Answers(describe_jobs=describe, get_log_events=events)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(aws_batch, "_client", lambda *_: client)
    plan = aws_batch.plan(full())
    Handle("aws_batch", "n").save(plan.folder)
    assert list(aws_batch.logs(plan)) == [
        *("==> n#0 <==", "s0 one", "s0 two"),
        *("==> n#1 <==", "s1 one", "s1 two"),
        "==> n#2 <==",
    ]


def test_without_boto3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    monkeypatch.chdir(__import__("pathlib").Path(__file__).parents[3])
    monkeypatch.setattr(aws_batch, "marker_before", lambda output: None)
    arguments = ["aws_batch", "--config", "configs/jobs/aws_batch.yaml"]
    assert main([*arguments, "--dry-run"]) == 0  # a plan needs no client
    assert main(arguments) == 2
    assert "pip install --requirement requirements-cloud.txt" in capsys.readouterr().err
