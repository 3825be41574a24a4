"""A run with a committed checkpoint, made without training, a small set, and suites over it."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain import config as configs
from pretrain.checkpoint import CheckpointConfig, Checkpointer
from pretrain.data import index
from pretrain.data.emoji import write_shard
from pretrain.data.evalset import read_all
from pretrain.data.reader import ReadConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.ema import Ema, EmaConfig
from pretrain.partitions import Partitions
from pretrain.run_config import RunConfig
from pretrain.tracking import build
from pretrain.train import FINISHED, build_task
from tests.support.plain import PlainEngine

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 160
PICTURES = 12


class TaskEngine(PlainEngine):
    """A freshly initialised task, as something that can be saved."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        self.module = build_task(config, tokenizer)  # type: ignore[assignment]
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained)
        self.partitions = Partitions(self.module, self.optimizer, 0, 1)
        self.ema = Ema(self.partitions.flats, EmaConfig())
        for flat in self.partitions.flats:
            self.optimizer.state[flat] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }


def make_run(output: Path, seed: int = 0, **changes: Any) -> Path:
    """The folder of a run of configs/debug.yaml that has just ended."""
    tree = configs.read_yaml(ROOT / "configs/debug.yaml")
    tree["data"]["tokenizer"] = str(ROOT / tree["data"]["tokenizer"])
    tree |= {"output": str(output), "seed": seed, **changes}
    config = configs.build(RunConfig, tree)
    tokenizer = Tokenizer(config.data.tokenizer)
    output.mkdir(parents=True)
    facts = {"config": config.resolved(), "tokenizer_sha256": tokenizer.sha256}
    engine = TaskEngine(config, tokenizer)
    Checkpointer(output / "checkpoints", CheckpointConfig(rewind_in_memory=False)).save(
        engine, SAMPLES, facts, last=True
    )
    (output / "config.json").write_text(json.dumps(config.resolved()))
    tracker = build(config.tracking, str(output), 0)
    tracker.start(config.tracking.run_info(str(output)))
    for i in range(1, 6):
        values = {"generate/loss": 1 / i, "align/loss": 3 / i + seed, "images_per_second": 20.0}
        tracker.metrics(values, 32 * i)
    tracker.metrics({"validation/generate/loss": 0.5}, SAMPLES)
    tracker.finish("preempted")
    line = {"samples": SAMPLES, "validation/align/loss": 1.5}
    (output / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    done = {"samples": SAMPLES, "progress": {"samples": SAMPLES, "seconds": 8.0}}
    (output / FINISHED).write_text(json.dumps(done))
    return output


def make_set(folder: Path, pictures: int = PICTURES) -> str:
    """The manifest of some pictures of the committed corpus."""
    folder.mkdir(parents=True)
    everything = read_all(str(ROOT / "data/emoji/heldout-concepts.json"), ReadConfig())
    raw = [r for r, _ in zip(everything, range(pictures), strict=False)]
    write_shard(folder / "0.tar.gz", [{"__key__": r.key, **r.files} for r in raw])
    url = str(folder / "small.json")
    index.build([str(folder / "0.tar.gz")], url)
    return url


def make_suite(path: Path, manifest: str, **entries: Any) -> Path:
    """A suite over the one set ``small``; without entries, one of each kind."""
    quick = {"evaluator": "zero_shot", "sets": ["small"], "steps": 1}
    tree = {
        "name": "tried",
        "sets": {"small": {"manifest": manifest}},
        "entries": entries
        or {
            "swept": {**quick, "sweep": {"noises": [1, 2]}},
            "found": {"evaluator": "retrieval", "sets": ["small"], "steps": 1, "noises": 1},
            "drawn": {"evaluator": "samples", "prompts": ["owl", "red apple"], "steps": 1},
        },
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def evaluate(*arguments: str) -> int:
    """`python -m pretrain evaluate …` on this rank."""
    from pretrain.__main__ import main

    return main(["evaluate", *arguments])
