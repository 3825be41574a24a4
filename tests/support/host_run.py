"""`python -m tests.support.host_run train ...`: as `python -m pretrain train ...`, with a diary of
what each optimizer step learned from, and slow enough to be hit in the middle.

HOST_RUN_DIARY: folder of the diaries. HOST_RUN_STEP_SECONDS: added to every step.
HOST_RUN_FAIL: "RANK:SAMPLES"; that rank raises there, once.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS, BATCH, EVERY = 12, 4, 12
SAMPLES = STEPS * BATCH
# A checkpoint every 3 steps; half the modules, no evaluation: what is tested here is the launcher.
SETTINGS = (
    f"training.samples={SAMPLES}",
    f"training.global_batch={BATCH}",
    "engine.micro_batch=2",
    f"checkpoint.every_samples={EVERY}",
    "checkpoint.keep=3",
    "data.workers=0",
    "model.unet={channels: [16], attention: [true], head_dim: 16, norm_groups: 8}",
    "evaluators={validation: null, zero_shot: null, retrieval: null, samples: null}",
    "watchdog={timeout_seconds: 300.0, start_seconds: 600.0, save_seconds: 300.0, "
    "heartbeat_seconds: 0.5}",
)


def main() -> int:
    """Exit code of the training."""
    from pretrain import stop

    stop.install(stop.GIVE_UP_SECONDS)
    stop.tolerate_closed_output()
    import torch

    from pretrain import __main__ as cli
    from pretrain import comm
    from tests.support import faulty_run

    torch.set_num_threads(1)
    folder = Path(os.environ["HOST_RUN_DIARY"], os.environ["LAUNCHER_ATTEMPT"])
    folder.mkdir(parents=True, exist_ok=True)
    faulty_run._keep_diary(folder / f"diary-{comm.rank()}.jsonl")
    _disturb(float(os.environ.get("HOST_RUN_STEP_SECONDS", "0")), folder.parent / "failed")
    return cli.main(sys.argv[1:])


def _disturb(step_seconds: float, failed: Path) -> None:
    from pretrain import comm
    from pretrain.watchdog import Watchdog

    rank, _, at = os.environ.get("HOST_RUN_FAIL", "-1:0").partition(":")
    real = Watchdog.beat

    def beat(self: Watchdog, phase: str, samples: int) -> None:
        real(self, phase, samples)
        if phase == "step":
            time.sleep(step_seconds)
            if int(rank) == comm.rank() and samples >= int(at) and not failed.exists():
                failed.touch()
                raise RuntimeError("a test of the launcher ends this rank")

    Watchdog.beat = beat  # type: ignore[method-assign]


# --- what the tests read --------------------------------------------------------------------------


class Diary:
    """Of the ranks of one attempt, as tests.support.faulty_run.trajectory reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def diary(self) -> list[dict[str, Any]]:
        """Entries that all ranks have, with their positions together."""
        import json

        ranks = [
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            for path in sorted(self.folder.glob("diary-*.jsonl"))
        ]
        return [
            {**entries[0], "positions": sorted(p for e in entries for p in e["positions"])}
            for entries in zip(*ranks, strict=False)
        ]


def learned(diaries: Path) -> Sequence[int]:
    """Sample numbers that the final weights come from, sorted, over all attempts."""
    from tests.support import faulty_run

    attempts = [Diary(folder) for folder in sorted(diaries.iterdir()) if folder.is_dir()]
    return faulty_run.positions(faulty_run.trajectory(attempts))  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
