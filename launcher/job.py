"""What to run, checked before any machine is asked for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# A name must serve as a DNS label (Kubernetes), a Slurm job name and a file name.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.ASCII)
_SECRET_FIELDS = {"secret", "password", "passwd", "token", "key", "credential", "credentials"}

OUTPUT_FIELD = "output"  # the field of the run's configuration that names its output folder


class JobError(Exception):
    """A job cannot run as asked; the message names the field, the value and the remedy."""


@dataclass(frozen=True)
class JobSpec:
    """One training run.

    name: lower-case letters, digits and dashes, at most 63.
    config: path of the YAML file, as the run's hosts see it.
    output: folder of the run (a path or an fsspec URL such as s3://bucket/run).
    overrides: `field.name=value`, laid over the config in this order.
    ranks_per_node: None leaves it to the backend: one per accelerator it finds.
    env: variables for every rank. Values are shown in no plan if their name looks like a secret's.
    port: of rank 0's rendezvous; None derives one from name and output.
    """

    name: str
    config: str
    output: str
    module: str = "pretrain"
    command: tuple[str, ...] = ("train",)
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    ranks_per_node: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None

    def __post_init__(self) -> None:
        _match("name", self.name, _NAME, "use 1 to 63 lower-case letters, digits and inner dashes")
        _match("module", self.module, _MODULE, "give a Python module such as pretrain")
        _path("config", self.config)
        _path("output", self.output)
        _count("nodes", self.nodes, 1, 10_000)
        if self.ranks_per_node is not None:
            _count("ranks_per_node", self.ranks_per_node, 1, 1_024)
        if self.port is not None:
            _count("port", self.port, 1_024, 65_535)
        for part in self.command:
            _text("command", part)
        for override in self.overrides:
            _match("overrides", override, _OVERRIDE, "give field.name=value")
            _text("overrides", override)
            _no_secret(override)
        for name, value in self.env.items():
            _match("env", name, _VARIABLE, "give NAME=value with a plain variable name")
            _text(f"env.{name}", value, shown="a value")
        # A frozen job holds no dict or list that a caller could still change.
        object.__setattr__(self, "command", tuple(self.command))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        object.__setattr__(self, "env", MappingProxyType(dict(self.env)))

    def arguments(self) -> tuple[str, ...]:
        """What follows the module: command, config, overrides, the output folder as the last."""
        sets = [*self.overrides, f"{OUTPUT_FIELD}={self.output}"]
        return (
            *self.command,
            "--config",
            self.config,
            *(part for s in sets for part in ("--set", s)),
        )


def _text(name: str, value: object, shown: str = "") -> None:
    if not isinstance(value, str):
        raise JobError(f"{name}={value!r} must be text, it is {type(value).__name__}")
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise JobError(f"{name}={shown or repr(value)} holds a control character; remove it")


def _match(name: str, value: object, pattern: re.Pattern[str], remedy: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise JobError(f"{name}={value!r} is not usable; {remedy}")


def _path(name: str, value: object) -> None:
    _text(name, value)
    if value == "":
        raise JobError(f"{name}='' is empty; give a path")
    if isinstance(value, str) and value.startswith("-"):
        raise JobError(f"{name}={value!r} would be read as an option; write ./{value}")


def _count(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise JobError(f"{name}={value!r} must be a whole number from {low} to {high}")


def _no_secret(override: str) -> None:
    name = override.partition("=")[0]
    if _SECRET_FIELDS & set(re.split(r"[._]", name.lower())):
        raise JobError(
            f"overrides: {name} looks like a secret, and a command line is public; "
            "pass it as an environment variable"
        )
