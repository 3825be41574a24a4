"""Real processes that form a process group: run a function of a test module on N ranks, get what
each returns.

They are forked from a server that has imported torch and DeepSpeed once: importing them anew in
each process would take longer than most of what is tested.
"""

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])


def run(function: str, ranks: int, *arguments: Any, timeout: float = 150) -> list[Any]:
    """Call ``"package.module:function"`` with ``arguments`` on ``ranks`` processes.

    Returns:
        What each rank's call returned, in rank order.

    Raises:
        AssertionError: a rank failed (with its output), or the time ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = start(function, ranks, folder, *arguments)
        deadline = time.monotonic() + timeout
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in started]
        for process in started:
            if process.exitcode is None:
                os.kill(process.pid or 0, signal.SIGABRT)  # it writes its stacks, and ends
                process.join(5)
            process.kill()
            process.join()
        if any(code != 0 for code in codes):
            logs = [(Path(folder) / f"{r}.log").read_text(errors="replace") for r in range(ranks)]
            # (faulthandler ends with every C module there is)
            ends = [log.partition("Extension modules:")[0][-3000:] for log in logs]
            shown = "\n--- next rank ---\n".join(ends)
            raise AssertionError(f"ranks ended with {codes}\n{shown}")
        return [pickle.loads((Path(folder) / str(r)).read_bytes()) for r in range(ranks)]


def start(function: str, ranks: int, folder: str, *arguments: Any) -> list[ForkServerProcess]:
    """The processes, under way; rank r writes ``folder/r.log`` and its result to ``folder/r``."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    found = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        process = _context.Process(
            target=_main, args=(function, arguments, f"{folder}/{rank}", environment)
        )
        process.start()
        found.append(process)
    return found


def _main(function: str, arguments: tuple[Any, ...], out: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    faulthandler.enable()
    import torch

    torch.set_num_threads(1)
    module, _, name = function.partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(*arguments)
        Path(out).write_bytes(pickle.dumps(result))
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
