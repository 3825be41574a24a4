"""The plan of every job in configs/jobs/ with every preset in configs/, as files of this folder.

    python -m tests.golden          write them anew, after a change that is meant; read the diff

A job file is named after its backend, or BACKEND-VARIANT.yaml. tests/unit/launcher/test_golden.py
compares.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from launcher import backends, jobfile
from launcher.backends import local
from launcher.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "golden"


def plans() -> Iterator[tuple[Path, Plan]]:
    """Where each plan is kept, and the plan as it is now. The working directory must be ROOT.

    What local reads of the machine is fixed: 8 cores, no accelerator, this checkout at CHECKOUT.
    """
    host = local.Host(cores=8, accelerators=0)
    with patch.object(local.Host, "here", lambda: host):
        for job in sorted(Path("configs/jobs").glob("*.yaml")):
            backend = backends.load(job.stem.partition("-")[0])
            for preset in sorted(Path("configs").glob("*.yaml")):
                given = {"config": str(preset), "name": preset.stem}
                yield (
                    FOLDER / job.stem / f"{preset.stem}.txt",
                    backend.plan(jobfile.load(str(job), given)),
                )


def text(plan: Plan) -> str:
    return plan.render().replace(str(ROOT), "CHECKOUT")


def main() -> None:
    os.chdir(ROOT)
    for path, plan in plans():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text(plan), encoding="utf-8")


if __name__ == "__main__":
    main()
