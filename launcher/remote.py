"""Asks hosts through ssh: all at once, each within a time, whatever becomes of the others."""

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

CONNECT_SECONDS = 10
# A host that vanishes is noticed after 15 s; without these a cut link hangs an ssh for ever.
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)
_AT_ONCE = 64


@dataclass(frozen=True)
class Reach:
    """How a host's Python is started. folder: working directory there, with the code in it."""

    python: str
    folder: str
    ssh_port: int | None = None

    def command(self, host: str, module: str, arguments: Sequence[str] = ()) -> list[str]:
        """The ssh command that runs a module of ours on ``host``."""
        port = ("-p", str(self.ssh_port)) if self.ssh_port else ()
        there = shlex.join([self.python, "-m", module, *arguments])
        return ["ssh", *SSH_OPTIONS, *port, host, f"cd {shlex.quote(self.folder)} && exec {there}"]


def ask(
    reach: Reach, requests: Mapping[str, dict[str, Any]], timeout_seconds: float
) -> dict[str, dict[str, Any]]:
    """What each host answers to its request (`launcher.host`); {"unreachable": why} where none
    came, {"error": why} where it could not do what was asked."""

    def one(host: str) -> dict[str, Any]:
        try:
            done = subprocess.run(
                reach.command(host, "launcher.host"),
                input=json.dumps(requests[host]),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_seconds,
                check=False,
                start_new_session=True,  # a Ctrl-C is for us: what is asked goes on
            )
        except subprocess.TimeoutExpired:
            return {"unreachable": f"no answer within {timeout_seconds:.0f} s"}
        except FileNotFoundError:
            return {"unreachable": "ssh is not installed here"}
        try:
            reply = json.loads(done.stdout.splitlines()[-1])
            if isinstance(reply, dict):
                return reply
        except (IndexError, ValueError):
            pass
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        return {"unreachable": said or f"ssh ended with exit code {done.returncode}"}

    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, max(1, len(requests)))) as pool:
        return dict(zip(requests, pool.map(one, requests), strict=True))
