"""A server's own network on this machine, behind a link of a stated rate. Root only."""

import os
import shutil
import subprocess

PROGRAMS = ("ip", "tc")


class Link:
    """While the block lasts: a network namespace whose answers come through a link that the kernel
    shapes (a token bucket), as a network card or a provider's limit would.

    Args:
        megabits: a second, of what comes from the namespace.

    Attributes:
        address: the namespace's, from here.
        within: what a command is prefixed with to run in the namespace.
    """

    def __init__(self, megabits: float) -> None:
        self.megabits = megabits
        self._name = f"link{os.getpid() & 0xFFFF:x}"
        network = f"10.99.{os.getpid() % 250}"
        self._here, self.address = f"{network}.1", f"{network}.2"
        self.within = ("ip", "netns", "exec", self._name)

    @staticmethod
    def missing() -> str | None:
        """What keeps this machine from having one, in words; None if nothing does."""
        if os.geteuid() != 0:
            return "needs root"
        absent = [program for program in PROGRAMS if shutil.which(program) is None]
        return f"needs {' and '.join(absent)} (apt-get install iproute2)" if absent else None

    def __enter__(self) -> "Link":
        near, far, name = f"{self._name}h", f"{self._name}s", self._name
        shape = ["rate", f"{self.megabits}mbit", "burst", "256kb", "latency", "50ms"]
        try:
            _call("ip", "netns", "add", name)
            _call("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
            _call("ip", "address", "add", f"{self._here}/24", "dev", near)
            _call("ip", "link", "set", near, "up")
            _call(*self.within, "ip", "address", "add", f"{self.address}/24", "dev", far)
            _call(*self.within, "ip", "link", "set", far, "up")
            _call(*self.within, "ip", "link", "set", "lo", "up")
            _call(*self.within, "tc", "qdisc", "add", "dev", far, "root", "tbf", *shape)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The link's near end goes with the far one.
        subprocess.run(["ip", "netns", "del", self._name], check=False, capture_output=True)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
