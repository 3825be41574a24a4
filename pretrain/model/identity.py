"""What decides a frozen part's outputs, as one hash: data made by it is known again by that."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.model.autoencoder import (
    Autoencoder,
    Diffusers,
    DiffusersConfig,
    SpaceToDepthConfig,
)


def digest(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of settings and weights, by name; the device and the order do not matter."""
    found = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bf16
    return found.hexdigest()


def autoencoder_sha256(
    autoencoder: Autoencoder, config: SpaceToDepthConfig | DiffusersConfig
) -> str:
    """Of settings and, where there are any, weights; not of the folder they lie in."""
    if not isinstance(autoencoder, Diffusers):
        return digest(config.model_dump(mode="json", exclude_none=True), {})
    # (Keys that begin with `_` name the folder and the version of diffusers.)
    fields = {k: v for k, v in autoencoder.vae.config.items() if not k.startswith("_")}
    kind = type(autoencoder.vae).__name__
    return digest(
        {**fields, "kind": kind, "scale": autoencoder.scale}, autoencoder.vae.state_dict()
    )
