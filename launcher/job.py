"""What to run, checked before any machine is asked for it."""

import re
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from pydantic import Strict, model_validator

from launcher import secrets as secret
from launcher.strict import (
    Described,
    JobError,
    Part,
    Texts,
    Tree,
    Variables,
    check_match,
    check_path,
    check_text,
)

__all__ = ["OUTPUT_FIELD", "Environment", "JobError", "JobSpec", "Mount"]

# A name must serve as a DNS label (Kubernetes), a Slurm job name and a file name.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.ASCII)
_IMAGE = re.compile(r"[a-z0-9][\w.:/@-]*", re.ASCII | re.IGNORECASE)
_SOURCE = re.compile(r"(host|pvc|efs|nfs|s3|gs):.+")
_SECRET_FIELDS = {"secret", "password", "passwd", "token", "key", "credential", "credentials"}

OUTPUT_FIELD = "output"  # the field of the run's configuration that names its output folder
GRACE_SECONDS = 120  # as launcher.supervise's, which `launcher node` grants if it is told nothing
DEFAULT_PORT = 29_500  # of the rendezvous, where a host runs one job

O = TypeVar("O", bound=Described)  # noqa: E741


class Environment(Part):
    """Where the code lies on a host, if no image holds it.

    python: the interpreter, as the hosts see it (a shared or equally installed environment).
    folder: the checkout, on the hosts; None is the folder that the job is submitted from.
    """

    python: str = "python"
    folder: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Environment":
        check_path("environment.python", self.python)
        if self.folder is not None:
            check_path("environment.folder", self.folder)
        return self


class Mount(Part):
    """Storage that appears as a folder on every node.

    source: host:/path, pvc:claim, efs:fs-ID, nfs:server:/path, s3://bucket or gs://bucket; each
        backend takes some of these. Object stores need no mount: `output` and data may be URLs.
    path: the folder, from the root.
    """

    source: str
    path: str
    read_only: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Mount":
        check_text("storage.source", self.source)
        check_match(
            "storage.source",
            self.source,
            _SOURCE,
            "give host:/path, pvc:claim, efs:fs-ID, nfs:server:/path, s3://bucket or gs://bucket",
        )
        _no_password("storage.source", self.source)
        check_path("storage.path", self.path)
        if not self.path.startswith("/") or ":" in self.path or "," in self.path:
            raise JobError(
                f"storage.path={self.path!r} must begin with / and hold no colon or comma"
            )
        return self

    def of(self, scheme: Literal["host", "pvc", "efs", "nfs", "s3", "gs"]) -> str | None:
        """What follows the scheme; None if the source is of another one."""
        kind, _, rest = self.source.partition(":")
        return rest if kind == scheme else None


