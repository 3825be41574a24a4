"""The ticket of a run's ranks: a file on their host, readable by its user alone.

It holds their command and environment, so that neither a secret nor anything that a shell could
take for its own stands on the command line of pdsh, ssh or mpirun. Standard library only.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

_TICKET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Ticket:
    """What every rank of a run on a host is started with.

    ranks: folder of their records. attempt: name of this one. argv: the command.
    env: its variables, secrets among them. address, port: of rank 0, if the launcher says none.
    fenced: whether the rank ends when another attempt is allowed (`records.allow`).
    grace_seconds: that it has to save after a stop.
    """

    ranks: str
    attempt: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    address: str = ""
    port: int = 0
    fenced: bool = True
    grace_seconds: float = 120.0

    def write(self, name: str) -> None:
        """Leave it on this host."""
        path = _path(name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        part = path.with_name(f"{name}.{os.getpid()}")
        with suppress(FileNotFoundError):
            part.unlink()
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        part.replace(path)

    @classmethod
    def read(cls, name: str) -> "Ticket":
        """Raises:
        FileNotFoundError: it is not on this host.
        """
        tree = json.loads(_path(name).read_text(encoding="utf-8"))
        return cls(**{**tree, "argv": tuple(tree["argv"])})


def remove(name: str) -> None:
    """Take a ticket away from this host."""
    with suppress(FileNotFoundError):
        _path(name).unlink()


def _path(name: str) -> Path:
    if not _TICKET.fullmatch(name):
        raise ValueError(f"ticket={name!r} is not a name of letters, digits, dots and dashes")
    return Path.home() / ".cache" / "diffdis-launcher" / name
