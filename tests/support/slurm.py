"""A real Slurm on loopback: munge, slurmctld and several slurmd, each a node. Root only."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.hosts import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_min_interval=200000,bf_interval=1,requeue_setup_env_fail
KillWait=20
SlurmdTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=train Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class Slurm:
    """A cluster of ``count`` nodes of one core while the block lasts; all see this machine's files.

    Args:
        folder: for state and logs; short, for it holds a socket.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __enter__(self) -> "Slurm":
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        for name in ("state", "munge", *(f"spool.n{i + 1}" for i in range(self.count))):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o711)
        (folder / "munge").chmod(0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        nodes = [
            f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1 "
            "RealMemory=4000 State=UNKNOWN"
            for i in range(self.count)
        ]
        conf = folder / "slurm.conf"
        conf.write_text(
            _CONF.format(
                host=host,
                controller=free_port(),
                folder=folder,
                nodes="\n".join(nodes),
                count=self.count,
            )
        )
        self.environment = {**os.environ, "SLURM_CONF": str(conf)}
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        files = {
            "key-file": "munge/key",
            "socket": "munge.sock",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munge/seed",
        }
        self.run(["munged", "--force", *(f"--{k}={self.folder / v}" for k, v in files.items())])
        self.run(["slurmctld", "-c"])
        for i in range(self.count):
            self.run(["slurmd", "-N", f"n{i + 1}"])
        give_up = time.monotonic() + 30
        while self.run(["sinfo", "-h", "-t", "idle", "-o", "%D"]).strip() != str(self.count):
            assert time.monotonic() < give_up, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        """Nodes first, then the controller; what does not go is killed."""
        self.run(["scancel", "--state=RUNNING", "-u", "root"], check=False)
        pids = []
        for name in [*(f"slurmd.n{i + 1}" for i in range(self.count)), "slurmctld", "munged"]:
            with suppress(OSError, ValueError):
                pids.append(int((self.folder / f"{name}.pid").read_text()))
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            give_up = time.monotonic() + 5
            while time.monotonic() < give_up and any(Path(f"/proc/{p}").exists() for p in pids):
                time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, argv: Sequence[str], check: bool = True) -> str:
        """What a program of Slurm's prints."""
        done = subprocess.run(
            list(argv), env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 or not check, f"{argv}: {done.stderr or done.stdout}"
        return done.stdout
