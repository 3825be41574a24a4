"""What the study measures of a trained cell: `python -m benchmarks._joint.score TASK RESULT`.

It calls the heads that `python -m pretrain evaluate` calls, on one rank, with the evaluators' rules
for ties, and keeps the hits picture by picture that paired tests need.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._joint import params, peers, stats
from pretrain import config as configs
from pretrain import distances
from pretrain.data.evalset import LabelledSet, load_labelled
from pretrain.data.tokenizer import Tokenizer
from pretrain.evaluators import validation
from pretrain.evaluators._metrics import classify, ranks_of_best, recall
from pretrain.evaluators.base import Subject
from pretrain.features import base as features
from pretrain.inference import Heads
from pretrain.rng import generator
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask

KID_SET = "concepts"  # pictures of all vendors, of concepts never trained on


def main() -> None:
    """Score the cell of the task file; the result file is written last."""
    torch.set_num_threads(1)
    task = json.loads(Path(sys.argv[1]).read_text())
    result = score(task)
    Path(sys.argv[2]).write_text(json.dumps(result))


def score(task: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a trained cell.

    Args:
        task: kind and folder of the training, its resolved config, held-out manifests by name
            (sets), chain (steps, noises, guidance), a grid of such or [], images for KID.
    """
    began = time.monotonic()
    config = configs.build(RunConfig, task["config"])
    subject = load(task["kind"], Path(task["folder"]), config)
    aligned, generates = halves(task["kind"], config)
    found: dict[str, Any] = {
        "metrics": {},
        "hits": {},
        "parameters": needed(subject.task, aligned, generates),
    }
    if task["grid"]:
        grid(subject, task, found)
    else:
        if aligned:
            chain = tuple(task["chain"])
            for name, manifest in task["sets"].items():
                discriminate(subject, name, load_labelled(manifest, config.data), chain, found)
        if task["kind"] != "two_tower":
            for name, manifest in task["sets"].items():
                settings = validation.Settings(manifest=manifest, repeats=1)
                for metric, value in validation.build(settings).run(subject).metrics.items():
                    found["metrics"][metric.replace("validation/", f"held_out/{name}/")] = value
        if generates and task["images"]:
            data = load_labelled(task["sets"][KID_SET], config.data)
            found["metrics"] |= kid(subject, data, task["images"])
    found["score_seconds"] = time.monotonic() - began
    return found


def halves(kind: str, config: RunConfig) -> tuple[bool, bool]:
    """Whether a cell was trained to align, and to generate."""
    if kind != "task":
        return kind == "two_tower", kind == "plain_unet"
    return "align" in config.objectives, "generate" in config.objectives


def needed(module: nn.Module, aligned: bool, generates: bool) -> int:
    """Parameters that a network for these tasks must have."""
    if isinstance(module, peers.TwoTower):
        return sum(p.numel() for p in module.parameters())
    assert isinstance(module, PretrainTask)
    return params.count(module.model, module.objectives).of(generates, aligned)


def load(kind: str, folder: Path, config: RunConfig) -> Subject:
    """The trained module and its heads, as evaluators take them."""
    tokenizer = Tokenizer(config.data.tokenizer)
    if kind == "task":
        from pretrain.export import load_task

        module: Any = load_task(folder)[0]
    else:
        module = peers.load(kind, folder, config, tokenizer)
    heads = (
        peers.TowerHeads(module, config.inference)
        if kind == "two_tower"
        else Heads(module.model, config.inference)
    )
    samples = config.training.samples
    return Subject(module, heads, tokenizer, config.data, folder / "samples", samples)


