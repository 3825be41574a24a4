"""What a run came to, in one screen: read from the files it left, never from memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import CheckpointError
from pretrain.train import FINISHED


def read(output: str | Path) -> dict[str, Any]:
    """Progress and the first and last evaluation of a finished run.

    Raises:
        CheckpointError: the run in ``output`` has not finished.
    """
    output = Path(output)
    if not (output / FINISHED).exists():
        raise CheckpointError(
            f"output={str(output)!r} holds no finished run; train it first (it resumes by itself)"
        )
    finished = json.loads((output / FINISHED).read_text(encoding="utf-8"))
    text = (
        (output / "evaluations.jsonl").read_text(encoding="utf-8")
        if (output / "evaluations.jsonl").exists()
        else ""
    )
    evaluations = [json.loads(line) for line in text.splitlines()]
    grids = sorted((output / "samples").glob("*.png"))
    return {
        "progress": finished["progress"],
        "first": evaluations[0] if evaluations else {},
        "last": evaluations[-1] if evaluations else {},
        "grid": str(grids[-1]) if grids else None,
    }


def render(tree: Mapping[str, Any], extra: Mapping[str, str]) -> str:
    """The summary as text; ``extra`` adds lines by title."""
    progress, first, last = tree["progress"], tree["first"], tree["last"]
    lines = [
        f"trained        {progress['samples']:,} samples in {progress['seconds'] / 60:.1f} min, "
        f"{progress['samples'] / max(progress['seconds'], 1e-9):.1f} img/s "
        f"({progress['skipped']} steps skipped, {sum(progress['rejects'].values())} samples "
        "refused)"
    ]
    for name in [n for n in progress["last"] if n.endswith("/loss")]:
        head = name.removesuffix("/loss")
        line = f"loss {head:<9} {progress['first'][name]:.3f} -> {progress['last'][name]:.3f}"
        held_out = f"validation/{name}"
        if held_out in first and held_out in last:
            line += f"   held-out {first[held_out]:.3f} -> {last[held_out]:.3f}"
        lines.append(line)
    for name in sorted({n.rsplit("/", 1)[0] for n in last if n.startswith("zero_shot/")}):
        top1, top5, chance = (last[f"{name}/{k}"] for k in ("top1", "top5", "chance"))
        lines.append(
            f"zero-shot      held-out {name.split('/')[1]}: top-1 {top1:.1%} "
            f"({top1 / chance:.1f}x chance), "
            f"top-5 {top5:.1%}, chance {chance:.2%} ({round(1 / chance)} classes)"
        )
    recalls = {n: v for n, v in last.items() if n.startswith("retrieval/")}
    for way in ("image_to_text", "text_to_image"):
        shown = [f"R@{n.rsplit('_r', 1)[1]} {v:.1%}" for n, v in recalls.items() if f"/{way}_" in n]
        if shown:
            lines.append(f"retrieval      {way.replace('_', ' ')}: {', '.join(shown)}")
    if tree["grid"]:
        lines.append(f"samples        {tree['grid']}")
    lines += [f"{title:<15}{text}" for title, text in extra.items()]
    return "\n".join(lines)