class JobSpec(Described):
    """One training run.

    name: lower-case letters, digits and dashes, at most 63.
    config: path of the run's YAML file, as the run's hosts see it.
    output: folder of the run (a path or an fsspec URL such as s3://bucket/run).
    module, command: `python -m MODULE COMMAND... --config ...` is what each rank runs.
    overrides: `field.name=value`, laid over the config in this order.
    image, environment: a container image with the code in it, or the Python and folder of a host.
    nodes, and for each of them: ranks_per_node (None leaves it to the backend: one for each
        accelerator), accelerators_per_node (None: those that are found, none where they have to be
        asked for), cores_per_node, memory_gib_per_node.
    env: variables for every rank, shown in plans. secrets: variables whose values are read where
        they lie (`launcher.secrets`); the job holds references only.
    storage: folders for every node.
    time_limit_minutes: of one attempt. The ranks are asked to save and stop grace_seconds before.
    retries: attempts after the first that failed. Being preempted, or having stopped to be
        continued (exit code 75), is no failure where the backend can tell.
    preemptible: spare capacity, which may be taken away at any time.
    port: of rank 0's rendezvous; None leaves it to the backend.
    backends: options by name of the backend, checked by that backend.
    """

    name: str
    config: str
    output: str
    module: str = "pretrain"
    command: Texts = ("train",)
    overrides: Texts = ()
    image: str | None = None
    environment: Environment = Environment()
    nodes: int = 1
    ranks_per_node: int | None = None
    accelerators_per_node: int | None = None
    cores_per_node: int | None = None
    memory_gib_per_node: int | None = None
    env: Variables = {}  # noqa: RUF012 - pydantic copies it, and makes it read-only
    secrets: Variables = {}  # noqa: RUF012
    storage: Annotated[tuple[Mount, ...], Strict(False)] = ()
    time_limit_minutes: int | None = None
    grace_seconds: int = GRACE_SECONDS
    retries: int = 0
    preemptible: bool = False
    port: int | None = None
    backends: Tree = {}  # noqa: RUF012

    @model_validator(mode="after")
    def _check(self) -> "JobSpec":
        check_match(
            "name", self.name, _NAME, "use 1 to 63 lower-case letters, digits and inner dashes"
        )
        check_match("module", self.module, _MODULE, "give a Python module such as pretrain")
        check_path("config", self.config)
        check_path("output", self.output)
        for field in ("config", "output"):
            _no_password(field, getattr(self, field))
        for part in self.command:
            check_text("command", part)
            _no_password("command", part)
        for override in self.overrides:
            check_match("overrides", override, _OVERRIDE, "give field.name=value")
            check_text("overrides", override)
            _no_secret(override)
        if self.image is not None:
            check_match(
                "image", self.image, _IMAGE, "give registry/name:tag or registry/name@sha256:..."
            )
            if self.environment != Environment():
                raise JobError(
                    f"image={self.image!r} and environment are both given; an image holds its own "
                    "Python and code: remove one of the two"
                )
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise JobError(f"{field}={value!r} must be a whole number from {low} to {high}")
        self._check_variables()
        return self

    def _check_variables(self) -> None:
        for name, value in self.env.items():
            check_match("env", name, _VARIABLE, "give NAME=value with a plain variable name")
            if secret.is_secret(name) or secret.holds_password(value):
                raise JobError(
                    f"env.{name} looks like a secret, and plans show env; write a reference to it "
                    f"instead: secrets: {{{name}: env:{name}}}"
                )
            check_text(f"env.{name}", value, shown="a value")
        for name, reference in self.secrets.items():
            check_match(
                "secrets", name, _VARIABLE, "give NAME: reference with a plain variable name"
            )
            secret.check_reference(name, reference)
            if name in self.env:
                raise JobError(f"secrets.{name} is in env too; remove one of the two")

    def arguments(self) -> tuple[str, ...]:
        """What follows the module: command, config, overrides, the output folder as the last."""
        sets = [*self.overrides, f"{OUTPUT_FIELD}={self.output}"]
        return (
            *self.command,
            "--config",
            self.config,
            *(part for s in sets for part in ("--set", s)),
        )

    def ranks(self) -> int:
        """Ranks on each node where nobody can look at it: one for each accelerator asked for."""
        return self.ranks_per_node or self.accelerators_per_node or 1

    def variables(self) -> dict[str, str]:
        """`env`, and what the ranks need besides where nobody looks at the host first."""
        made = {}
        if self.cores_per_node is not None:  # or every rank takes every core
            made["OMP_NUM_THREADS"] = str(max(1, self.cores_per_node // self.ranks()))
        if not self.accelerators_per_node:
            made["DS_ACCELERATOR"] = "cpu"
        return dict(sorted({**made, **self.env}.items()))

    def node_command(self, scheduler: str) -> tuple[str, ...]:
        """What a scheduler without ssh starts once on every node: `launcher node`, which finds its
        rank and rank 0's address in the variables of ``scheduler`` (the backend's name), reads the
        secrets that lie in files, and runs `deepspeed --no_ssh` with what follows the `--`.

        Words: python -m launcher node --scheduler S --nodes N --ranks R [--port P] [--grace S]
        --output O [--secret NAME=file:/path]... -- MODULE ARGUMENTS...
        """
        files = [
            f"{name}={reference}"
            for name, reference in sorted(self.secrets.items())
            if secret.scheme_of(reference) == "file"
        ]
        return (
            *(self.environment.python, "-m", "launcher", "node"),
            *("--scheduler", scheduler, "--nodes", str(self.nodes), "--ranks", str(self.ranks())),
            *(("--port", str(self.port)) if self.port else ()),
            *(("--grace", str(self.grace_seconds)) if self.grace_seconds != GRACE_SECONDS else ()),
            *("--output", self.output),
            *(part for file in files for part in ("--secret", file)),
            *("--", self.module, *self.arguments()),
        )

    def refuse(self, backend: str, fields: dict[str, str]) -> None:
        """Raises:
        JobError: one of ``fields`` (name: remedy) is given, which ``backend`` could only ignore.
        """
        for field, remedy in fields.items():
            value = getattr(self, field)
            if value != type(self).model_fields[field].default:
                raise JobError(f"{field}={value!r} has no meaning on {backend}; {remedy}")

    def require_lasting_output(self, backend: str) -> None:
        """Raises:
        JobError: the run's output would be lost with the machine that ``backend`` gives it.
        """
        below = any(self.output.startswith(f"{m.path.rstrip('/')}/") for m in self.storage)
        if "://" not in self.output and not below:
            raise JobError(
                f"output={self.output!r} would be lost with the machine on {backend}, and with it "
                "what a retry continues; give a URL such as s3://bucket/run, or a path below a "
                "storage.path"
            )

    def folder(self, backend: str) -> str:
        """Where a submission leaves its files, relative to the folder it was submitted from."""
        return f"runs/{self.name}/{backend}"

    def options(self, backend: str, cls: Callable[..., O]) -> O:
        """`backends.BACKEND` of the job, checked as ``cls``; its errors name the whole field."""
        given = self.backends.get(backend) or {}
        where = f"backends.{backend}"
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            raise JobError(f"{where} must be a mapping of options")
        try:
            return cls(**given)
        except JobError as error:
            raise JobError(f"{where}.{error}") from None


_RANGES: dict[str, tuple[int, int]] = {
    "nodes": (1, 10_000),
    "ranks_per_node": (1, 1_024),
    "accelerators_per_node": (0, 1_024),
    "cores_per_node": (1, 4_096),
    "memory_gib_per_node": (1, 65_536),
    "time_limit_minutes": (1, 60 * 24 * 365),
    "grace_seconds": (10, 3_600),
    "retries": (0, 9),  # AWS Batch: 10 attempts; Google Batch: 10 retries
    "port": (1_024, 65_535),
}


def _no_password(name: str, value: str) -> None:
    if secret.holds_password(value):
        raise JobError(
            f"{name} holds a URL with a password, and a command line is public; remove it there "
            "and give the credentials as secrets, such as AWS_SECRET_ACCESS_KEY"
        )


def _no_secret(override: str) -> None:
    name, _, value = override.partition("=")
    if _SECRET_FIELDS & set(re.split(r"[._]", name.lower())):
        raise JobError(
            f"overrides: {name} looks like a secret, and a command line is public; "
            "pass it as an environment variable"
        )
    _no_password(f"overrides: {name}", value)
