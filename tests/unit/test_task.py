"""One step's forward pass: what may reach what, and what the draws depend on."""

import dataclasses

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.task import TaskConfig, check_objectives
from tests.support import tiny

BOTH = {"generate": {}, "align": {}}


@pytest.fixture
def parts():
    task = tiny.task(BOTH, config=TaskConfig(caption_drop=0.0)).eval()
    batch = tiny.batch(6)
    with torch.no_grad():
        noised = task.noise(batch)
        return task, batch, noised, task.model(noised)


@torch.no_grad()
def test_the_condition_changes_nothing_in_the_alignment_half(parts):
    task, _, noised, output = parts
    changed = task.model(dataclasses.replace(noised, c_BLD=torch.randn_like(noised.c_BLD) * 5))
    assert torch.equal(changed.e0_hat_BE, output.e0_hat_BE)
    assert not torch.allclose(changed.f_z_BCHW, output.f_z_BCHW)


@torch.no_grad()
def test_the_query_changes_nothing_in_the_generation_half(parts):
    task, _, noised, output = parts
    changed = task.model(
        dataclasses.replace(
            noised, e_t_BE=torch.randn_like(noised.e_t_BE) * 5, t_e_B=noised.t_e_B * 0 + 1
        )
    )
    assert torch.equal(changed.f_z_BCHW, output.f_z_BCHW)
    assert not torch.allclose(changed.e0_hat_BE, output.e0_hat_BE)


@torch.no_grad()
def test_the_noisy_image_changes_nothing_in_the_alignment_half(parts):
    task, _, noised, output = parts
    changed = task.model(
        dataclasses.replace(noised, z_t_BCHW=noised.z_t_BCHW * 3, t_z_B=noised.t_z_B * 0 + 9)
    )
    assert torch.equal(changed.e0_hat_BE, output.e0_hat_BE)


@torch.no_grad()
def test_captions_reach_the_alignment_half_through_the_noisy_query_alone(parts):
    """The tokens of another caption, under the same e_t: the alignment half must not notice."""
    task, batch, noised, output = parts
    other = dataclasses.replace(
        batch, tokens_BL=batch.tokens_BL.flip(0), mask_BL=batch.mask_BL.flip(0)
    )
    renoised = dataclasses.replace(task.noise(other), e_t_BE=noised.e_t_BE)
    # The null prompt is encoded in the same batch; equal to the bit only if nothing leaks across
    # rows.
    assert torch.allclose(task.model(renoised).e0_hat_BE, output.e0_hat_BE, atol=1e-6)


@torch.no_grad()
def test_each_half_alone_equals_the_stacked_pass(parts):
    task, _, noised, output = parts
    generation = task.model(noised, generation=True, alignment=False)
    alignment = task.model(noised, generation=False, alignment=True)
    assert generation.e0_hat_BE is None and alignment.f_z_BCHW is None
    # Stacking changes the shapes that matmul and convolution block over: equal to fp32 rounding,
    # not to the bit.
    assert torch.allclose(generation.f_z_BCHW, output.f_z_BCHW, atol=1e-5)
    assert torch.allclose(alignment.e0_hat_BE, output.e0_hat_BE, atol=1e-5)


@torch.no_grad()
def test_the_draws_of_a_sample_do_not_depend_on_its_batch():
    task = tiny.task(BOTH).eval()
    whole, part = task.noise(tiny.batch(8)), task.noise(tiny.batch(4, start=4))
    for name in ("z_t_BCHW", "noise_z_BCHW", "t_z_B", "noise_e_BE", "t_e_B"):
        assert torch.equal(getattr(whole, name)[4:], getattr(part, name)), name
    assert torch.allclose(whole.c_BLD[4:], part.c_BLD, atol=1e-6)


@torch.no_grad()
def test_the_two_streams_have_times_of_their_own():
    noised = tiny.task(BOTH).noise(tiny.batch(64))
    pair = torch.stack([noised.t_z_B, noised.t_e_B])
    assert abs(torch.corrcoef(pair)[0, 1]) < 0.3


@torch.no_grad()
def test_drop_rates():
    config = TaskConfig(caption_drop=0.25, image_drop=0.5)
    noised = tiny.task(BOTH, config=config).noise(tiny.batch(400))
    no_caption = (noised.c_BLD == noised.null_c_BLD).flatten(1).all(1).float().mean()
    no_image = (noised.z_BCHW == 0).flatten(1).all(1).float().mean()
    assert 0.18 < no_caption < 0.32 and 0.42 < no_image < 0.58
    assert not (noised.x0_z_BCHW == 0).flatten(1).all(1).any(), (
        "the generation half keeps its image"
    )


def test_no_gradient_flows_into_the_query_that_is_noised():
    task = tiny.task({"denoise_text": {"weight": 1.0}})
    task(tiny.batch(4)).loss.backward()
    query = task.model.text_encoder.query.weight.grad
    assert query is None or not query.any(), "the text encoder could make the query easy to denoise"


def test_every_parameter_of_the_run_gets_a_gradient():
    task = tiny.task(BOTH)
    task(tiny.batch(4)).loss.backward()
    without = [name for name, p in task.named_parameters() if p.grad is None]
    assert not without


def test_every_parameter_lies_in_a_module_that_returns_a_tensor():
    """ZeRO-3 gathers a module's own parameters for the backward pass by a hook on the tensors it
    returns."""
    task, owners = tiny.task(BOTH), set()

    def hook(name):
        def check(module, args, output):
            owners.add(name)
            assert isinstance(output, torch.Tensor), name

        return check

    expected = {n for n, m in task.named_modules() if list(m.parameters(recurse=False))}
    for name in expected:
        task.get_submodule(name).register_forward_hook(hook(name))
    task(tiny.batch(2))
    assert owners == expected, "a module's parameters are used without calling it"
    assert all(p.ndim > 0 for p in task.parameters()), (
        "DeepSpeed cannot broadcast 0-dimensional parameters"
    )


def test_weights_and_metrics():
    a, b = tiny.task({"generate": {"weight": 2.0}, "align": {"weight": 0.5}}), tiny.batch(4)
    out = a(b)
    expected = 2.0 * out.metrics["generate/loss"] + 0.5 * out.metrics["align/loss"]
    assert torch.allclose(out.loss, expected)
    assert {"align/accuracy", "align/logit_scale"} <= set(out.metrics)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"generat": {}}, "did you mean 'generate'"),
        ({"align": {"weigth": 1}}, "did you mean 'weight'"),
        ({"align": {"weight": 0}}, "no objective has a weight"),
        ({"align": {"scale": -1}}, r"objectives\.align\.scale=-1"),
    ],
)
def test_bad_objectives_are_named(tree, message):
    with pytest.raises(ConfigError, match=message):
        check_objectives(tree)
