"""What a backend would do for a job, as data: printable, comparable, without a secret in it."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REGISTERED = "@REGISTERED"  # in a call: what the call before it answers


@dataclass(frozen=True)
class PlanFile:
    """A file that submit writes before it runs the commands."""

    path: str
    text: str


@dataclass(frozen=True)
class Call:
    """A request to a service's interface, such as boto3's `batch.submit_job`.

    method: as its client names it. request: the arguments, as JSON.
    """

    method: str
    request: str

    @classmethod
    def of(cls, method: str, request: dict[str, Any]) -> "Call":
        return cls(method, json.dumps(request, indent=2, ensure_ascii=False))

    def arguments(self) -> dict[str, Any]:
        """A new copy of the request."""
        return dict(json.loads(self.request))


@dataclass(frozen=True)
class Plan:
    """What submit does: write ``files``, then run ``commands`` or make ``calls``, in order.

    commands: argument lists, run without a shell and with ``env`` added.
    env: (name, value) pairs on top of the submitting environment.
    secrets: (name, reference) pairs that submit itself resolves into that environment
        (`launcher.secrets`); what the scheduler or the node resolves stands in files and calls.
    output: the run's output folder, where its end marker appears.
    log: path of the file that collects what the run prints (or a folder or pattern of them).
    folder: where submit leaves its files and the handle by which the job is found again.
    """

    backend: str
    name: str
    output: str
    log: str
    commands: tuple[tuple[str, ...], ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    files: tuple[PlanFile, ...] = ()
    calls: tuple[Call, ...] = ()
    secrets: tuple[tuple[str, str], ...] = ()
    folder: str = ""

    def render(self) -> str:
        """The plan as text for people; its command lines can be pasted into a shell."""
        lines = [f"# {self.backend}: {self.name}", f"# output: {self.output}", f"# log: {self.log}"]
        for file in self.files:
            lines += [f"# file: {file.path}", *(f"#   {line}" for line in file.text.split("\n"))]
        lines += [f"# secret: {name} from {reference}" for name, reference in self.secrets]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.env]
        lines += [shlex.join(command) for command in self.commands]
        for call in self.calls:
            lines += [f"# call: {call.method}", *(f"#   {x}" for x in call.request.split("\n"))]
        return "\n".join(lines) + "\n"

    def write_files(self) -> None:
        """Write ``files``, readable by this user alone."""
        for file in self.files:
            path = Path(file.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a file of wider rights would keep them
            path.touch(mode=0o600)
            path.write_text(file.text, encoding="utf-8")
