"""What a host tells of itself before a job, and what it tries: asked for by `launcher.preflight`.

Every fact is there or has a reason why not: {"value": ...} or {"error": "..."}.
"""

import hashlib
import os
import platform
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.tracked import ask

_DEVICE_FILES = ("nvidia[0-9]*", "kfd", "dxg", "accel[0-9]*")


def gather(request: dict[str, Any]) -> dict[str, Any]:
    """Facts of this host.

    Request: output, config (paths), peers (names), writes and reads (URLs), mlflow (URL or None),
    token (name of a file that the asker left in the output folder), env (with credentials).
    """
    os.environ.update(request["env"])
    asked: dict[str, Callable[[], Any]] = {
        "name": lambda: os.uname().nodename,
        "python": platform.python_version,
        "packages": _packages,
        "code": _code,
        "config": lambda: hashlib.sha256(Path(request["config"]).read_bytes()).hexdigest()[:12],
        "time": time.time,
        "cores": lambda: len(os.sched_getaffinity(0)),
        "accelerators": lambda: sum(len(list(Path("/dev").glob(p))) for p in _DEVICE_FILES),
        "disk_gib": lambda: _free_gib(Path(request["output"])),
        "peers": lambda: _unknown(request["peers"]),
        "shared": lambda: _shared(Path(request["output"]), request["token"]),
        "writes": lambda: [_write(url) for url in request["writes"]],
        "reads": lambda: [_read(url) for url in request["reads"]],
        "mlflow": lambda: _mlflow(request["mlflow"]),
    }
    if "://" in request["output"]:
        asked = {name: f for name, f in asked.items() if name not in ("disk_gib", "shared")}
    return {"facts": {name: _try(fact) for name, fact in asked.items()}}


def _try(fact: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": fact()}
    except Exception as error:  # whatever a library raises is the answer
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _packages() -> dict[str, str]:
    """Those of requirements.txt, or all there are."""
    path = Path(__file__).resolve().parents[1] / "requirements.txt"
    if not path.exists():
        return {d.metadata["Name"]: d.version for d in metadata.distributions()}
    names = re.findall(r"^([A-Za-z0-9._-]+)", path.read_text(), re.MULTILINE)
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _code() -> str:
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder in ("launcher", "pretrain"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _free_gib(path: Path) -> float:
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free / 2**30


def _unknown(peers: list[str]) -> list[str]:
    """Those whose names do not resolve here."""
    found = []
    for peer in peers:
        try:
            socket.getaddrinfo(peer, None)
        except OSError:
            found.append(peer)
    return found


def _shared(output: Path, token: str) -> bool:
    """Whether what the asker left is here. Leaves its own there, which the asker looks for."""
    here = (output / f".preflight-{token}").exists()
    (output / f".preflight-{token}-{os.uname().nodename}").touch()
    return here


def _write(url: str) -> str:
    import fsspec

    path = f"{url.rstrip('/')}/.preflight-{uuid.uuid4().hex}"
    filesystem, inner = fsspec.core.url_to_fs(path)
    filesystem.pipe_file(inner, b"preflight")
    try:
        if filesystem.cat_file(inner) != b"preflight":
            raise OSError(f"{url}: what was written is not what is read")
    finally:
        filesystem.rm_file(inner)
    return url


def _read(url: str) -> str:
    import fsspec

    filesystem, inner = fsspec.core.url_to_fs(url)
    filesystem.cat_file(inner, start=0, end=1)
    return url


def _mlflow(uri: str | None) -> str:
    """Asks the server for one experiment, with the credentials that MLflow's client would use."""
    if not uri or not uri.startswith("http"):
        return "no server"
    ask(uri, "experiments/search", {"max_results": 1})
    return "answers"
