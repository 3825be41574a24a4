"""The parts of a diffusers pipeline folder that come from Stable Diffusion, and when the whole is a
StableDiffusionPipeline again: then its folder needs no code of ours."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from pretrain.inference import Predictor
from pretrain.model.autoencoder import Diffusers
from pretrain.model.transformers_text import TransformersTextEncoder, plain_tower


def foreign_text(predictor: Predictor) -> TransformersTextEncoder | None:
    """The text encoder where it is one of transformers."""
    encoder = predictor.model.text_encoder
    return encoder if isinstance(encoder, TransformersTextEncoder) else None


def is_stable_diffusion(predictor: Predictor) -> bool:
    """Whether diffusers' own StableDiffusionPipeline draws what the model draws: CLIP's text tower,
    a pretrained autoencoder, a discrete path whose chain starts at unit noise, no early end."""
    text = foreign_text(predictor)
    return (
        text is not None
        and text.kind == "clip"
        and isinstance(predictor.model.autoencoder, Diffusers)
        and predictor.model.config.image_path.unit_start
        and predictor.heads.config.last_noise == 0
    )


def save_text_encoder(encoder: TransformersTextEncoder, folder: Path) -> str:
    """Write a text encoder as transformers does; the name of its class."""
    tower = plain_tower(encoder)
    tower.save_pretrained(folder)
    if encoder.kind == "clip":
        # The names that Stable Diffusion's folders have always had; transformers 5 reads both.
        file = folder / "model.safetensors"
        state = {
            f"text_model.{n.removeprefix('text_model.')}": t for n, t in load_file(file).items()
        }
        save_file(state, file, {"format": "pt"})
    return type(tower).__name__


def save_tokenizer(model: Path, folder: Path) -> str:
    """Write the tokenizer of the model folder ``model`` as transformers does; its class's name."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    tokenizer.save_pretrained(folder)
    return type(tokenizer).__name__


def stable_diffusion_index(scheduler: str, vae: str, tokenizer: str) -> dict[str, Any]:
    """model_index.json of a StableDiffusionPipeline."""
    from diffusers import __version__

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", tokenizer],
        "scheduler": ["diffusers", scheduler],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write model_index.json."""
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
