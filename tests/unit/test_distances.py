"""FID, KID, precision and recall against float64 references that share no code, against
torchmetrics, and against what is known beforehand."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from pretrain import distances
from pretrain.errors import DataError

# All is float64 on both sides; what is left is the order of sums (measured: 8e-15 at most, of
# scipy's root of a product of covariances).
RELATIVE = 1e-10


def normal(rows: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Features with correlations of their own, fp32."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, width, generator=g) @ torch.randn(width, width, generator=g)
    return scale * mixed / width**0.5 + shift


def reference_fid(x: Tensor, y: Tensor) -> float:
    a, b = x.double().numpy(), y.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(s @ t).real
    mean = a.mean(0) - b.mean(0)
    return float(mean @ mean + np.trace(s) + np.trace(t) - 2 * np.trace(root))


def reference_kid(x: Tensor, y: Tensor) -> float:
    """The definition: means of the kernel over all pairs of different images."""

    def k(u: Tensor, v: Tensor) -> float:
        return (float(u.double() @ v.double()) / len(u) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(u, v) for u in x for v in y) / (n * m)


def reference_within(x: Tensor, of: Tensor, k: int) -> float:
    def distance(u: Tensor, v: Tensor) -> float:
        return math.dist(u.tolist(), v.tolist())

    radii = [
        sorted(distance(of[i], of[j]) for j in range(len(of)) if j != i)[k - 1]
        for i in range(len(of))
    ]
    hits = [any(distance(u, v) <= r for v, r in zip(of, radii, strict=True)) for u in x]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("n", "m", "width"), [(90, 70, 12), (300, 200, 40)])
def test_fid_is_that_of_scipy(n: int, m: int, width: int) -> None:
    x, y = normal(n, width, 0), normal(m, width, 1, scale=1.3, shift=0.2)
    assert distances.fid(x, y) == pytest.approx(reference_fid(x, y), rel=RELATIVE)


def test_fid_of_known_distributions() -> None:
    """Two sets of ±a, ±b along the axes: covariances are diagonal and the distance is by hand."""

    def corners(scales: tuple[float, ...], shift: float) -> Tensor:
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * len(scales))
        return signs * torch.tensor(scales) + shift

    x, y = corners((1, 2, 3), 0), corners((2, 2, 1), 0.5)
    unbiased = 8 / 7  # of a covariance over 8 corners
    by_hand = 3 * 0.25 + unbiased * ((1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    assert distances.fid(x, y) == pytest.approx(by_hand, rel=RELATIVE)


def test_fid_of_fewer_images_than_features() -> None:
    """0 for equal sets, where roots of covariances give as much as 1e-4; a rotation changes
    nothing."""
    x, y = normal(30, 200, 0), normal(20, 200, 1)
    assert distances.fid(x, x) == pytest.approx(0, abs=1e-10)
    rotation = torch.linalg.qr(normal(200, 200, 2).double()).Q
    turned = distances.fid(x.double() @ rotation, y.double() @ rotation)
    assert turned == pytest.approx(distances.fid(x, y), rel=RELATIVE)


def test_kid_is_its_definition() -> None:
    """One subset that holds all images is the estimate itself."""
    x, y = normal(14, 5, 0), normal(14, 5, 1, shift=0.3)
    mean, deviation = distances.kid(x, y, subset_size=14, subsets=3)
    assert mean == pytest.approx(reference_kid(x, y), rel=RELATIVE)
    assert deviation == pytest.approx(0, abs=RELATIVE)


def test_kid_has_no_bias() -> None:
    """Around 0 for two sets of one distribution, below it as often; far from it for two."""
    pool, other = normal(400, 8, 0), normal(200, 8, 0, shift=0.5)
    mean, deviation = distances.kid(pool[:200], pool[200:], subset_size=50)
    assert abs(mean) < deviation
    far, spread = distances.kid(pool[:200], other, subset_size=50)
    assert far > 5 * spread / 2 and far > 10 * abs(mean)


def test_kid_draws_from_its_seed_alone() -> None:
    x, y = normal(40, 6, 0), normal(30, 6, 1)
    torch.manual_seed(1)
    first = distances.kid(x, y, 10, seed=3)
    state = torch.get_rng_state()
    assert distances.kid(x, y, 10, seed=3) == first != distances.kid(x, y, 10, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(40, 3, 0), normal(30, 3, 1, shift=1.0)
    expected = (reference_within(y, x, k), reference_within(x, y, k))
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1  # else it could not tell
    assert distances.precision_recall(x, y, k) == pytest.approx(expected)
    monkeypatch.setattr(distances, "BLOCK_ROWS", 7)
    assert distances.precision_recall(x, y, k) == pytest.approx(expected)


def test_precision_and_recall_at_the_ends() -> None:
    x = normal(30, 16, 0)
    assert distances.precision_recall(x, x) == (1.0, 1.0)
    assert distances.precision_recall(x, x + 100) == (0.0, 0.0)
    # One good picture again and again: all real, but little of the variety.
    precision, recall = distances.precision_recall(x, x[:1].expand(30, -1))
    assert precision == 1.0 and recall == pytest.approx(1 / 30)
    # Far from the origin, where distances cancel: ties still count as inside.
    assert distances.precision_recall(x + 1e4, x + 1e4) == (1.0, 1.0)


class _AsTheyAre(torch.nn.Module):
    """What torchmetrics takes for an extractor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_they_are_those_of_torchmetrics() -> None:
    fid_module = pytest.importorskip("torchmetrics.image.fid")
    kid_module = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(120, 16, 0).double(), normal(90, 16, 1, scale=1.2).double()
    fid = fid_module.FrechetInceptionDistance(_AsTheyAre(16)).set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kid = kid_module.KernelInceptionDistance(_AsTheyAre(16), subsets=2, subset_size=90)
    for metric in (fid, kid):
        metric.update(x, real=True)
        metric.update(y, real=False)
    assert distances.fid(x, y) == pytest.approx(float(fid.compute()), rel=RELATIVE)
    # Subsets of all images leave nothing to chance on the smaller side; give both 90 then.
    kid.reset()
    kid.update(x[:90], real=True)
    kid.update(y, real=False)
    mean, _ = kid.compute()
    assert distances.kid(x[:90], y, 90, subsets=1)[0] == pytest.approx(float(mean), rel=RELATIVE)


