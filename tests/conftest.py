"""What every test shares: one thread a process, the checkout's path, the rule for programs."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported anywhere: tests start several processes on few cores, and golden losses
# need one order of summation.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The node's disk cache of shards: of these tests alone, and gone with them.
_CACHE = tempfile.mkdtemp(prefix="diffdis-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHE

ROOT = Path(__file__).resolve().parents[1]


def require_programs_now(*names: str) -> None:
    """Skip the running test if a program is missing; fail it where CI=true, which must have all."""
    missing = [name for name in names if shutil.which(name) is None]
    if not missing:
        return
    reason = f"needs {', '.join(missing)}, not found on PATH"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{reason}; CI must install it (see .ci/run)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def require_programs() -> Callable[..., None]:
    """`require_programs("sshd", "srun")` at the start of a test that needs real components."""
    return require_programs_now


@pytest.fixture
def repo_root() -> Path:
    """The checkout, as the working directory of processes that a test starts."""
    return ROOT
