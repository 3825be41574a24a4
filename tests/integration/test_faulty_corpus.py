"""Training on a corpus with planted faults: to the end, with every refusal counted exactly."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pretrain.data import index as indexer
from pretrain.data.manifest import Manifest
from tests.support import tiny
from tests.support.faulty import MAX_BYTES, Planted, plant

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 2


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planted, str]:
    """The corpus and its manifest."""
    folder = tmp_path_factory.mktemp("faulty")
    made = plant(folder)
    out = str(folder / "manifest.json")
    found = indexer.build(list(made.shards), out)
    assert found.rejects["truncated tar"] == 1
    assert found.manifest is not None
    assert found.manifest.num_samples == made.good + made.bad
    return made, out


def run(output: Path, manifest: str, *settings: str) -> subprocess.CompletedProcess[str]:
    samples = Manifest.load(manifest).num_samples
    overrides = (
        f"output={output}",
        f"data.train={manifest}",
        f"training.samples={EPOCHS * samples}",
        f"training.global_batch={samples}",  # an epoch a step, half of it on each rank
        f"engine.micro_batch={samples // 2}",
        "data.workers=1",
        tiny.ONE_LEVEL_SETTING,
        f"data.max_bytes={MAX_BYTES}",
        "evaluators={validation: null, zero_shot: null, retrieval: null, samples: null}",
        *settings,
    )
    parts = [part for setting in overrides for part in ("--set", setting)]
    return subprocess.run(
        [
            *(sys.executable, "-m", "launcher", "local", "--config", "configs/debug.yaml"),
            *("--ranks", "2", *parts),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_training_goes_to_the_end_and_every_refusal_is_counted(
    planted: tuple[Planted, str], tmp_path: Path
) -> None:
    corpus, manifest = planted
    done = run(tmp_path / "run", manifest, "data.max_reject_rate=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [
        json.loads(line)
        for path in (tmp_path / "run").glob("rejects*.jsonl")
        for line in path.read_text().splitlines()
    ]
    expected = Counter({reason: EPOCHS * n for reason, n in corpus.expected.items()})
    assert Counter(row["reason"] for row in rows) == expected
    finished = json.loads((tmp_path / "run" / "_FINISHED").read_text())
    totals: Counter[str] = Counter()
    for name, count in finished["progress"]["rejects"].items():
        totals[name.partition("\t")[0]] += count
    assert totals == expected


@pytest.mark.soak  # tests/unit/data has the rate itself
def test_too_many_refusals_stop_the_run_and_name_the_worst_shards(
    planted: tuple[Planted, str], tmp_path: Path
) -> None:
    _, manifest = planted
    settings = ("data.max_reject_rate=0.01", "training.samples=100000")
    done = run(
        tmp_path / "run", manifest, *settings, "training.global_batch=64", "engine.micro_batch=32"
    )
    assert done.returncode not in (0, 75)
    text = done.stdout + done.stderr
    assert "data.max_reject_rate=0.01" in text and "Worst shards: " in text


def test_memory_stays_bounded(planted: tuple[Planted, str]) -> None:
    """The bomb alone would take 1.2 GB as RGB."""
    corpus, manifest = planted
    script = f"""
import resource
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.tokenizer import Tokenizer
config = DataConfig(train={manifest!r}, tokenizer="data/emoji/tokenizer.model", size=32, workers=0)
loader = Loader(config, Tokenizer(config.tokenizer), 0, 4, 0, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
batches = iter(loader)
seen = set()
for _ in range(-(-loader.num_samples // 4)):
    seen.update(next(batches).keys)
print(len(seen), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    keys, grown_mib = map(int, done.stdout.split())
    assert keys == corpus.good
    assert grown_mib < 200
