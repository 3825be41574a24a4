"""The model card: what a model saw, how it was made, how both heads scored, what it is not for.

`card.json` is for programs (the registry's gate reads it), `README.md` says the same to people.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain import mlflow_env, storage
from pretrain.checkpoint import Checkpoint
from pretrain.data.manifest import Manifest, folder_of
from pretrain.ema import kind as ema_kind
from pretrain.errors import DataError, PretrainError
from pretrain.partitions import WEIGHTS
from pretrain.results import Finished
from pretrain.results import read as read_scorecard
from pretrain.run_config import RunConfig

# Which head a metric is of, by the evaluator's name.
GENERATION: tuple[str, ...] = ("validation/generate", "samples", "generation")
DISCRIMINATION: tuple[str, ...] = ("validation/align", "zero_shot", "retrieval")
_NOTICE_BYTES = 20_000


def make(
    output: Path,
    config: RunConfig,
    checkpoint: Checkpoint,
    kind: str,
    parameters: int,
    licence: str | None = None,
) -> dict[str, Any]:
    """The card of a checkpoint's weights ``kind``.

    Args:
        output: the run's folder, where its scores are.
        parameters: of the network.
        licence: of the weights, for example Apache-2.0; None: not stated.
    """
    half_lives = {ema_kind(n): n for n in config.ema.half_lives}
    train = [_source(url) for url in _train(config)]
    metrics: dict[str, Any] = dict(_evaluations(output, config, checkpoint, kind))
    heads = {"generation": GENERATION, "discrimination": DISCRIMINATION}
    for done in _scorecard(output, checkpoint, kind):
        metrics |= {f"scorecard/{done.name}/{k}": v for k, v in done.metrics.items()}
        for head, evaluators in heads.items():
            if done.evaluator in evaluators:
                heads[head] = (*evaluators, f"scorecard/{done.name}")
    return {
        "name": config.name,
        "samples": checkpoint.samples,
        "parameters": parameters,
        "weights": kind,
        "ema_half_life_samples": half_lives.get(kind),
        "data": {
            "fingerprint": checkpoint.run.get("data"),  # of the run's sample order over its shards
            "tokenizer_sha256": checkpoint.run["tokenizer_sha256"],
            "train": train,
        },
        "evaluated_on": _evaluated_on(config),
        "metrics": metrics,
        "heads": {head: _of(metrics, evaluators) for head, evaluators in heads.items()},
        "config": _public(config.resolved()),
        "licence": {"code": "Apache-2.0", "weights": licence, "data": _notices(train)},
        "limits": _limits(config, checkpoint, train, metrics),
    }


def readme(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    average = card["ema_half_life_samples"]
    weights = f"moving average, half-life {average:,} samples" if average else "as trained"
    lines = [
        f"# {card['name']}",
        "",
        "One diffusion network with two heads (DiffDis): it draws images from text, and it",
        "classifies and retrieves by denoising a text embedding given the image.",
        "",
        "| | |",
        "|---|---|",
        f"| samples seen | {card['samples']:,} |",
        f"| parameters | {card['parameters']:,} |",
        f"| weights | {weights} |",
        f"| data fingerprint | `{card['data']['fingerprint']}` |",
        f"| tokenizer SHA-256 | `{card['data']['tokenizer_sha256']}` |",
        f"| licence of the weights | {card['licence']['weights'] or 'not stated'} |",
    ]
    for source in card["data"]["train"]:
        shown = f"{source['samples']:,} samples" if source["samples"] else "not at hand at export"
        lines.append(f"| trained on | {source['manifest']}: {shown} |")
    for head, metrics in card["heads"].items():
        lines += ["", f"## {head.capitalize()}", ""]
        lines += ["| metric | value |", "|---|---|"] if metrics else ["Not scored."]
        lines += [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    lines += ["", "## Known limits", "", *(f"- {limit}" for limit in card["limits"])]
    for place, notice in card["licence"]["data"].items():
        lines += ["", f"## Notice of {place}", "", "```", notice.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _train(config: RunConfig) -> list[str]:
    train = config.data.train
    return [train] if isinstance(train, str) else [source.manifest for source in train]


def _source(url: str) -> dict[str, Any]:
    """A training set; without numbers where it cannot be reached from here."""
    try:
        manifest = Manifest.load(url, versions=False)
    except (PretrainError, OSError):
        return {"manifest": url, "fingerprint": None, "samples": None, "shards": None}
    return {
        "manifest": url,
        "fingerprint": manifest.fingerprint,
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
    }


def _evaluated_on(config: RunConfig) -> dict[str, str]:
    """Fingerprints of the evaluation sets by name: scores on other sets are not compared."""
    found: dict[str, str] = {}
    for name, settings in config.resolved()["evaluators"].items():
        places = {k: s.get("manifest") for k, s in (settings.get("sets") or {}).items()}
        for key, url in {**places, name: settings.get("manifest")}.items():
            fingerprint = _source(url)["fingerprint"] if url else None
            if fingerprint:
                found[key] = fingerprint
    return found


def _evaluations(
    output: Path, config: RunConfig, checkpoint: Checkpoint, kind: str
) -> dict[str, float]:
    """What the run's own evaluators said of these very weights."""
    found: dict[str, float] = {}
    scored = WEIGHTS if config.ema.use is None else ema_kind(config.ema.use)
    path = output / "evaluations.jsonl"
    if kind == scored and path.exists():
        for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if entry.pop("samples") == checkpoint.samples:
                found |= entry
    return found


