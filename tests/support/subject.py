"""A tiny untrained model as evaluators see it."""

from pathlib import Path
from typing import Any

import torch

from pretrain.data.loader import DataConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.evaluators.base import Subject
from pretrain.inference import Heads, InferenceConfig, new_model
from pretrain.model.text_config import TextEncoderConfig
from pretrain.task import PretrainTask, TaskConfig, check_objectives
from tests.support import tiny

TOKENIZER = str(Path(__file__).resolve().parents[2] / "data/emoji/tokenizer.model")


def make(folder: Path, **fields: Any) -> Subject:
    """A subject of 16 px images, its files below ``folder``; ``fields`` replace those of it."""
    reader = Tokenizer(TOKENIZER)
    torch.manual_seed(0)
    text = TextEncoderConfig(width=32, query_dim=24, layers=1, heads=2, length=32)
    model = new_model(tiny.model_config(text_encoder=text), reader)
    task = PretrainTask(model, check_objectives({"align": {"weight": 1.0}}), TaskConfig(), 0).eval()
    # Untrained, the last layers are zero and every image is the same: so no test could fail.
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    data = DataConfig(train="-", tokenizer=TOKENIZER, size=tiny.SIZE, tokens=32)
    heads = Heads(task.model, InferenceConfig())
    given: dict[str, Any] = {
        "task": task,
        "heads": heads,
        "tokenizer": reader,
        "data": data,
        "folder": folder / "samples",
        "samples": 0,
    }
    return Subject(**(given | fields))


class Counted:
    """Counts the images that ``heads`` embeds from here on."""

    def __init__(self, heads: Heads) -> None:
        self.batches: list[int] = []
        inner = heads.embed_images

        def embed_images(images: torch.Tensor, *arguments: Any) -> torch.Tensor:
            self.batches.append(len(images))
            return inner(images, *arguments)

        heads.embed_images = embed_images  # type: ignore[method-assign]
