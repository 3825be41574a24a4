"""Two ranks embed what one rank left: every chunk once, and the same rows."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain import comm
from pretrain.config import build
from pretrain.evaluators import _embed, retrieval, zero_shot
from pretrain.evaluators.base import Kept, Result
from pretrain.stop import Stopped
from tests.support import ranks
from tests.support import subject as subjects
from tests.support.clipset import write_folder
from tests.support.subject import Counted

pytestmark = pytest.mark.distributed
CLS = [str(i % 3) for i in range(11)]  # six chunks of two, the last of one


def settings(url: str) -> zero_shot.Settings:
    return build(zero_shot.Settings, {"sets": {"pets": url}, "steps": 2, "noises": 1})


def evaluated(folder: str, url: str, scratch: str) -> dict[str, Any]:
    """What this rank sees."""
    dist.init_process_group("gloo")
    _embed.CHUNK = 2
    subject = subjects.make(
        Path(folder), rank=comm.rank(), world=comm.world_size(), scratch=Path(scratch)
    )
    counted = Counted(subject.heads)
    first = zero_shot.build(settings(url)).run(subject)
    fields = settings(url).model_dump() | {"ks": (1, 5)}
    del fields["templates"], fields["shuffle_images"]
    second = retrieval.build(build(retrieval.Settings, fields)).run(subject)
    alone = dataclasses.replace(subject, scratch=None, kept=Kept())
    third = zero_shot.build(settings(url)).run(alone)
    return {
        "embedded": counted.batches,
        "metrics": scores(first) | scores(second),
        "without scratch": scores(third),
        "details": first.details is not None,
    }


def scores(result: Result) -> dict[str, float]:
    return {k: v for k, v in result.metrics.items() if not k.startswith("cost/")}


def test_ranks_share_the_chunks_and_go_on_with_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, scratch = write_folder(tmp_path / "wds", CLS), tmp_path / "scratch"
    monkeypatch.setattr(_embed, "CHUNK", 2)
    subject = subjects.make(tmp_path, scratch=scratch)
    zero_shot.open_sets(settings(url).sets, subject.data, subject.pulse)
    left = iter([False, False, False, True])
    with pytest.raises(Stopped):
        zero_shot.build(settings(url)).run(
            dataclasses.replace(subject, pulse=lambda: next(left), kept=Kept())
        )
    assert len(list(scratch.rglob("*.npz"))) == 3  # chunks 0, 1 and 2
    torch.manual_seed(5)
    found = ranks.run(f"{__name__}:evaluated", 2, str(tmp_path), url, str(scratch))
    # Chunks 4 (rank 0), 3 and 5 (rank 1) from scratch on; then all anew, without scratch.
    assert found[0]["embedded"][:1] == [2] and found[1]["embedded"][:2] == [2, 1]
    assert sum(found[0]["embedded"][1:]) + sum(found[1]["embedded"][2:]) == 11
    assert found[0]["metrics"] == found[1]["metrics"] and len(found[0]["metrics"]) == 8
    one = zero_shot.build(settings(url)).run(dataclasses.replace(subject, kept=Kept()))
    assert scores(one).items() <= found[0]["metrics"].items()
    assert found[0]["without scratch"] == scores(one)
    assert found[0]["details"] and not found[1]["details"]
