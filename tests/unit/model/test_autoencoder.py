"""Blocks of pixels as latents, with and without colour axes of equal deviation."""

import pytest
import torch

from pretrain import config
from pretrain.errors import ConfigError
from pretrain.model.autoencoder import OPPONENT, SpaceToDepth, SpaceToDepthConfig

DEVIATIONS = (0.84, 0.41, 0.2)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_blocks_are_exact(factor: int) -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    plain = SpaceToDepth(factor, shift=0.5)
    z = plain.encode(images)
    assert z.shape == (2, 3 * factor**2, 8 // factor, 8 // factor)
    assert torch.equal(plain.decode(z), images - 0.5 + 0.5)
    scaled = SpaceToDepth(factor, 0.6, DEVIATIONS)
    assert scaled.encode(images).shape == z.shape
    assert torch.allclose(scaled.decode(scaled.encode(images)), images, atol=1e-6)


def test_the_axes_are_orthonormal() -> None:
    axes = torch.tensor(OPPONENT, dtype=torch.float64)
    assert torch.allclose(axes @ axes.T, torch.eye(3, dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize(
    ("rgb", "axis"), [((1, 1, 1), 0), ((1, 0, -1), 1), ((-1, 2, -1), 2)], ids=["grey", "rb", "gm"]
)
def test_each_axis_is_divided_by_its_own_deviation(rgb: tuple[int, ...], axis: int) -> None:
    colour = torch.tensor(rgb, dtype=torch.float64)
    colour = colour / colour.norm() * DEVIATIONS[axis]
    z = SpaceToDepth(1, 0.0, DEVIATIONS).encode(colour.view(1, 3, 1, 1)).flatten()
    assert torch.allclose(z, torch.eye(3, dtype=torch.float64)[axis], atol=1e-12)


def test_it_is_made_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        made = SpaceToDepth(2, 0.6, DEVIATIONS)
    images = torch.rand(1, 3, 4, 4)
    assert torch.allclose(made.decode(made.encode(images)), images, atol=1e-6)


def test_a_deviation_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="deviations"):
        config.build(SpaceToDepthConfig, {"deviations": [0.8, 0.4, 0.0]})
