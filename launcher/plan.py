"""What a backend would do for a job, as data: printable, comparable, without a secret in it."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|KEY|CREDENTIAL", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(://)[^/@\s'\"]+:[^/@\s'\"]*@")
_HIDDEN = "***"
_SHORTEST_SECRET = (
    6  # shorter values are ordinary words ("true"), which may stand elsewhere in a plan
)


@dataclass(frozen=True)
class PlanFile:
    """A file that submit writes before it runs the commands."""

    path: str
    text: str


@dataclass(frozen=True)
class Plan:
    """What submit does: write ``files``, then run ``commands`` in order with ``env`` added.

    commands: argument lists, run without a shell.
    env: (name, value) pairs on top of the submitting environment.
    output: the run's output folder, where its end marker appears.
    log: path of the file that collects what the commands print.
    """

    backend: str
    name: str
    output: str
    log: str
    commands: tuple[tuple[str, ...], ...]
    env: tuple[tuple[str, str], ...] = ()
    files: tuple[PlanFile, ...] = ()

    def render(self) -> str:
        """The plan as text for people; its command lines can be pasted into a shell.

        Values of variables whose name looks like a secret's are shown as ***, wherever they occur.
        """
        lines = [f"# {self.backend}: {self.name}", f"# output: {self.output}", f"# log: {self.log}"]
        for file in self.files:
            lines += [f"# file: {file.path}", *(f"#   {line}" for line in file.text.splitlines())]
        secrets = {name: value for name, value in self.env if is_secret(name)}
        for name, value in self.env:
            lines.append(f"export {name}={_HIDDEN if name in secrets else shlex.quote(value)}")
        lines += [shlex.join(command) for command in self.commands]
        return mask("\n".join(lines), secrets.values()) + "\n"


def is_secret(variable: str) -> bool:
    """Whether a variable of this name holds what no plan, log or command line may show."""
    return bool(_SECRET_NAME.search(variable))


def mask(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` with each of ``secrets``, and any password in a URL, replaced by ***."""
    for value in sorted(secrets, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(shlex.quote(value), _HIDDEN).replace(value, _HIDDEN)
    return _URL_PASSWORD.sub(rf"\1{_HIDDEN}@", text)
