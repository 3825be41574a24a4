"""Tiny models and batches that the tests make themselves: no file, no download."""

import torch

from pretrain.model.diffdis import DiffDis, ModelConfig
from pretrain.model.text_config import TextEncoderConfig
from pretrain.model.text_stream import TextStreamConfig
from pretrain.model.unet import UNetConfig
from pretrain.task import PretrainTask, TaskConfig, check_objectives
from pretrain.types import Batch

VOCABULARY, LENGTH, SIZE = 64, 8, 16
# Half the modules, for tests of the engine: its cost is by module.
ONE_LEVEL = UNetConfig(channels=(16,), attention=(True,), head_dim=16, norm_groups=8)
ONE_LEVEL_SETTING = "model.unet={channels: [16], attention: [true], head_dim: 16, norm_groups: 8}"


def model_config(**changes) -> ModelConfig:
    """Two levels, 16 px, under 0.2 M parameters; ``changes`` replace fields."""
    fields = {
        "image_size": SIZE,
        "unet": UNetConfig(channels=(16, 32), attention=(True, True), head_dim=16, norm_groups=8),
        "text_encoder": TextEncoderConfig(width=32, query_dim=24, layers=1, heads=2, length=LENGTH),
        "text_stream": TextStreamConfig(head_layers=1, head_width=32, head_dim=16),
    }
    return ModelConfig(**(fields | changes))


def model(seed: int = 0, **changes) -> DiffDis:
    """A tiny network; the same weights for the same seed."""
    torch.manual_seed(seed)
    null_tokens = torch.tensor([2, 3] + [0] * (LENGTH - 2))
    return DiffDis(model_config(**changes), VOCABULARY, null_tokens, null_tokens != 0)


def task(
    objectives: dict, seed: int = 0, config: TaskConfig | None = None, **changes
) -> PretrainTask:
    """A tiny task with these objectives."""
    net = model(seed, **changes)
    return PretrainTask(net, check_objectives(objectives), config or TaskConfig(), seed)


def batch(n: int, start: int = 0) -> Batch:
    """Samples ``start`` to ``start + n``; sample k is the same in every batch that holds it."""
    images, tokens = [], []
    for k in range(start, start + n):
        g = torch.Generator().manual_seed(k)
        images.append(torch.rand(3, SIZE, SIZE, generator=g) * 2 - 1)
        words = torch.randint(
            4, VOCABULARY, (int(torch.randint(1, LENGTH - 2, (1,), generator=g)),), generator=g
        )
        ids = torch.cat([torch.tensor([2]), words, torch.tensor([3])])
        tokens.append(torch.nn.functional.pad(ids, (0, LENGTH - len(ids))))
    tokens_BL = torch.stack(tokens)
    return Batch(
        torch.stack(images),
        tokens_BL,
        tokens_BL != 0,
        torch.arange(start, start + n),
        keys=tuple(f"sample-{k}" for k in range(start, start + n)),
        captions=("",) * n,
    )
