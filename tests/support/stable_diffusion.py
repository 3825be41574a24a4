"""A Stable Diffusion folder of tiny random networks, with all the components and the very file
layout of a real one: what `StableDiffusionPipeline.save_pretrained` writes, and the names of its
time's transformers in the text encoder's file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TOKENS = 12
CHANNELS = (32, 64)
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def make(
    folder: Path,
    version: int = 1,
    shard: str = "10GB",
    vae: str = "AutoencoderKL",
    channels: tuple[int, ...] = CHANNELS,
) -> Path:
    """Write it.

    Args:
        version: 1 as Stable Diffusion 1.5 (eps, as many heads in each level); 2 as 2.1 (v, linear
            projections, heads of one width).
        shard: most bytes of one of the U-Net's files.
        vae: AutoencoderKL or AutoencoderTiny.
        channels: of the U-Net's levels; the last has no attention.
    """
    import diffusers
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(version)
    tokenizer_folder(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu" if version == 1 else "gelu",
        eos_token_id=2,  # as in the files of Stable Diffusion 1.5
        initializer_factor=4.0,  # else the tokens differ too little to be told apart
    )
    unet = UNet2DConditionModel(
        sample_size=2 ** (len(channels) + 1),
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
        layers_per_block=1 if len(channels) == 2 else 2,
        cross_attention_dim=32,
        attention_head_dim=4 if version == 1 else tuple(c // 16 for c in channels),
        norm_num_groups=8,
        use_linear_projection=version == 2,
    )
    if vae == "AutoencoderKL":
        autoencoder: Any = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        )
    else:
        blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        autoencoder = diffusers.AutoencoderTiny(**blocks, **counts)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            **SCHEDULE,
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type="epsilon" if version == 1 else "v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    unet.save_pretrained(folder / "unet", max_shard_size=shard)
    file = folder / "text_encoder" / "model.safetensors"
    state = {
        f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(file).items()
    }
    save_file(state, file, {"format": "pt"})
    return folder


def tokenizer_folder(folder: Path) -> None:
    """CLIP's byte-pair tokenizer of a handful of merges, in the files of its time."""
    folder.mkdir(parents=True)
    letters = [*map(chr, (*range(33, 127), *range(161, 173), *range(174, 512)))][:256]
    ends = [f"{letter}</w>" for letter in letters]
    merged = ["re", "red</w>", "bl", "ue</w>", "blue</w>"]
    pieces = [*letters, *ends, *merged, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    merges = ["#version: 0.2", "r e", "re d</w>", "b l", "u e</w>", "bl ue</w>"]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def settings(folder: Path) -> dict[str, Any]:
    """The sections that `describe` gives for it, and small new parts."""
    from pretrain.describe import describe

    tree = describe(str(folder))
    tree["model"]["text_stream"] = {"head_layers": 1, "head_width": 32, "head_dim": 16}
    return tree
