"""Hosts of their own on this machine: network, pid, uts and mount namespaces, each with its own
sshd, name and address. Root only.

    with Hosts(folder, 2) as hosts:
        hosts.run("head", ["ssh", "node1", "hostname"])     # head: where a launcher is started
        hosts.cut("node2"), hosts.kill("node2"), hosts.start("node2")
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh")
_SSHD = "/usr/sbin/sshd"
_counter = itertools.count()


class Hosts:
    """`node1` ... `nodeN`, and `head`, which has a name and an address but runs no sshd.

    Args:
        folder: for keys and logs; it and all of this machine's files are seen by every host.
        count: nodes.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.names = folder, [f"node{i + 1}" for i in range(count)]
        # Several of these may be up at once, here and in other processes: their names and networks
        # are kept apart.
        own = next(_counter)
        self.tag = f"{os.getpid() & 0xFFFF:x}{own}"
        self.network = f"10.{77 + own}.{os.getpid() % 250}"
        self.bridge = f"br{self.tag}"
        self._sshd: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Hosts":
        os.makedirs("/run/sshd", exist_ok=True)
        for key in ("id", "host_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        shutil.copy(self.folder / "id.pub", self.folder / "authorized_keys")
        try:
            _call("ip", "link", "add", self.bridge, "type", "bridge")
            _call("ip", "link", "set", self.bridge, "up")
            for number, name in enumerate([*self.names, "head"], 1):
                self._add(name, f"{self.network}.{number}")
            for name in self.names:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.names, "head"]:
            self.kill(name)
            for command in (
                ["ip", "link", "del", self._link(name)],
                ["ip", "netns", "del", self._space(name)],
            ):
                subprocess.run(command, check=False, capture_output=True)
            shutil.rmtree(f"/etc/netns/{self._space(name)}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)

    def start(self, name: str) -> None:
        """Boot a node; it is reachable when this returns."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self._sshd[name] = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self._space(name)),
                    # The pid namespace matters: launchers end what they find by its name.
                    *("unshare", "-u", "-p", "-f", "--mount-proc", "--kill-child"),
                    *("sh", "-c", f"hostname {name}; exec {_SSHD} -D -e"),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        give_up = time.monotonic() + 10
        while self.run("head", ["ssh", name, "true"]).returncode:
            assert time.monotonic() < give_up, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """End a node and all its processes at once."""
        process = self._sshd.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def cut(self, name: str) -> None:
        """Pull a node's cable: nothing arrives any more, and nobody is told."""
        _call("ip", "link", "set", self._link(name), "down")

    def join(self, name: str) -> None:
        """Plug it in again."""
        _call("ip", "link", "set", self._link(name), "up")

    def slow(self, name: str, megabits: float) -> None:
        """Narrow what a node receives."""
        shape = ["rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms"]
        _call("tc", "qdisc", "replace", "dev", self._link(name), "root", "tbf", *shape)

    def command(self, name: str, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command of this machine that runs it on a host, without ssh."""
        space = ["ip", "netns", "exec", self._space(name)]
        if name == "head":
            return [*space, *argv]
        return ["nsenter", "-t", str(self._init(name)), "-p", "-m", "-u", "-n", *argv]

    def run(self, name: str, argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        """Run a short command on a host."""
        return subprocess.run(
            self.command(name, argv), capture_output=True, text=True, timeout=60, check=False
        )

    def signal(self, name: str, pid: int, number: signal.Signals) -> None:
        """To a process of a node, by the id it has there."""
        assert self.run(name, ["kill", f"-{int(number)}", str(pid)]).returncode == 0

    def processes(self, name: str, word: str) -> list[str]:
        """Command lines on a node that hold ``word``; none of a node that is not up."""
        if name not in self._sshd:
            return []
        listed = self.run(name, ["ps", "-ww", "-eo", "pid=,stat=,args="]).stdout.splitlines()
        return [line for line in listed if word in line and "ps -ww" not in line]

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        """This process's environment for a command on `head`."""
        return {**os.environ, **extra}

    def _init(self, name: str) -> int:
        """The process that is number 1 on a node."""
        parent = self._sshd[name].pid  # ip became unshare, whose child is the node's first
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(children[0])

    def _add(self, name: str, address: str) -> None:
        space, link = self._space(name), self._link(name)
        etc = Path("/etc/netns", space)  # `ip netns exec` lays each entry of it over /etc
        (etc / "ssh").mkdir(parents=True)
        known = [f"{self.network}.{i} {n}" for i, n in enumerate([*self.names, "head"], 1)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
        (etc / "ssh" / "ssh_config").write_text(
            "Host *\n  User root\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            f"  LogLevel ERROR\n  IdentityFile {self.folder}/id\n"
        )
        path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/sbin", os.defpath])
        (etc / "ssh" / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nPidFile none\nUsePAM no\nPermitRootLogin yes\n"
            f"StrictModes no\nAuthorizedKeysFile {self.folder}/authorized_keys\n"
            f"SetEnv PATH={path}\n"
        )
        _call("ip", "netns", "add", space)
        _call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _call("ip", "link", "set", link, "master", self.bridge, "up")
        _call("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _call("ip", "-n", space, "link", "set", device, "up")

    def _space(self, name: str) -> str:
        return f"t{self.tag}-{name}"

    def _link(self, name: str) -> str:
        return f"v{self.tag}{name[:4]}{name[4:]}"[:15]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process's whole group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _call(*argv: object) -> None:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