def _scorecard(output: Path, checkpoint: Checkpoint, kind: str) -> Sequence[Finished]:
    """Entries of the run's scorecard, if it is of these very weights."""
    try:
        scorecard = read_scorecard(output / "scorecard")
    except DataError:
        return ()
    scored = (scorecard.model.samples, scorecard.model.weights)
    return scorecard.entries if scored == (checkpoint.samples, kind) else ()


def _of(metrics: Mapping[str, Any], evaluators: Iterable[str]) -> dict[str, Any]:
    starts = tuple(f"{name}/" for name in evaluators)
    return {
        name: value
        for name, value in metrics.items()
        if value is not None and name.startswith(starts)
    }


def _notices(train: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The NOTICE file beside each training set: its licences ask to travel along."""
    found = {}
    for source in train:
        place = storage.join(folder_of(source["manifest"]), "NOTICE")
        try:
            found[place] = storage.read_bytes(place)[:_NOTICE_BYTES].decode("utf-8", "replace")
        except (PretrainError, OSError):
            continue
    return found


def _limits(
    config: RunConfig,
    checkpoint: Checkpoint,
    train: Iterable[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> list[str]:
    total = sum(source["samples"] or 0 for source in train)
    saw = f" of {total:,}, {checkpoint.samples / total:.1f} passes" if total else ""
    limits = [
        f"It knows what its training shards show, and nothing else ({checkpoint.samples:,} samples"
        f"{saw}); it draws and reads {config.model.image_size} x {config.model.image_size} pixels.",
        f"A text is cut at {config.data.tokens} tokens of a vocabulary made from its own captions; "
        "other languages and words fall to pieces it has never seen together.",
        "Class probabilities are a softmax over the labels that are given: they say nothing of "
        "whether any of them is right, and are not calibrated.",
        "Nothing was filtered, and no bias was measured, beyond what the data set itself did.",
    ]
    for name in sorted(n for n in metrics if n.startswith("zero_shot/") and n.endswith("/top1")):
        chance = metrics.get(f"{name.rsplit('/', 1)[0]}/chance")
        if chance and metrics[name] is not None:
            limits.append(
                f"{name.split('/')[1]}: {metrics[name]:.1%} of the first guesses are right, where "
                f"guessing gets {chance:.1%}."
            )
    if not metrics:
        limits.append("These weights were not scored: nothing is known of their quality.")
    return limits


def _public(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration without passwords in tracking URIs."""
    uri = tree["tracking"]["uri"]
    tree["tracking"]["uri"] = mlflow_env.public(uri) if uri else None
    return tree
