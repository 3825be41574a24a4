"""A model folder as `pretrain export` writes it, of random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pretrain.config import build, merge
from pretrain.data.tokenizer import Tokenizer, train
from pretrain.inference import InferenceConfig, new_model
from pretrain.model.diffdis import ModelConfig

MODEL = {
    "image_size": 16,
    "unet": {"channels": [8, 16], "attention": [False, True], "head_dim": 8, "norm_groups": 4},
    "text_encoder": {"width": 16, "query_dim": 16, "layers": 1, "heads": 1, "length": 12},
    "text_stream": {"head_layers": 1, "head_width": 16, "head_dim": 16},
}
INFERENCE = {"steps": 3, "align_steps": 2, "align_noises": 2}


def make_exported(folder: Path, **changes: Any) -> Path:
    """``changes`` are laid over the model's configuration."""
    folder.mkdir(parents=True)
    texts = [f"{c} {thing}" for c in ("red", "green", "blue") for thing in ("apple", "car", "dog")]
    train(texts, folder / "tokenizer.model", vocab_size=19)
    tokenizer = Tokenizer(str(folder / "tokenizer.model"))
    torch.manual_seed(0)
    model = new_model(build(ModelConfig, merge(MODEL, changes)), tokenizer)
    save_file({n: p.detach() for n, p in model.named_parameters()}, folder / "model.safetensors")
    definition = {
        "model": model.config.model_dump(mode="json"),
        "inference": build(InferenceConfig, INFERENCE).model_dump(mode="json"),
        "tokenizer_sha256": tokenizer.sha256,
        "logit_scale": 10.0,
    }
    (folder / "config.json").write_text(json.dumps(definition))
    (folder / "card.json").write_text(json.dumps({"name": "tiny", "metrics": {}}))
    return folder
