"""No start of a rank waits on a dead build or starts a compiler."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import ops

HOLDER = """
import os, sys
os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)  # as torch's FileBaton does
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_builds_lock_is_removed(tmp_path: Path) -> None:
    """However young: no process has it open."""
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    with _hold(lock) as holder:
        holder.kill()
    assert lock.exists()
    assert ops.clear_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_live_builds_lock_stays(tmp_path: Path) -> None:
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    with _hold(lock):
        os.utime(lock, (0, 0))  # age says nothing: builds take minutes
        assert ops.clear_stale_locks(tmp_path) == []
        assert lock.exists()


def test_many_clearers_at_once(tmp_path: Path) -> None:
    """Ranks start together: one removes the lock, none fails; a build that begins keeps its own."""
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    code = "import pathlib; from pretrain import ops\n"
    code += f"print(len(ops.clear_stale_locks(pathlib.Path({str(tmp_path)!r}))))"
    clearers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    give_up = time.monotonic() + 30
    while lock.exists():
        assert time.monotonic() < give_up
    with _hold(lock):
        assert sorted(c.communicate(timeout=60)[0].strip() for c in clearers) == [
            "0",
            "0",
            "0",
            "1",
        ]
        assert lock.exists()


def test_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is this environment's: another prefix gets another; a user's own choice stays."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = ops.own_extensions_dir()
    assert first.is_dir() and first.is_relative_to(tmp_path)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(first)

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert ops.own_extensions_dir() == first
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert ops.own_extensions_dir() != first

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert ops.own_extensions_dir() == tmp_path / "mine"


def test_own_folder_without_a_writable_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ops.own_extensions_dir().is_relative_to(tmp_path / f"diffdis-pretrain-{os.getuid()}")


def test_nothing_is_built_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.SHM_VARIABLE, raising=False)
    assert ops.build_ops() is False


@pytest.mark.distributed
def test_a_rank_starts_past_a_stale_lock_without_a_compiler(
    tmp_path: Path, repo_root: Path
) -> None:
    """The real `init_distributed` over gloo; a dead build's lock, and compilers that tell on us."""
    compilers, cache, log = tmp_path / "bin", tmp_path / "cache", tmp_path / "compilers.log"
    compilers.mkdir()
    for name in ("cc", "c++", "gcc", "g++", "clang", "ninja", "nvcc"):
        (compilers / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {log}\nexit 1\n')
        (compilers / name).chmod(0o755)
    (cache / "deepspeed_shm_comm").mkdir(parents=True)
    (cache / "deepspeed_shm_comm" / "lock").touch()
    code = """
import importlib.util, sys
import torch
from pretrain import ops
ops.prepare()
assert "mlflow" not in sys.modules and importlib.util.find_spec("mlflow")
import deepspeed
deepspeed.init_distributed("gloo")
ones = torch.ones(3)
deepspeed.comm.all_reduce(ones)
assert deepspeed.comm.comm.cdb.shm_comm_op is None
print("reduced", ones.tolist())
"""
    env = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", ops.SHM_VARIABLE)}
    env |= {"PATH": f"{compilers}{os.pathsep}{env['PATH']}", "TORCH_EXTENSIONS_DIR": str(cache)}
    env |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29817",
    }
    # Importing torch and deepspeed takes 5 s here; a build 100 s; a wait on the lock never ends.
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repo_root,
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert "reduced [1.0, 1.0, 1.0]" in done.stdout, done.stdout + done.stderr
    assert not log.exists(), log.read_text()


class _hold:
    """A process that holds ``lock`` open, killed at the end of the block."""

    def __init__(self, lock: Path) -> None:
        self.lock = lock

    def __enter__(self) -> "subprocess.Popen[str]":
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(self.lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
