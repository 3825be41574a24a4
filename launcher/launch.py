"""A job on hosts that ssh reaches: all that it takes to start it, as data."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher import remote


@dataclass(frozen=True)
class Launch:
    """All that submit needs, written beside the plan.

    hosts: slots of each, in order. argv: what every rank runs.
    """

    name: str
    config: str
    output: str
    folder: str
    python: str
    code: str
    hosts: dict[str, int]
    argv: tuple[str, ...]
    env: dict[str, str]
    options: dict[str, Any]
    port: int
    retries: int
    grace_seconds: int

    @property
    def reach(self) -> remote.Reach:
        """How the hosts are asked."""
        return remote.Reach(self.python, self.code, self.options["ssh_port"])

    @property
    def ticket(self) -> str:
        """Name of the file by which the ranks are started; runs side by side differ in it."""
        digest = hashlib.sha256(f"{self.name}\n{self.output}".encode()).hexdigest()[:12]
        return f"{self.name}-{digest}"

    def command(self, hosts: Sequence[str]) -> tuple[str, ...]:
        """The `deepspeed` command over some of the hosts."""
        options = self.options
        words = ["deepspeed", "--hostfile", f"{self.folder}/hostfile"]
        words += ["--launcher", options["launcher"], "--no_ssh_check", "--force_multi"]
        words += ["--master_addr", options["main_address"] or hosts[0]]
        words += ["--master_port", str(self.port), "--no_local_rank", "--log_level", "error"]
        if options["launcher"] == "pdsh" and options["ssh_port"]:
            words += ["--ssh_port", str(options["ssh_port"])]
        if options["launcher"] == "mpich":
            # Not as a module: deepspeed would put -m before the path of its own helper (0.19.8).
            return (*words, f"{self.code}/launcher/rank.py", self.ticket)
        return (*words, "--module", "launcher.rank", self.ticket)

    @classmethod
    def parse(cls, text: str) -> "Launch":
        """Of JSON."""
        tree = json.loads(text)
        return cls(**{**tree, "argv": tuple(tree["argv"])})

    def hostfile(self, hosts: Sequence[str]) -> str:
        """Of some of the hosts."""
        return "".join(f"{host} slots={self.hosts[host]}\n" for host in hosts)
