"""Checkpoints of many ranks by the real code, of parameters of two numbers a rank: what is left is
what grows with ranks and files, not with bytes."""

import json
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint
from pretrain.checkpoint import CheckpointConfig, Checkpointer
from pretrain.parts import STATE, Parts, file_name
from pretrain.weights import Entry, write

KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema-1")
NAME, PARAMETERS = "model.trunk.unet.down_blocks.{}.attentions.0.weight", 24
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Costs:
    """Of one checkpoint.

    Attributes:
        files: in its folder.
        manifest_bytes: of manifest.json, which lists them.
        commit_seconds: rank 0's thread, from the last receipt to the marker.
        verify_seconds: one rank's share at resume, without the reading of bytes.
        opened: files that one rank opens to take up its part, written by as many ranks.
        opened_resized: the same on half as many ranks.
    """

    ranks: int
    files: int
    manifest_bytes: int
    commit_seconds: float
    verify_seconds: float
    opened: int
    opened_resized: int


def measure(ranks: int) -> Costs:
    """Write, commit, verify and read a checkpoint of that many ranks on this machine's disk."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "samples-000000000001")
        numel = 2 * ranks
        shapes = {NAME.format(n): [numel] for n in range(PARAMETERS)}
        for rank in range(ranks):
            _write_rank(folder, rank, shapes)
        state = {
            "format": 2,
            "world_size": ranks,
            "steps": 1.0,
            "kinds": sorted(KINDS),
            "shapes": shapes,
        }
        checkpointer = Checkpointer(root, CheckpointConfig(keep=1))
        save = checkpoint._Save(folder, aborted=threading.Event())
        began = time.perf_counter()
        assert checkpointer._commit(save, state, {"samples": 1}, ranks)
        committed = time.perf_counter() - began
        manifest = folder / "manifest.json"
        began = time.perf_counter()
        assert checkpoint.damage(folder, ranks // 2, ranks) is None
        verified = time.perf_counter() - began
        return Costs(
            ranks,
            sum(1 for p in folder.rglob("*") if p.is_file()),
            manifest.stat().st_size,
            committed,
            verified,
            _opened(folder, shapes, ranks),
            _opened(folder, shapes, max(1, ranks // 2)),
        )


def _write_rank(folder: Path, rank: int, shapes: dict[str, list[int]]) -> None:
    """A rank's files and its receipt, as `parts.write_part` leaves them."""
    facts: dict[str, Any] = {}
    value = torch.zeros(2)
    for kind in KINDS:
        name = file_name(kind, rank)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        facts[name] = write(folder / name, [Entry.of(n, value) for n in shapes], {}).facts()
    receipts = folder / checkpoint.RECEIPTS
    receipts.mkdir(exist_ok=True)
    (receipts / f"rank-{rank:05d}.json").write_text(json.dumps(facts))


def _opened(folder: Path, shapes: dict[str, list[int]], ranks: int) -> int:
    """Files that the last of ``ranks`` opens for its part of every parameter."""
    parts = Parts(folder)
    for kind in KINDS:
        for name, (numel,) in shapes.items():
            part = -(-numel // ranks)
            parts.read(kind, name, (ranks - 1) * part, numel)
    assert (folder / STATE).exists()
    return len(parts._open)
