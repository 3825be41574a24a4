"""What a diffusers folder is, in this project's settings: the shape of its U-Net, its schedule, its
autoencoder, its text encoder and tokenizer. Only JSON is read."""

import inspect
import json
from pathlib import Path
from typing import Any

from pretrain import hub
from pretrain.errors import ConfigError
from pretrain.model.text_config import TransformersTextConfig
from pretrain.model.transformers_text import settings_of

PREDICTION = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names and ours
TEXT_MODELS = {"clip_text_model": "clip", "t5": "t5", "xlm-roberta": "xlm_r"}
TEXT_TOKENS = 77  # where the encoder itself sets no bound

# Of UNet2DConditionModel's configuration: what settings of ours say, and what says nothing here.
_UNET_FIELDS = {
    *("block_out_channels", "down_block_types", "up_block_types", "layers_per_block"),
    *("attention_head_dim", "num_attention_heads", "transformer_layers_per_block"),
    *("norm_num_groups", "use_linear_projection", "cross_attention_dim", "in_channels"),
    *("out_channels", "sample_size", "upcast_attention"),
}


def describe(path: str) -> dict[str, Any]:
    """The sections ``data`` and ``model`` of a run that starts from a diffusers folder.

    Raises:
        ConfigError: it is none, or of another kind than Stable Diffusion 1.x and 2.x.
    """
    field = "describe"
    unet_folder = hub.folder(field, path, "unet")
    unet_tree = _json(unet_folder / "config.json")
    vae = _json(hub.folder(field, path, "vae") / "config.json")
    text = _text(path)
    factor = 2 ** (len(vae.get("block_out_channels") or vae["decoder_block_out_channels"]) - 1)
    size = int(unet_tree.get("sample_size") or 64) * factor
    channels = int(vae.get("latent_channels", 4))
    if unet_tree.get("in_channels", 4) != channels:
        raise ConfigError(
            f"{str(unet_folder)!r} has in_channels={unet_tree.get('in_channels')}, its autoencoder "
            f"{channels}: a network for inpainting or upscaling, which this one is not"
        )
    local = Path(path).is_dir()
    return {
        "data": {
            "tokenizer": str(Path(path) / "tokenizer") if local else f"{path}/tokenizer",
            "tokens": text["length"],
            "size": size,
        },
        "model": {
            "image_size": size,
            "init": {"path": path},
            "unet": unet(unet_folder),
            "autoencoder": {
                "kind": "diffusers",
                "model": vae["_class_name"],
                "path": path,
                "subfolder": "vae",
                "channels": channels,
                "factor": factor,
            },
            "text_encoder": text,
            "image_path": image_path(hub.folder(field, path, "scheduler")),
        },
    }


def unet(folder: Path) -> dict[str, Any]:
    """The U-Net of a folder, as settings of `UNetConfig`.

    Raises:
        ConfigError: it has parts that the image stream has not.
    """
    from diffusers import UNet2DConditionModel

    tree = _json(folder / "config.json")
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    for name, parameter in known.items():
        own = _plain(tree.get(name, parameter.default))
        if name not in _UNET_FIELDS and name != "self" and own != _plain(parameter.default):
            raise ConfigError(
                f"{str(folder)!r} has {name}={own!r}, which the image stream has not: it is the "
                "U-Net of Stable Diffusion 1.x and 2.x. Give one of those"
            )
    default = {name: parameter.default for name, parameter in known.items()}
    tree = {**default, **tree}
    channels = list(tree["block_out_channels"])
    attention = ["CrossAttn" in name for name in tree["down_block_types"]]
    layers, depth = tree["layers_per_block"], tree["transformer_layers_per_block"]
    if not isinstance(layers, int) or not isinstance(depth, int):
        raise ConfigError(
            f"{str(folder)!r} has layers_per_block={layers}, transformer_layers_per_block={depth}, "
            "which differ from level to level; the image stream has one number for all"
        )
    # (diffusers' attention_head_dim is in truth the number of heads.)
    heads = tree["num_attention_heads"] or tree["attention_head_dim"]
    found = {
        "channels": channels,
        "attention": attention,
        "layers": layers,
        "transformer_layers": depth,
        "norm_groups": tree["norm_num_groups"],
        "linear_projection": bool(tree["use_linear_projection"]),
    }
    if isinstance(heads, int):
        return {**found, "heads": heads}
    widths = {c // h for c, h in zip(channels, heads, strict=True)}
    if len(widths) > 1:
        raise ConfigError(
            f"{str(folder)!r} has attention_head_dim={heads}: heads of several widths, which the "
            "image stream has not"
        )
    return {**found, "head_dim": widths.pop()}


def image_path(folder: Path) -> dict[str, Any]:
    """What a scheduler's configuration says, as settings of `StreamConfig`.

    Raises:
        ConfigError: there is none, or none that an image path can be.
    """
    tree = _json(folder / "scheduler_config.json")
    predicts, kind = tree.get("prediction_type", "epsilon"), tree.get("beta_schedule")
    if kind != "scaled_linear" or predicts not in PREDICTION:
        raise ConfigError(
            f"{str(folder)!r} has beta_schedule={kind!r}, prediction_type={predicts!r}; known here "
            f"are scaled_linear with {', '.join(PREDICTION)}. Give another folder"
        )
    return {
        "predict": PREDICTION[predicts],
        "unit_start": True,
        "schedule": {
            "kind": "scaled_linear",
            "steps": int(tree.get("num_train_timesteps", 1000)),
            "beta_start": float(tree["beta_start"]),
            "beta_end": float(tree["beta_end"]),
        },
    }


def _text(path: str) -> dict[str, Any]:
    from transformers import AutoConfig

    folder = hub.folder("describe", path, "text_encoder")
    kind = _json(folder / "config.json").get("model_type")
    if kind not in TEXT_MODELS:
        raise ConfigError(
            f"{str(folder)!r} is of model_type={kind!r}; known here are {', '.join(TEXT_MODELS)}"
        )
    own = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = TEXT_MODELS[kind]
    width = own.d_model if model == "t5" else own.hidden_size
    made = TransformersTextConfig(
        model=model,
        path=path,
        subfolder="text_encoder",
        width=width,
        query_dim=width,
        length=own.max_position_embeddings if model == "clip" else TEXT_TOKENS,
        settings=settings_of(own),
    )
    shown = ("kind", "model", "path", "subfolder", "frozen", "width", "query_dim", "length")
    return {name: getattr(made, name) for name in (*shown, "settings")}


def _json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(file)!r} cannot be read ({error}); give a folder in diffusers' layout, with its "
            "configuration files"
        ) from None
    return tree


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
