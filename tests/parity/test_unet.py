"""The image stream is diffusers' UNet2DConditionModel: same names, same weights, same outputs."""

import diffusers
import pytest
import torch

from pretrain.model.dual_stream import DualStreamUNet
from pretrain.model.text_stream import TextStreamConfig
from pretrain.model.unet import UNetConfig, diffusers_arguments

# Measured on CPU, fp32: equal to the bit, since a masked key adds exactly zero. Other kernels may
# sum in another order.
TOLERANCE = 2e-6

SHAPES = {
    "sd1-like": UNetConfig(
        channels=(32, 64, 64, 64), attention=(True, True, True, False), layers=2, head_dim=16
    ),
    "linear-projection": UNetConfig(
        channels=(32, 64), attention=(True, True), head_dim=32, linear_projection=True
    ),
    "deep": UNetConfig(
        channels=(32, 64), attention=(False, True), head_dim=16, transformer_layers=2
    ),
    "quickstart-like": UNetConfig(
        channels=(16, 32, 64), attention=(False, True, True), head_dim=16, norm_groups=8
    ),
}


def both(shape: UNetConfig, fusion: str = "all"):
    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(**diffusers_arguments(shape, 4, 24)).eval()
    stream = TextStreamConfig(head_layers=1, head_width=32, head_dim=16, fusion=fusion)
    ours = DualStreamUNet(shape, stream, 4, 16, 24, 40).eval()
    ours.unet.load_state_dict(reference.state_dict(), strict=True)  # the names are diffusers' own
    return reference, ours


def inputs(n: int = 3):
    g = torch.Generator().manual_seed(1)
    z, c = torch.randn(n, 4, 16, 16, generator=g), torch.randn(n, 7, 24, generator=g)
    t, e = torch.tensor([1.0, 500.0, 999.0])[:n], torch.randn(n, 40, generator=g)
    return z, t, c, e


@pytest.mark.parametrize("fusion", ["all", "mid"])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_outputs_equal_diffusers(name, fusion):
    reference, ours = both(SHAPES[name], fusion)
    z, t, c, e = inputs()
    encoded = ours.encode(z, t, c, e, torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    expected = reference(z, t, c).sample
    assert expected.std() > 0.05, "a network that answers nothing proves nothing"
    difference = (ours.decode(encoded, c) - expected).abs().max().item()
    assert difference < TOLERANCE


@torch.no_grad()
def test_a_seen_query_does_change_the_image_stream():
    """The mask is what keeps the streams apart, so without it they must differ: the test above can
    fail."""
    reference, ours = both(SHAPES["sd1-like"])
    z, t, c, e = inputs()
    encoded = ours.encode(z, t, c, e, torch.zeros(3), torch.ones(3, dtype=torch.bool))
    assert (ours.decode(encoded, c) - reference(z, t, c).sample).abs().max() > 100 * TOLERANCE


def test_gradients_equal_diffusers():
    reference, ours = both(SHAPES["quickstart-like"])
    z, t, c, e = inputs()
    reference(z, t, c).sample.square().mean().backward()
    encoded = ours.encode(z, t, c, e, torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    ours.decode(encoded, c).square().mean().backward()
    for (name, theirs), mine in zip(
        reference.named_parameters(), ours.unet.parameters(), strict=True
    ):
        scale = theirs.grad.abs().max().clamp(min=1e-4)
        assert ((mine.grad - theirs.grad).abs().max() / scale) < 1e-4, name
