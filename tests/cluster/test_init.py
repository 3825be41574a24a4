"""`launcher.init` as process 1 of a pid namespace, as in a container without an init. Root only."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, require_programs_now

pytestmark = pytest.mark.cluster

# Its child leaves an orphan behind, which ends; then it waits for a signal.
WORK = """
import os, signal, subprocess, sys, time
from launcher import init
def work():
    def stop(*_):
        print("zombies", sum(b") Z" in open(f"/proc/{p}/stat", "rb").read()
                             for p in os.listdir("/proc") if p.isdigit()), flush=True)
        os._exit(75)
    signal.signal(signal.SIGTERM, stop)
    subprocess.run(["sh", "-c", "sleep 0.2 & exit 0"])
    time.sleep(0.6)
    print("ready", os.getppid(), flush=True)
    time.sleep(60)
sys.exit(init.run(work))
"""


@pytest.fixture
def container(tmp_path: Path) -> list[str]:
    require_programs_now("unshare")
    if os.geteuid() != 0:
        pytest.skip("needs root, for a pid namespace")
    return ["unshare", "-p", "-f", "--mount-proc", "--kill-child"]


def test_signals_are_passed_on_and_orphans_reaped(container: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*container, sys.executable, "-c", WORK], cwd=ROOT, stdout=out, stderr=out
        )
    give_up = time.monotonic() + 20
    while "ready" not in log.read_text():
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.02)
    assert "ready 1" in log.read_text()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    assert process.wait(10) == 75, log.read_text()
    assert "zombies 0" in log.read_text()


def test_it_ends_as_its_child_did(container: list[str]) -> None:
    for work, code in (("lambda: 3", 3), ("lambda: os.kill(os.getpid(), 9)", 137)):
        text = f"import os, sys; from launcher import init; sys.exit(init.run({work}))"
        done = subprocess.run([*container, sys.executable, "-c", text], cwd=ROOT)
        assert done.returncode == code
