"""AWS Batch: a multi-node parallel job (a container job for one node), through boto3.

Batch gives every node its number and, but for the main node, the main node's address.
"""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import model_validator

from launcher.handle import Handle, State, Status, marker_before
from launcher.job import JobError, JobSpec
from launcher.plan import REGISTERED, Call, Plan
from launcher.secrets import require_schemes, scheme_of
from launcher.strict import Described, check_match

HELP = "run on AWS Batch: a multi-node parallel job, through boto3"

_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,127}|arn:aws[\w-]*:batch:[\w:/-]+", re.ASCII)
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
_ROLE = re.compile(r"arn:aws[\w-]*:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)
_INSTANCE = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)?")
_FILE_SYSTEM = re.compile(r"fs-[0-9a-f]+")
_LOG_GROUP = "/aws/batch/job"
_CHUNK = 100  # jobs in one request
_STATES: dict[str, State] = {
    "SUBMITTED": "queued",
    "PENDING": "queued",
    "RUNNABLE": "queued",
    "STARTING": "queued",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
}


class Options(Described):
    """What Batch needs to know besides the job.

    queue, region: where it runs. instance_type: of the nodes; None takes what the queue has.
    execution_role_arn: may read the job's secrets. job_role_arn: what the run itself may do, such
        as reading and writing S3. shm_gib: of /dev/shm.
    """

    queue: str
    region: str
    instance_type: str | None = None
    execution_role_arn: str | None = None
    job_role_arn: str | None = None
    shm_gib: int = 8

    @model_validator(mode="after")
    def _check(self) -> "Options":
        check_match("queue", self.queue, _NAME, "give the name or ARN of a job queue")
        check_match("region", self.region, _REGION, "give a region such as eu-central-1")
        for field, pattern in (
            ("instance_type", _INSTANCE),
            ("execution_role_arn", _ROLE),
            ("job_role_arn", _ROLE),
        ):
            value = getattr(self, field)
            if value is not None:
                check_match(field, value, pattern, "copy it from the AWS console")
        if not 1 <= self.shm_gib <= 4_096:
            raise JobError(f"shm_gib={self.shm_gib} must be a whole number from 1 to 4096")
        return self


def plan(job: JobSpec) -> Plan:
    """The job definition of ``job``, and the request that submits it.

    Raises:
        JobError: something of the job cannot be had on AWS Batch.
    """
    options = job.options("aws_batch", Options)
    _check(job, options)
    definition = {
        "jobDefinitionName": job.name,
        "retryStrategy": {
            "attempts": job.retries + 1,
            "evaluateOnExit": [
                {"onExitCode": "2", "action": "EXIT"},  # a mistake, which no retry mends
                {"onExitCode": "*", "action": "RETRY"},
            ],
        },
        "tags": {"launcher": "diffdis-pretrain", "name": job.name},
        "propagateTags": True,
    }
    if job.time_limit_minutes:
        definition["timeout"] = {"attemptDurationSeconds": job.time_limit_minutes * 60}
    container = _container(job, options)
    if job.nodes == 1:
        definition |= {"type": "container", "containerProperties": container}
    else:
        if options.instance_type:
            container["instanceType"] = options.instance_type
        definition |= {
            "type": "multinode",
            "nodeProperties": {
                "numNodes": job.nodes,
                "mainNode": 0,
                "nodeRangeProperties": [{"targetNodes": "0:", "container": container}],
            },
        }
    request = {"jobName": job.name, "jobQueue": options.queue, "jobDefinition": REGISTERED}
    return Plan(
        backend="aws_batch",
        name=job.name,
        output=job.output,
        log=f"CloudWatch, log group {_LOG_GROUP} in {options.region}",
        env=(("AWS_DEFAULT_REGION", options.region),),
        calls=(
            Call.of("batch.register_job_definition", definition),
            Call.of("batch.submit_job", request),
        ),
        folder=job.folder("aws_batch"),
    )


def _check(job: JobSpec, options: Options) -> None:
    if job.image is None:
        raise JobError("image is not given; build one from the Dockerfile, push it, and name it")
    for field in ("cores_per_node", "memory_gib_per_node"):
        if getattr(job, field) is None:
            raise JobError(f"{field} is not given, and AWS Batch places jobs by it; give a number")
    job.refuse("aws_batch", {"grace_seconds": "Batch grants 30 s at a time limit; remove it"})
    job.require_lasting_output("aws_batch")
    require_schemes(job.secrets, "aws_batch", ("aws", "file"))
    if not options.execution_role_arn and any(scheme_of(r) == "aws" for r in job.secrets.values()):
        raise JobError(
            "backends.aws_batch.execution_role_arn is not given, but secrets are read under it; "
            "give a role that may read them"
        )
    if job.preemptible and job.nodes > 1:
        raise JobError(
            f"preemptible=True, but AWS Batch has no Spot for jobs of nodes={job.nodes}; set it to "
            "false, or use the skypilot or kubernetes backend"
        )
    for name in (*job.env, *job.secrets):
        if name.startswith("AWS_BATCH_"):
            raise JobError(f"env.{name}: AWS Batch sets what begins AWS_BATCH_; rename it")
    for word in job.node_command("aws_batch"):
        if "Ref::" in word:
            raise JobError(
                f"command: {word!r} would be read as a parameter of AWS Batch; reword it"
            )


