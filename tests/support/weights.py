"""Random weights of the feature extractors, in the files that the real ones come in."""

from pathlib import Path

import torch
from torch import Tensor

from pretrain.features.inception import Inception
from pretrain.features.squeezenet import SqueezeNet


def squeezenet(seed: int = 0) -> dict[str, Tensor]:
    """Tensors by name; variance is kept from layer to layer, so that features differ."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(x.shape, generator=g) * (2 / x[0].numel()) ** 0.5
        if x.ndim == 4
        else 0.1 * torch.randn(x.shape, generator=g)
        for name, x in SqueezeNet().state_dict().items()
    }


def write_keras(state: dict[str, Tensor], path: Path) -> None:
    """As Keras wrote them: each layer's name twice, kernels (height, width, in, out), and a
    classifier on top."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, x in state.items():
            layer, _, kind = name.replace(".", "/").rpartition("/")
            place = f"{layer}/{layer}_{'W' if kind == 'weight' else 'b'}:0"
            file[place] = (x.permute(2, 3, 1, 0) if x.ndim == 4 else x).numpy()
        file["conv10/conv10_W:0"] = torch.zeros(1, 1, 512, 10).numpy()
        file["conv10/conv10_b:0"] = torch.zeros(10).numpy()


def write_safetensors(path: Path, seed: int = 0) -> str:
    """A file for ``features.path``."""
    from safetensors.torch import save_file

    save_file(squeezenet(seed), path)
    return str(path)


def inception() -> dict[str, Tensor]:
    """In the published layout, with the classifier that no feature depends on; activations neither
    vanish nor grow."""
    g = torch.Generator().manual_seed(0)
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for name, x in Inception().state_dict().items():
        if x.ndim == 4:
            state[name] = torch.randn(x.shape, generator=g) * (2 / x[0].numel()) ** 0.5
        elif name.endswith(("weight", "running_var")):
            state[name] = 0.5 + torch.rand(x.shape, generator=g)
        elif "num_batches" not in name:
            state[name] = 0.1 * torch.randn(x.shape, generator=g)
    return state
