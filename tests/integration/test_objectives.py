"""Each of the three further methods as a user trains it: 100 steps of the quickstart on two ranks,
stopped in the middle and taken up again, then its own way of inference."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Minutes each: tests/distributed/test_objectives.py has their arithmetic on two ranks.
pytestmark = [pytest.mark.soak, pytest.mark.distributed, pytest.mark.timeout(3000)]

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH = 100, 16
METHODS = {
    "cdcd": ["objectives.cdcd.weight=1"],
    "dcd": ["objectives.dcd.weight=1"],
    "disco": ["objectives.disco.weight=1", "objectives.disco.codes=4", "objectives.disco.values=8"],
}
HELDOUT = "data/emoji/heldout-renderings.json"


def pretrain(*arguments: str) -> str:
    command = [sys.executable, "-m", "pretrain", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def launch(output: Path, method: str) -> subprocess.Popen[bytes]:
    overrides = (
        *METHODS[method],
        *(
            f"output={output}",
            f"training.samples={STEPS * BATCH}",
            f"training.global_batch={BATCH}",
        ),
        *(f"engine.micro_batch={BATCH // 2}", "training.log_every_samples=80"),
        *(f"checkpoint.every_samples={40 * BATCH}", "optimizer.warmup_samples=160"),
        f"evaluators={{validation: {{manifest: {HELDOUT}, at_start: true}}}}",
    )
    sets = [part for text in overrides for part in ("--set", text)]
    command = [sys.executable, "-m", "launcher", "local", "--config", "configs/quickstart.yaml"]
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, "--ranks", "2", *sets],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )


def wait(process: subprocess.Popen[bytes], output: Path, expected: int) -> None:
    code = process.wait(timeout=1500)
    assert code == expected, output.with_suffix(".log").read_text(errors="replace")[-4000:]


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_is_stopped_goes_on_and_infers(method: str, tmp_path: Path) -> None:
    output = tmp_path / method
    process = launch(output, method)
    committed = output / "checkpoints" / f"samples-{40 * BATCH:012d}" / "COMMITTED"
    deadline = time.monotonic() + 1500
    while not committed.exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    wait(process, output, 75)
    process = launch(output, method)
    wait(process, output, 0)
    assert "resuming" in output.with_suffix(".log").read_text(errors="replace")

    lines = (output / "evaluations.jsonl").read_text().splitlines()
    scores = [json.loads(line) for line in lines]
    first, last = scores[0], scores[-1]
    assert (first["samples"], last["samples"]) == (0, STEPS * BATCH)
    for head in ("generate", "align"):
        name = f"validation/{head}/loss"
        assert last[name] < first[name], name
    assert f"validation/{method}/loss" in last
    {"cdcd": fewer_steps, "dcd": energies, "disco": codes}[method](output, tmp_path)


def fewer_steps(output: Path, folder: Path) -> None:
    """The samplers as they are."""
    model, picture = folder / "model", folder / "picture.png"
    pretrain("export", "--output", str(output), "--to", str(model))
    drawn = ("red apple", "blue car", "--steps", "6", "--out", str(picture))
    pretrain("sample", "--model", str(model), *drawn)
    assert picture.stat().st_size > 1000


def energies(output: Path, folder: Path) -> None:
    """argmin_c E(e_c | z)."""
    score = f"evaluators={{zero_shot_energy: {{sets: {{renderings: {HELDOUT}}}, noises: 1}}}}"
    said = pretrain("evaluate", "--output", str(output), "--set", score)
    found = json.loads(said[said.index("{") :])
    assert found["zero_shot_energy/renderings/top1"] >= 0
    assert 0 < found["zero_shot_energy/renderings/chance"] < 0.01


def codes(output: Path, folder: Path) -> None:
    """A prior of the second stage, and pictures by its codes, of the run and of its export."""
    small = ("prior.layers=2", "prior.width=64", "fit.samples=2048")
    sets = [part for text in small for part in ("--set", text)]
    said = pretrain("disco", "prior", "--output", str(output), *sets)
    facts = json.loads(said[said.index("{") :])
    assert 0 < facts["heldout_nats_per_image"] < 4 * 2.1  # 4 codes of 8 values: 4 ln 8 at most
    picture = folder / "picture.png"
    drawn = ("red apple", "blue car", "--steps", "6", "--out", str(picture))
    pretrain("disco", "sample", *drawn, "--output", str(output))
    assert picture.stat().st_size > 1000
    model, again = folder / "model", folder / "again.png"
    pretrain("export", "--output", str(output), "--to", str(model))
    pretrain("sample", "--model", str(model), *drawn[:-1], str(again))
    assert again.read_bytes() == picture.read_bytes()