def _container(job: JobSpec, options: Options) -> dict[str, Any]:
    # Both are given: `_check` has seen to it.
    resources = {
        "VCPU": job.cores_per_node,
        "MEMORY": 1024 * (job.memory_gib_per_node or 0),
        "GPU": job.accelerators_per_node,
    }
    variables = job.variables()
    if job.nodes == 1:
        variables = {"NNODES": "1", **variables}  # Batch numbers the nodes of larger jobs only
    container: dict[str, Any] = {
        "image": job.image,
        "command": list(job.node_command("aws_batch")),
        "environment": [{"name": name, "value": value} for name, value in variables.items()],
        "secrets": [
            {"name": name, "valueFrom": reference.partition(":")[2]}
            for name, reference in sorted(job.secrets.items())
            if scheme_of(reference) == "aws"
        ],
        "resourceRequirements": [
            {"type": kind, "value": str(amount)} for kind, amount in resources.items() if amount
        ],
        "linuxParameters": {"sharedMemorySize": 1024 * options.shm_gib, "initProcessEnabled": True},
        # NCCL over EFA pins memory.
        "ulimits": [{"name": "memlock", "softLimit": -1, "hardLimit": -1}],
        "executionRoleArn": options.execution_role_arn,
        "jobRoleArn": options.job_role_arn,
        "volumes": [],
        "mountPoints": [],
    }
    for i, mount in enumerate(job.storage):
        name = f"storage-{i}"
        container["volumes"].append({"name": name, **_volume(mount.source)})
        container["mountPoints"].append(
            {"sourceVolume": name, "containerPath": mount.path, "readOnly": mount.read_only}
        )
    return {name: value for name, value in container.items() if value}


def _volume(source: str) -> dict[str, Any]:
    kind, _, rest = source.partition(":")
    if kind == "efs":
        check_match("storage.source", rest, _FILE_SYSTEM, "give efs:fs-ID")
        return {"efsVolumeConfiguration": {"fileSystemId": rest, "transitEncryption": "ENABLED"}}
    if kind == "host":
        return {"host": {"sourcePath": rest}}
    raise JobError(
        f"storage.source={source!r} cannot be mounted on aws_batch; give efs:fs-ID or host:/PATH, "
        "or use the URL in the run's config"
    )


def submit(plan: Plan) -> int:
    """0 as soon as Batch has accepted the job."""
    before = marker_before(plan.output)
    client = _client("batch", plan)
    register, send = plan.calls
    registered = _ask(client.register_job_definition, **register.arguments())["jobDefinitionArn"]
    answer = _ask(client.submit_job, **{**send.arguments(), "jobDefinition": registered})
    Handle("aws_batch", answer["jobId"], before).save(plan.folder)
    print(f"{plan.name}: AWS Batch job {answer['jobId']}, definition {registered}")
    return 0


def status(plan: Plan) -> Status:
    """What Batch says; the exit code is the main node's."""
    number = Handle.load(plan).id
    found = _describe(plan, [number])
    if not found:
        return Status(
            "unknown", detail=f"AWS Batch, which forgets in a week, knows no job {number}"
        )
    job = found[0]
    state = _STATES.get(job["status"], "unknown")
    if state == "failed" and "launcher cancel" in job.get("statusReason", ""):
        state = "cancelled"
    why = job.get("statusReason", "")
    detail = f"job {number}: {job['status']}{f', {why}' if why else ''}"
    main = job if "container" in job else next(iter(_describe(plan, [f"{number}#0"])), {})
    return Status(state, main.get("container", {}).get("exitCode"), detail)


def logs(plan: Plan) -> Iterator[str]:
    """Of each node in turn, from CloudWatch."""
    number, nodes = Handle.load(plan).id, _nodes(plan)
    jobs = [number] if nodes == 1 else [f"{number}#{i}" for i in range(nodes)]
    client = _client("logs", plan)
    for start in range(0, len(jobs), _CHUNK):
        for job in _describe(plan, jobs[start : start + _CHUNK]):
            stream = job.get("container", {}).get("logStreamName")
            yield f"==> {job['jobId']} <=="
            token = None
            while stream:
                more: dict[str, str] = {"nextToken": token} if token else {}
                answer = _ask(
                    client.get_log_events,
                    logGroupName=_LOG_GROUP,
                    logStreamName=stream,
                    startFromHead=True,
                    **more,
                )
                yield from (event["message"] for event in answer["events"])
                if answer["nextForwardToken"] == token:
                    break
                token = answer["nextForwardToken"]


def cancel(plan: Plan) -> None:
    number = Handle.load(plan).id
    _ask(_client("batch", plan).terminate_job, jobId=number, reason="launcher cancel")


def _nodes(plan: Plan) -> int:
    return int(plan.calls[0].arguments().get("nodeProperties", {}).get("numNodes", 1))


def _describe(plan: Plan, jobs: list[str]) -> list[dict[str, Any]]:
    return list(_ask(_client("batch", plan).describe_jobs, jobs=jobs)["jobs"])


def _client(service: str, plan: Plan) -> Any:
    try:
        import boto3
    except ImportError:
        raise JobError(
            "package='boto3' is not installed; "
            "run: pip install --requirement requirements-cloud.txt"
        ) from None
    return boto3.client(service, region_name=dict(plan.env)["AWS_DEFAULT_REGION"])


def _ask(method: Any, **arguments: Any) -> dict[str, Any]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return dict(method(**arguments))
    except (BotoCoreError, ClientError) as error:
        raise JobError(f"AWS refused {method.__name__}: {error}") from None