def discriminate(
    subject: Subject,
    name: str,
    data: LabelledSet,
    chain: tuple[int, int, float],
    found: dict[str, Any],
    suffix: str = "",
) -> None:
    """Zero-shot accuracy and retrieval on one set, from one embedding of its pictures."""
    began = time.monotonic()
    parts = data.images_NCHW.split(64)
    e0_hat = torch.cat([subject.heads.embed_images(part, 0, *chain) for part in parts])
    seconds = time.monotonic() - began
    length = subject.heads.model.config.text_encoder.length
    tokens, mask = subject.tokenizer.encode(list(data.classes), length)
    classes = F.normalize(subject.heads.embed_tokens(tokens, mask), dim=-1)
    ranks = classify(e0_hat, classes, data.labels_N).rank_N
    metrics = found["metrics"]
    metrics |= {
        f"zero_shot/{name}/top1{suffix}": (ranks < 1).float().mean().item(),
        f"zero_shot/{name}/top5{suffix}": (ranks < 5).float().mean().item(),
        f"cost/{name}/images_per_second{suffix}": len(ranks) / seconds,
    }
    if suffix:
        return
    metrics[f"zero_shot/{name}/chance"] = 1 / len(data.classes)
    found["hits"][name] = {"n": len(ranks), "top1": stats.pack((ranks < 1).tolist())}
    own = torch.arange(len(data.classes))
    by_image = ranks_of_best(e0_hat, classes, data.labels_N, own)
    by_text = ranks_of_best(classes, e0_hat, own, data.labels_N)
    for k in (1, 10):
        metrics[f"retrieval/{name}/image_to_text_r{k}"] = recall(by_image, k)
        metrics[f"retrieval/{name}/text_to_image_r{k}"] = recall(by_text, k)


def grid(subject: Subject, task: dict[str, Any], found: dict[str, Any]) -> None:
    """Zero-shot accuracy on the held-out vendor for each (steps, noises, guidance)."""
    data = load_labelled(task["sets"]["vendor"], subject.data)
    for steps, noises, guidance in task["grid"]:
        suffix = f"[steps={steps},noises={noises},guidance={guidance:g}]"
        discriminate(subject, "vendor", data, (steps, noises, guidance), found, suffix)


def kid(subject: Subject, data: LabelledSet, images: int) -> dict[str, float]:
    """KID of generated pictures against ``data``'s, by SqueezeNet's features; and images/s.

    The names of ``images`` of its pictures, drawn once for the study, are the prompts. The pictures
    are kept as uint8 in RUN/generated.pt.
    """
    chosen = torch.randperm(len(data.captions), generator=generator("study", "prompts"))[:images]
    prompts = [data.captions[i] for i in chosen.tolist()]
    length = subject.heads.model.config.text_encoder.length
    began, parts = time.monotonic(), []
    for start in range(0, len(prompts), 32):
        tokens, mask = subject.tokenizer.encode(prompts[start : start + 32], length)
        seeds = list(range(start, start + len(tokens)))
        parts.append(subject.heads.generate_tokens(tokens, mask, seeds))
    made = torch.cat(parts)
    speed = {"cost/generation/images_per_second": len(made) / (time.monotonic() - began)}
    subject.folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        ((made + 1) * 127.5).round().clamp(0, 255).to(torch.uint8),
        subject.folder.parent / "generated.pt",
    )
    return speed | squeezenet_kid(data, made, subject.folder.parent.parent)


def squeezenet_kid(data: LabelledSet, made_NCHW: Tensor, cache: Path) -> dict[str, float]:
    """KID of images in [-1, 1] against a set's. The set's own features are computed once, into
    ``cache``."""
    extractor = features.build(features.FeaturesConfig(kind="squeezenet"))

    def rows(images_NCHW: Tensor) -> Tensor:
        return torch.cat([extractor(part) for part in images_NCHW.split(64)])

    known = hashlib.sha256(str((extractor.fingerprint, data.keys)).encode()).hexdigest()[:12]
    path = cache / f"features-{known}.pt"
    if not path.exists():
        mine = path.with_suffix(f".{os.getpid()}")
        torch.save(rows(data.images_NCHW), mine)
        mine.replace(path)
    real, made = torch.load(path, weights_only=True), rows(made_NCHW)
    mean, deviation = distances.kid(real, made, subset_size=min(256, len(real), len(made)))
    return {f"generation/{KID_SET}/kid": mean, f"generation/{KID_SET}/kid_std": deviation}


if __name__ == "__main__":
    main()
