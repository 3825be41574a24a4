"""The InceptionV3 of FID (Heusel et al. 2017): TensorFlow's of 2015-12-05, in the state dict that
pytorch-fid and torch-fidelity publish as ``pt_inception-2015-12-05`` (weights Apache-2.0).

Own layers, not torch-fidelity's class: its package imports torchvision. Agreement with that class
is tested in tests/parity/test_features.py.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import DataError
from pretrain.features.base import fingerprint, to_uint8

NAME = "inception-2015-12-05"
SIZE = 299
UNUSED = ("fc.", "AuxLogits.")  # no feature depends on them
WHERE = (
    "give the file pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid/releases"
)


class Conv(nn.Module):
    """Convolution, batch normalisation with fixed statistics, ReLU."""

    def __init__(self, channels: int, width: int, kernel: Any, stride: int = 1, padding: Any = 0):
        super().__init__()
        # Left as it is: drawing 22 million values that are then replaced takes seconds.
        self.conv = nn.utils.skip_init(
            nn.Conv2d, channels, width, kernel, stride, padding, bias=False
        )
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean_pool(x: Tensor) -> Tensor:
    # TensorFlow's average leaves the padding out of the count.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35 × 35."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean_pool(x))], 1)


class InceptionB(nn.Module):
    """From 35 × 35 to 17 × 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """17 × 17."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        row: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, inner, 1)
        self.branch7x7_2 = Conv(inner, inner, **row)
        self.branch7x7_3 = Conv(inner, 192, **column)
        self.branch7x7dbl_1 = Conv(channels, inner, 1)
        self.branch7x7dbl_2 = Conv(inner, inner, **column)
        self.branch7x7dbl_3 = Conv(inner, inner, **row)
        self.branch7x7dbl_4 = Conv(inner, inner, **column)
        self.branch7x7dbl_5 = Conv(inner, 192, **row)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean_pool(x))], 1)


class InceptionD(nn.Module):
    """From 17 × 17 to 8 × 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """8 × 8.

    Args:
        max_pool: the last block's pooling branch takes the maximum: TensorFlow's graph does.
    """

    def __init__(self, channels: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        row: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
        column: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, **row)
        self.branch3x3_2b = Conv(384, 384, **column)
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, **row)
        self.branch3x3dbl_3b = Conv(384, 384, **column)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _mean_pool(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """An `Extractor` of 2,048 features: the last block's output, averaged over the picture."""

    name = NAME
    width = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fingerprint = ""

    @torch.no_grad()
    def forward(self, images_NCHW: Tensor) -> Tensor:
        """(N, 2048), fp32, of images in [-1, 1]; they are rounded to whole pixels first, as the
        published figures are of stored pictures."""
        x = (tensorflow_resized(to_uint8(images_NCHW).float(), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def tensorflow_resized(x_NCHW: Tensor, size: int) -> Tensor:
    """``size`` × ``size``, bilinear as in TensorFlow 1: pixel i is taken at i · input / output, not
    at its centre, and nothing is smoothed. FID depends on it (Parmar et al. 2022)."""
    for dim in (2, 3):
        length = x_NCHW.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x_NCHW.device) * (length / size)
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        share = (at - low)[:, None] if dim == 2 else at - low
        below, above = x_NCHW.index_select(dim, low), x_NCHW.index_select(dim, high)
        x_NCHW = below + (above - below) * share
    return x_NCHW


def build(path: str | None, device: torch.device | str = "cpu") -> Inception:
    """The network with the weights of the file ``path`` (.pth or .safetensors).

    Raises:
        DataError: no path is given, there is no such file, or its tensors are not those of the
            network.
    """
    if path is None:
        raise DataError(f"features.path=None: inception needs the file of its weights; {WHERE}")
    state = _read(Path(path))
    network = Inception()
    expected = {k: v for k, v in network.state_dict().items() if "num_batches_tracked" not in k}
    wrong = [
        f"{name} is {'missing' if name not in state else 'of another shape'}"
        for name, wanted in expected.items()
        if name not in state or state[name].shape != wanted.shape
    ]
    wrong += [f"{name} is unknown" for name in state if name not in expected]
    if wrong:
        raise DataError(
            f"features.path={path!r} does not hold the weights of {NAME}: {'; '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; {WHERE}"
        )
    network.load_state_dict(state, strict=False)  # of num_batches_tracked, which is not used
    network.fingerprint = fingerprint(NAME, state)
    return network.eval().requires_grad_(False).to(device)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        items = dict(state).items()
    except FileNotFoundError:
        raise DataError(f"features.path={str(path)!r} is not there; {WHERE}") from None
    except Exception as error:  # torch and safetensors have a dozen of them for a wrong file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"features.path={str(path)!r} is no state dict ({first}); {WHERE}"
        ) from None
    return {
        k: v for k, v in items if not k.startswith(UNUSED) and not k.endswith("num_batches_tracked")
    }
