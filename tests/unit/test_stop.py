"""Signals ask a run to stop, in any phase; all ranks learn of it; closed pipes change nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import ranks

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
# Waits in C without the GIL, and no signal ends the wait: as in a collective.
IN_C = """
import ctypes
def wait_in_c():
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("in C", flush=True)
    lock(mutex)
"""


def start(script: str, *arguments: Any, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **options)


def wait_for_line(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None and process.stdout.readline().strip() == line


def wait_until(true: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_heavy_and_no_handler_comes_with_the_import() -> None:
    """Other commands keep what was there: the default Ctrl-C, or, of a shell's background, none."""
    script = """
import signal, sys
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
from pretrain import stop
from pretrain.__main__ import main
heavy = {"torch", "numpy", "pydantic", "yaml", "fsspec", "subprocess"} & sys.modules.keys()
assert not heavy, heavy
try:
    main(["train", "--help"])
except SystemExit:
    pass
assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
"""
    process = start(script)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_slow_import_asks_and_kills_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(0.4)\n"
    (tmp_path / "slow.py").write_text(slow)
    script = """
import sys
from pretrain import stop
stop.install(60)
stop.install()
sys.path.insert(0, sys.argv[1])
import slow
print(stop.Stop().seen())
"""
    process = start(script, tmp_path)
    wait_for_line(process, "importing")
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "True\n"), err


def test_a_rank_that_waits_in_c_tells_the_others(tmp_path: Path) -> None:
    """The main thread cannot run its handler, and yet the flag appears."""
    script = f"""
import sys
from pathlib import Path
from pretrain import stop
{IN_C}
stop.install()
stop._state.flag = Path(sys.argv[1])
wait_in_c()
"""
    process = start(script, tmp_path / "stop")
    try:
        wait_for_line(process, "in C")
        assert not (tmp_path / "stop").exists()
        process.send_signal(signal.SIGTERM)
        wait_until((tmp_path / "stop").exists)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("joined", [False, True])
def test_a_rank_alone_at_the_rendezvous_gives_up(joined: bool) -> None:
    script = f"""
import sys
from pretrain import stop
{IN_C}
stop.install(0.3)
stop._state.joined = {joined}
wait_in_c()
"""
    process = start(script)
    try:
        wait_for_line(process, "in C")
        process.send_signal(signal.SIGUSR1)
        if joined:  # there may be something to save
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.0)
        else:
            assert process.wait(20) == 75
    finally:
        process.kill()
        process.communicate()


def test_a_signal_to_a_forked_child_is_not_the_parents() -> None:
    script = """
import os, signal, time
from pretrain import stop
stop.install()
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, b"x")
    while not stop._state.asked:
        time.sleep(0.01)
    os._exit(7)
os.read(read, 1)
os.kill(child, signal.SIGUSR1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
time.sleep(0.2)
assert not stop._state.asked
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.2)
assert stop._state.asked
"""
    process = start(script)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def job(folder: str) -> dict[str, Any]:
    """On two ranks: only rank 1 gets a signal."""
    import torch.distributed as dist

    from pretrain import comm
    from pretrain.stop import Stop

    dist.init_process_group("gloo")
    stop = Stop()
    said: dict[str, Any] = {"at first": stop.agreed()}
    stop.share(folder)
    said["after share"] = (stop.seen(), os.listdir(folder))
    comm.barrier()
    if comm.rank() == 1:
        signal.raise_signal(signal.SIGTERM)
    began = time.monotonic()
    while not stop.seen() and time.monotonic() < began + 20:
        time.sleep(0.01)
    said["seconds"] = time.monotonic() - began
    said["seen"] = stop.seen()
    said["agreed"] = stop.agreed()
    dist.destroy_process_group()
    return said


def test_the_other_rank_sees_it_without_a_collective(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()  # left by the run before
    for said in ranks.run("tests.unit.test_stop:job", 2, str(tmp_path)):
        assert said["at first"] is False and said["after share"] == (False, [])
        assert said["seen"] is True and said["agreed"] is True and said["seconds"] < 3


@pytest.mark.parametrize("tolerant", [True, False])
@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_closed_pipes_change_no_exit_code(tmp_path: Path, closed: str, tolerant: bool) -> None:
    """Without the wrapper the same program fails: the fault is real."""
    script = """
import os, sys
from pathlib import Path
from pretrain import stop
if sys.argv[2] == "True":
    stop.tolerate_closed_output()
    stop.tolerate_closed_output()
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    print("line", file=stream, flush=True)
    print("long" * 50_000, file=stream)
    stream.flush()
    os.write(stream.fileno(), b"a library's own line")
print("stays in the buffer")
assert sys.stdout.encoding and not sys.stdout.isatty()
Path(sys.argv[1]).touch()
sys.exit(75)
"""
    gone, out = os.pipe()
    streams = {
        name: out if closed in (name, "both") else subprocess.PIPE for name in ("stdout", "stderr")
    }
    process = start(script, tmp_path / "done", tolerant, stdin=subprocess.PIPE, **streams)
    os.close(out)
    os.close(gone)
    _, err = process.communicate("go\n", timeout=60)
    assert not (tolerant and "Exception ignored" in (err or ""))
    assert ((tmp_path / "done").exists(), process.returncode == 75) == (tolerant, tolerant)


def test_streams_that_were_never_open(tmp_path: Path) -> None:
    """What is opened next must not get number 1 and be printed into."""
    script = """
import os, sys
from pretrain import stop
stop.tolerate_closed_output()
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    os.write(1, b"from C")
sys.exit(75)
"""
    command = f'exec "{sys.executable}" -c "$0" "$1" >&- 2>&-'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = ["sh", "-c", command, script, str(tmp_path / "file")]
    assert subprocess.run(arguments, cwd=ROOT, env=environment, timeout=60).returncode == 75
    assert (tmp_path / "file").read_text() == ""


def test_the_trainers_process_survives_a_signal_and_a_closed_pipe_in_its_imports(
    tmp_path: Path,
) -> None:
    """It reaches its own end: the error of the library that is imported, with its exit code."""
    (tmp_path / "torch.py").write_text("""
import sys
from pretrain.errors import DataError
print("importing", flush=True)
sys.stdin.readline()
print("nobody reads this", flush=True)
raise DataError("the end of the import")
""")
    command = [sys.executable, "-m", "pretrain", "--local_rank=0", "train", "--config", "none.yaml"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    wait_for_line(process, "importing")
    process.stdout.close()
    for number in SIGNALS:
        process.send_signal(number)
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(60) == 2 and err == "error: the end of the import\n", err
