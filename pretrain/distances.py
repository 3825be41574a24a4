"""How far a set of generated images is from a set of real ones, by their features; all in float64.

Own code, not torchmetrics': it draws KID's subsets from torch's global generator, and takes FID
from the eigenvalues of a product of covariances, 19 s for 300 images of 2,048 features that take
0.4 s here, and below 0 for equal sets. The values agree (tests/unit/test_distances.py).

Shape legend: N real images, M generated ones, D features.
"""

import torch
from torch import Tensor

from pretrain.errors import DataError
from pretrain.rng import generator

BLOCK_ROWS = 1024  # rows of a table of distances at a time, so that 50,000 × 50,000 fits
FEW = 5_000  # below so many images, prefer KID: FID's bias depends on the number of images


def check(real_ND: Tensor, made_MD: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both in float64, on the CPU.

    Raises:
        DataError: one is no table of features, has fewer than ``least`` rows or a feature that is
            not finite, or their widths differ, or every real image has the same features.
    """
    for name, x in (("real", real_ND), ("generated", made_MD)):
        if x.ndim != 2:
            raise DataError(
                f"features of the {name} images have shape {tuple(x.shape)}; give (images, "
                "features)"
            )
        if len(x) < least:
            raise DataError(f"{name} images={len(x)}: the metric needs at least {least}; add more")
        if not bool(x.isfinite().all()):
            rows = (~x.isfinite().all(1)).nonzero().flatten().tolist()
            raise DataError(
                f"features of {len(rows)} of {len(x)} {name} images are not finite (first: image "
                f"{rows[0]}); look for NaN in those images or in the extractor's weights"
            )
    if real_ND.shape[1] != made_MD.shape[1]:
        raise DataError(
            f"real images have {real_ND.shape[1]} features, generated ones {made_MD.shape[1]}; "
            "take both from one extractor"
        )
    if bool((real_ND == real_ND[0]).all()):
        raise DataError(
            f"all {len(real_ND)} real images have the same features, so nothing can be compared "
            "with them; check the set's pictures and the extractor's weights"
        )
    return real_ND.double().cpu(), made_MD.double().cpu()


def fid(real_ND: Tensor, made_MD: Tensor) -> float:
    """Fréchet distance of the two normal distributions with the features' means and covariances
    (Heusel et al. 2017, Eq. 6).

    With centred features X and Y and their R factors of QR, the trace of the root of the product
    of covariances is the nuclear norm of R_x R_y^T: no covariance is formed, none is rooted.

    Raises:
        DataError: as `check`.
    """
    real, made = check(real_ND, made_MD)

    def root(x: Tensor) -> Tensor:  # R with R^T R = covariance
        r: Tensor = torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R
        return r

    r_x, r_y = root(real), root(made)
    spread = r_x.square().sum() + r_y.square().sum()
    shared = torch.linalg.svdvals(r_x @ r_y.T).sum()
    mean = (real.mean(0) - made.mean(0)).square().sum()
    return float(mean + (spread - 2 * shared).clamp_min(0))  # exactly 0 but for rounding


def kid(
    real_ND: Tensor, made_MD: Tensor, subset_size: int, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets, of the unbiased squared MMD with the kernel
    (x·y / D + 1)^3 (Bińkowski et al. 2018, Eq. 4 and Sec. 4). May be below 0: it has no bias.

    Args:
        subset_size: images of each side in a subset. The mean does not depend on it; the deviation
            is that of one such subset.
        seed: of the subsets.

    Raises:
        DataError: as `check`, or there are fewer images than in a subset.
    """
    real, made = check(real_ND, made_MD)
    if subset_size < 2:
        raise DataError(f"kid_subset_size={subset_size}: at least 2")
    for name, x in (("real", real), ("generated", made)):
        if len(x) < subset_size:
            raise DataError(
                f"kid_subset_size={subset_size} is more than the {len(x)} {name} images; lower it, "
                "or take more images"
            )
    found = []
    for k in range(subsets):
        g = generator(seed, "kid", k)
        x = real[torch.randperm(len(real), generator=g)[:subset_size]]
        y = made[torch.randperm(len(made), generator=g)[:subset_size]]
        found.append(_squared_mmd(x, y))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def _squared_mmd(x_SD: Tensor, y_SD: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    s = len(x_SD)
    xx, yy, xy = kernel(x_SD, x_SD), kernel(y_SD, y_SD), kernel(x_SD, y_SD)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (s * (s - 1))
    return float(within - 2 * xy.mean())


def precision_recall(real_ND: Tensor, made_MD: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated images that lie among the real ones, and of real images that lie among
    the generated ones (Kynkäänniemi et al. 2019, Eq. 1 and 2).

    An image lies among others if it is within the distance of one of them to its own
    ``neighbours``-th nearest neighbour.

    Raises:
        DataError: as `check`, or there are not more images than neighbours.
    """
    real, made = check(real_ND, made_MD, least=neighbours + 1)
    centre = real.mean(0)  # distances stay, and the squares that cancel are smaller
    real, made = real - centre, made - centre
    return _within(made, real, neighbours), _within(real, made, neighbours)


def _within(x: Tensor, of: Tensor, neighbours: int) -> float:
    """Share of the rows of ``x`` that lie among the rows of ``of``."""
    radius = torch.cat(
        [  # the nearest of all is the row itself
            _squared_distances(rows, of).kthvalue(neighbours + 1, dim=1).values
            for rows in of.split(BLOCK_ROWS)
        ]
    )
    norms = of.square().sum(1)
    inside = 0
    for rows in x.split(BLOCK_ROWS):
        # Distances are rounded relative to the norms they cancel from: a tie counts as inside.
        slack = 1e-12 * (rows.square().sum(1)[:, None] + norms)
        inside += int((_squared_distances(rows, of) <= radius + slack).any(1).sum())
    return inside / len(x)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return (norms - 2 * x @ y.T).clamp_min(0)
