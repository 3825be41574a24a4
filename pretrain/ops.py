"""DeepSpeed's compiled ops on CPU: build none that training does not use, wait on no dead build.

Read in deepspeed 0.19.8: `init_distributed` compiles `deepspeed_shm_comm` in every rank
(comm/torch.py `build_shm_op`), about 100 s of CPU. Only `inference_all_reduce` calls it, and only
tensor-parallel layers call that (module_inject/layers.py). Collectives of training go to
torch.distributed whether the op is there or not, so by default it is neither built nor probed for.

`DIFFDIS_SHM=1` asks for it all the same: then `python -m pretrain.ops` compiles it once, ahead of
the ranks.
"""

import hashlib
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

SHM_VARIABLE = "DIFFDIS_SHM"

# FileBaton.release closes its file, then removes it: a lock seen in between is gone after this.
_RELEASE_SECONDS = 0.2


def prepare() -> None:
    """Call once in every rank, before `deepspeed.init_distributed` (it imports deepspeed)."""
    choose_accelerator()
    import_deepspeed()
    if shm_wanted():
        _tools_on_path()
        clear_stale_locks(own_extensions_dir())
    else:
        own_extensions_dir()
        skip_shm_op()


def choose_accelerator() -> None:
    """Tell DeepSpeed to use the CPU where torch sees no GPU; a value already set stays.

    DeepSpeed would come to the same choice, after two warnings in every process.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def import_deepspeed() -> None:
    """Import DeepSpeed without the MLflow that its autotuner looks for.

    Nothing here tunes, and it takes 3.9 of the 9.7 s that importing DeepSpeed takes on two busy
    cores. A process that has MLflow already loses nothing.
    """
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # `import mlflow` then fails
    try:
        import deepspeed  # noqa: F401
    finally:
        if absent:
            del sys.modules["mlflow"]


def shm_wanted() -> bool:
    """Whether the environment asks for the shared-memory op."""
    return os.environ.get(SHM_VARIABLE, "") == "1"


def skip_shm_op() -> None:
    """Make `deepspeed.init_distributed` neither build, load nor probe for the shared-memory op.

    Collectives then run over gloo (or NCCL), as they do in training with the op.
    """
    import deepspeed.comm

    # `import deepspeed.comm.torch as x` would give plain torch: the package re-exports that name.
    backend = sys.modules[f"{deepspeed.comm.__name__}.torch"]
    if not hasattr(backend, "build_shm_op"):  # our pin moved, and with it what we rely on
        raise RuntimeError(
            f"deepspeed {version('deepspeed')} has no comm.torch.build_shm_op; "
            "install the pinned version (make env) or adapt pretrain/ops.py"
        )
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def own_extensions_dir() -> Path:
    """Set TORCH_EXTENSIONS_DIR to a folder of this environment on this host; make and return it.

    The folder's name hashes what a compiled op depends on, so two environments never load each
    other's, and the host, so that a lock's holder is always a process that can be seen here. A
    value that the user has set stays.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(chosen) if chosen else _cache_home() / "torch_extensions" / _environment_key()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        if chosen:
            raise
        # No writable home, as in many containers.
        folder = Path(tempfile.gettempdir()) / f"diffdis-pretrain-{os.getuid()}" / folder.name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


def clear_stale_locks(folder: Path) -> list[Path]:
    """Remove the `lock` files below ``folder`` that killed builds left; return those removed.

    torch waits for ever while a `lock` exists. A live build keeps its lock file open from the
    moment it exists (torch.utils.file_baton), so a lock that no process has open is stale, whatever
    its age. Without /proc nothing is removed. Safe in many processes at once, also during a build.
    """
    if not Path("/proc/self/fd").is_dir():
        return []
    import fcntl

    removed = []
    with open(folder / ".clearing", "w") as gate:
        # One clearer at a time: nobody else replaces the file between our look and our unlink.
        fcntl.flock(gate, fcntl.LOCK_EX)
        suspects = {lock: _identity(lock) for lock in folder.rglob("lock")}
        held = _open_files() if suspects else set()
        suspects = {lock: it for lock, it in suspects.items() if it and it not in held}
        if suspects:
            time.sleep(_RELEASE_SECONDS)
            held = _open_files()
        for lock, it in suspects.items():
            if _identity(lock) == it and it not in held:
                lock.unlink(missing_ok=True)
                removed.append(lock)
    return removed


def build_ops() -> bool:
    """Compile the shared-memory op in this environment's cache, if `DIFFDIS_SHM=1`; else False.

    For one process, before the ranks start: they then load it in a moment.

    Raises:
        RuntimeError: the op does not compile here (no compiler, or not Linux).
    """
    if not shm_wanted():
        return False
    choose_accelerator()
    _tools_on_path()
    clear_stale_locks(own_extensions_dir())
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
    return True


def _tools_on_path() -> None:
    # pip puts ninja beside python; that folder is on PATH only in an activated environment.
    tools = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if tools not in path.split(os.pathsep):
        os.environ["PATH"] = tools + os.pathsep + path


def _cache_home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "diffdis-pretrain"


def _environment_key() -> str:
    parts = [platform.node(), platform.machine(), sys.prefix, sys.version]
    parts += [version("torch"), version("deepspeed"), _cpu_flags()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    # Ops are compiled for the CPU at hand; a home shared by unlike hosts must not share them.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _open_files() -> set[tuple[int, int, int]]:
    """Identities of the files that the processes we may look into hold open."""
    found: set[tuple[int, int, int] | None] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            descriptors = list((process / "fd").iterdir())
        except OSError:
            continue  # it ended, or it is another user's: then it cannot hold a lock in our folder
        found.update(_identity(descriptor) for descriptor in descriptors)
    return {it for it in found if it}


if __name__ == "__main__":
    print(
        "shared-memory op is ready" if build_ops() else f"nothing to build: {SHM_VARIABLE} is not 1"
    )
