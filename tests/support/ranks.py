"""Real processes that form a process group: run a function of a test module on N ranks, get what
each returns."""

import importlib
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(function: str, ranks: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """Call ``"package.module:function"`` with JSON ``arguments`` on ``ranks`` processes.

    Returns:
        What each rank's call returned, in rank order.

    Raises:
        AssertionError: a rank failed (with its output), or the time ran out.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        processes = []
        for rank in range(ranks):
            log = open(f"{folder}/{rank}.log", "wb")  # noqa: SIM115
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            command = [
                sys.executable,
                "-m",
                "tests.support.ranks",
                function,
                json.dumps(arguments),
                f"{folder}/{rank}",
            ]
            processes.append(
                subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
            )
        try:
            codes = [p.wait(timeout) for p in processes]
        except subprocess.TimeoutExpired:
            codes = [None] * ranks
        finally:
            for p in processes:
                p.kill()
                p.wait()
        if any(codes) or None in codes:
            logs = [
                Path(f"{folder}/{r}.log").read_text(errors="replace")[-3000:] for r in range(ranks)
            ]
            raise AssertionError(f"ranks ended with {codes}\n" + "\n--- next rank ---\n".join(logs))
        return [pickle.loads(Path(f"{folder}/{r}").read_bytes()) for r in range(ranks)]


def _main() -> None:
    import torch

    torch.set_num_threads(1)
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main()
