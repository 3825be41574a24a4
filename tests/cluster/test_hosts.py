"""`python -m launcher hostfile` on hosts of their own, each with its sshd: two ranks train with
ZeRO-3 over the hosts' network, something befalls them, and what comes back is the truth.

Every run that is let go on ends with each sample number learned from exactly once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, require_programs_now
from tests.support import hosts as host_support
from tests.support.host_run import SAMPLES, SETTINGS, learned
from tests.support.hosts import Hosts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

TICKETS = Path.home() / ".cache" / "diffdis-launcher"
SECRET = "s3cret-value-of-the-test"
MIDDLE = 20  # samples into the run, past its first checkpoint
START = 600.0  # seconds that a start may take on a busy machine


class Launcher:
    """`python -m launcher hostfile` on the head, under way."""

    def __init__(self, hosts: Hosts, folder: Path, verb: str = "submit", **fields: Any) -> None:
        self.hosts, self.folder, self.run = hosts, folder, folder / "run"
        options = {"hosts": hosts.names, "backoff_seconds": 1, "preflight": False}
        options |= fields.pop("options", {})
        job = {
            "name": "two-hosts",
            "config": str(ROOT / "configs/debug.yaml"),
            "output": str(self.run),
            "module": "tests.support.host_run",
            "overrides": list(SETTINGS),
            "nodes": len(hosts.names),
            "ranks_per_node": 1,
            "environment": {"folder": str(ROOT)},
            "env": {
                "HOST_RUN_DIARY": str(folder / "diary"),
                "HOST_RUN_STEP_SECONDS": "0.3",
                **fields.pop("env", {}),
            },
            "secrets": {"TEST_TOKEN": "env:TEST_TOKEN"},
            "grace_seconds": 120,
            "backends": {"hostfile": options},
            **fields,
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        self.struck = time.monotonic()
        self.log = folder / f"said-{time.time_ns()}.log"
        command = [sys.executable, "-m", "launcher", "hostfile", verb]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                hosts.command("head", [*command, "--config", str(folder / "job.yaml")]),
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TEST_TOKEN": SECRET},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def beats(self) -> list[dict[str, Any]]:
        """Heartbeats of the ranks there are."""
        found = []
        for path in sorted(self.run.glob("heartbeats/rank-*.json")):
            try:
                found.append(json.loads(path.read_text()))
            except ValueError:
                continue
        return found

    def wait_until(self, samples: int, seconds: float = START) -> list[dict[str, Any]]:
        """Until all ranks are that far; their heartbeats."""
        give_up = time.monotonic() + seconds
        while True:
            beats = self.beats()
            if len(beats) == 2 and all(b["samples"] >= samples for b in beats):
                return beats
            assert self.process.poll() is None and time.monotonic() < give_up, self.said()
            time.sleep(0.05)

    def strike(self, fault: Callable[..., object], *arguments: object) -> None:
        """Do something to the run; times count from then."""
        self.struck = time.monotonic()
        fault(*arguments)

    def attempt_ends(self, seconds: float) -> None:
        """What is left of the attempt has been ended, within seconds of the strike."""
        over = ("] starts again in ", "] no restart is left", "] was stopped by ")
        while not any(word in self.log.read_text(errors="replace") for word in over):
            taken = time.monotonic() - self.struck
            assert self.process.poll() is None and taken < seconds, f"{taken:.0f}\n{self.said()}"
            time.sleep(0.1)
        self._print("the attempt was over")

    def _print(self, what: str) -> None:
        """For the table in docs/LAUNCH.md: `pytest -rP` shows it."""
        seconds, load = time.monotonic() - self.struck, os.getloadavg()[0]
        print(f"{what} after {seconds:.1f} s, at a load of {load:.1f}")

    def code(self, seconds: float = START) -> int:
        """Its exit code; it must end within the time."""
        try:
            code = self.process.wait(seconds)
            self._print(f"exit code {code}")
            return code
        except subprocess.TimeoutExpired:
            host_support.end(self.process)
            raise AssertionError(f"still going after {seconds:.0f} s\n{self.said()}") from None

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def check_no_orphan(self) -> None:
        """No process of the run is on any host that is up, and no ticket."""
        for name in self.hosts.names:
            for word in ("launcher.rank", "host_run", "deepspeed.launcher"):
                assert self.hosts.processes(name, word) == []
        assert not list(TICKETS.glob("two-hosts-*"))

    def check_complete(self, world: int = 2) -> None:
        """It says 0, every sample was learned from once, and nothing is left."""
        assert self.code() == 0, self.said()
        self.check_no_orphan()
        assert learned(self.folder / "diary") == list(range(SAMPLES))
        assert {b["world"] for b in self.beats()} == {world}

    def check_no_secret(self) -> None:
        for path in [*self.folder.rglob("*")]:
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes(), path


@pytest.fixture
def launch(hosts: Hosts, tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """Starts a launcher; hosts and links are as before when the test has ended."""
    started: list[Launcher] = []
    for left in TICKETS.glob("two-hosts-*"):  # of a test that was killed
        left.unlink()

    def start(**fields: Any) -> Launcher:
        started.append(Launcher(hosts, tmp_path, **fields))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            host_support.end(one.process)
    for name in hosts.names:
        hosts.join(name)
        hosts.kill(name)
        hosts.start(name)


@pytest.mark.soak
def test_preflight(launch: Callable[..., Launcher], hosts: Hosts) -> None:
    """Real hosts pass within its 90 s; a server that does not answer is told by each host, with the
    remedy, and a job whose preflight fails is not started."""
    launcher = launch(verb="preflight")
    assert launcher.code(150) == 0, launcher.said()
    assert "preflight: 2 of 2 hosts can run it" in launcher.said()
    launcher = launch(
        env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, options={"preflight": True}
    )
    assert launcher.code(150) == 69, launcher.said()
    assert launcher.said().count("mlflow: URLError") == 2
    assert "remedy: check MLFLOW_TRACKING_URI" in launcher.said()
    assert not list((launcher.run / "ranks").glob("*"))
    assert not list(launcher.run.glob(".preflight*"))


def test_an_unreachable_host_at_the_start(launch: Callable[..., Launcher], hosts: Hosts) -> None:
    """69 within 40 s, and nothing was started; the host is named."""
    hosts.cut("node2")
    launcher = launch(retries=2)
    assert launcher.code(40) == 69, launcher.said()
    assert "host node2 is not reachable" in launcher.said()
    assert not list((launcher.run / "ranks").glob("*/*"))
    launcher.check_no_orphan()


@pytest.mark.soak
def test_sigkill_of_a_rank(launch: Callable[..., Launcher], hosts: Hosts) -> None:
    """The launcher names it, starts again by itself, and the run is complete. On the way: no
    process list, plan, log or file of the run holds the secret, which its ranks have."""
    launcher = launch(retries=1)
    beats = launcher.wait_until(MIDDLE)
    for name in hosts.names:
        listed = hosts.run(name, ["ps", "-ww", "-eo", "args"]).stdout
        assert "launcher.rank" in listed and SECRET not in listed
        pid = next(b["pid"] for b in beats if b["host"] == name)
        environment = hosts.run(name, ["cat", f"/proc/{pid}/environ"]).stdout
        assert f"TEST_TOKEN={SECRET}" in environment
    launcher.strike(hosts.signal, "node2", beats[1]["pid"], signal.SIGKILL)
    launcher.attempt_ends(120)
    launcher.check_complete()
    assert "rank 1 on node2 failed first, with signal 9" in launcher.said()
    launcher.check_no_secret()


@pytest.mark.soak
@pytest.mark.parametrize("cable", [False, True], ids=["processes", "power"])
def test_sigkill_of_a_host(launch: Callable[..., Launcher], hosts: Hosts, cable: bool) -> None:
    """All its processes at once; with `power` nobody is told, as its link is dead too. The run goes
    on on the host that is left, as min_nodes allows."""
    launcher = launch(retries=3, options={"min_nodes": 1, "silent_seconds": 15})
    launcher.wait_until(MIDDLE)
    if cable:
        launcher.strike(hosts.cut, "node2")
        hosts.kill("node2")
    else:
        launcher.strike(hosts.kill, "node2")
    launcher.attempt_ends(120)
    launcher.check_complete(world=1)
    assert "host node2 is not reachable" in launcher.said()


@pytest.mark.soak
def test_a_link_is_cut(launch: Callable[..., Launcher], hosts: Hosts) -> None:
    """The ranks behind it are alive and cannot be asked; they end themselves as soon as the next
    attempt is allowed, and the run goes on on the host that is left."""
    launcher = launch(retries=3, options={"min_nodes": 1})
    launcher.wait_until(MIDDLE)
    launcher.strike(hosts.cut, "node2")
    launcher.attempt_ends(120)
    launcher.check_complete(world=1)


@pytest.mark.soak
def test_a_host_is_lost_and_none_may_be_missing(
    launch: Callable[..., Launcher], hosts: Hosts
) -> None:
    """Without min_nodes the launcher waits for the host, as often as retries allow: 69. When it is
    back the same command completes the run."""
    launcher = launch(retries=1)
    launcher.wait_until(MIDDLE)
    launcher.strike(hosts.kill, "node2")
    assert launcher.code(120) == 69, launcher.said()
    launcher.check_no_orphan()
    hosts.start("node2")
    launch().check_complete()


@pytest.mark.soak
def test_sigstop_of_a_rank(launch: Callable[..., Launcher], hosts: Hosts) -> None:
    """Its heartbeat stops: named and ended after silent_seconds, and started again."""
    launcher = launch(retries=1, options={"silent_seconds": 20})
    beats = launcher.wait_until(MIDDLE)
    launcher.strike(hosts.signal, "node2", beats[1]["pid"], signal.SIGSTOP)
    launcher.attempt_ends(120)
    launcher.check_complete()
    assert "rank 1 on node2" in launcher.said() and "no heartbeat" in launcher.said()


@pytest.mark.soak
def test_sigkill_of_pdsh(launch: Callable[..., Launcher], hosts: Hosts) -> None:
    """deepspeed then ends with 0 and leaves its ranks: they are found, save their state (75), and
    the run goes on without a restart of the budget."""
    launcher = launch(retries=0)
    launcher.wait_until(MIDDLE)
    listed = subprocess.run(
        ["pgrep", "-g", _group(launcher), "pdsh"], capture_output=True, text=True
    )
    launcher.strike(os.kill, int(listed.stdout.split()[0]), signal.SIGKILL)
    launcher.attempt_ends(120)
    launcher.check_complete()
    assert "state is saved" in launcher.said()


@pytest.mark.soak
def test_sigterm(launch: Callable[..., Launcher]) -> None:
    """The ranks save: 75 within 150 s, and the same command completes the run."""
    launcher = launch()
    launcher.wait_until(MIDDLE)
    launcher.strike(launcher.process.send_signal, signal.SIGTERM)
    assert launcher.code(150) == 75, launcher.said()
    launcher.check_no_orphan()
    launch().check_complete()


@pytest.mark.soak
def test_preflight_names_the_slow_host(three_hosts: Hosts, tmp_path: Path) -> None:
    """A narrow link to one of three."""
    require_programs_now("tc")
    three_hosts.slow("node3", 100)
    launcher = Launcher(three_hosts, tmp_path, "preflight")
    assert launcher.code(150) == 0, launcher.said()
    slow = [line for line in launcher.said().splitlines() if line.endswith(" slow")]
    assert [line.split()[0] for line in slow] == ["node3"], launcher.said()
    assert "link: slow:" in launcher.said()


@pytest.mark.soak
def test_an_error_comes_with_its_traceback_first(launch: Callable[..., Launcher]) -> None:
    """No restart is left: the code is the rank's, its traceback is shown, not its peer's."""
    launcher = launch(env={"HOST_RUN_FAIL": f"1:{MIDDLE}"})
    assert launcher.code() == 1, launcher.said()
    said = launcher.said()
    assert "rank 1 on node2 failed first, with exit code 1" in said
    assert (
        "RuntimeError: a test of the launcher ends this rank" in said.partition("failed first")[2]
    )
    launcher.check_no_orphan()


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_other_launchers(
    launch: Callable[..., Launcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """deepspeed over mpirun; Debian has both kinds side by side."""
    require_programs_now(f"mpirun.{kind}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").symlink_to(f"/usr/bin/mpirun.{kind}")
    # MPICH looks for it beside mpirun, there.
    (tmp_path / "bin" / "hydra_pmi_proxy").symlink_to("/usr/bin/hydra_pmi_proxy")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("HYDRA_IFACE", "eth0")  # the head's own name is this machine's
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    launch(options={"launcher": kind}).check_complete()


def _group(launcher: Launcher) -> str:
    """The process group of deepspeed's runner."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"deepspeed.launcher.runner" in command and str(launcher.folder).encode() in command:
                return process.name
        except OSError:
            continue
    raise AssertionError("no deepspeed")
