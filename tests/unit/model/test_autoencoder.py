"""The autoencoder that is exact: blocks of pixels as channels, and axes of colour with gains."""

import pytest
import torch

from pretrain.model.autoencoder import SpaceToDepth


@pytest.mark.parametrize("gains", [None, (1.0, 1.3, 2.3)])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_decoding_is_the_inverse_of_encoding(factor: int, gains: tuple | None) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    autoencoder = SpaceToDepth(factor, 0.6, gains)
    latents = autoencoder.encode(images)
    assert latents.shape == (3, 3 * factor**2, 16 // factor, 16 // factor)
    assert (autoencoder.decode(latents) - images).abs().max() < 1e-6


def test_each_axis_of_colour_has_its_gain_and_no_other() -> None:
    """Grey, orange to blue, magenta to green, each a unit vector of red, green and blue."""
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    images = torch.nn.functional.normalize(axes, dim=1)[:, :, None, None].expand(3, 3, 2, 2)
    latents = SpaceToDepth(2, 0.0, (1.0, 1.3, 2.3)).encode(images).view(3, 3, 4)
    expected = torch.diag(torch.tensor([1.0, 1.3, 2.3]))[:, :, None].expand(3, 3, 4)
    assert torch.allclose(latents, expected, atol=1e-6)