METRICS = [
    distances.fid,
    lambda x, y: distances.kid(x, y, subset_size=4),
    distances.precision_recall,
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("real", "made", "said"),
    [
        (torch.rand(1, 4), torch.rand(9, 4), "real images=1: .*at least"),
        (torch.rand(9, 4), torch.rand(1, 4), "generated images=1: .*at least"),
        (torch.rand(9, 4), torch.rand(9, 5), "4 features, generated ones 5"),
        (torch.rand(9), torch.rand(9, 4), r"real images have shape \(9,\)"),
        (torch.ones(9, 4), torch.rand(9, 4), "all 9 real images have the same features"),
    ],
)
def test_what_cannot_be_measured_is_told(metric, real: Tensor, made: Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        metric(real, made)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_is_named(metric, value: float) -> None:
    x = torch.rand(9, 4)
    x[5, 2] = value
    with pytest.raises(DataError, match=r"1 of 9 generated images are not finite .*image 5"):
        metric(torch.rand(9, 4), x)


def test_more_in_a_subset_than_images_is_told() -> None:
    with pytest.raises(DataError, match="kid_subset_size=10 is more than the 9 generated"):
        distances.kid(torch.rand(20, 4), torch.rand(9, 4), 10)
    with pytest.raises(DataError, match="kid_subset_size=1: at least 2"):
        distances.kid(torch.rand(20, 4), torch.rand(9, 4), 1)
    with pytest.raises(DataError, match=r"real images=3: .*at least 4"):
        distances.precision_recall(torch.rand(3, 4), torch.rand(9, 4), neighbours=3)


def test_a_model_that_draws_one_image_is_measured() -> None:
    """Its collapse is a result, and no error."""
    x, one = normal(20, 6, 0), torch.zeros(20, 6)
    assert distances.fid(x, one) > 1 and distances.kid(x, one, 10)[0] > 0
    assert distances.precision_recall(x, one)[1] == 0.0
