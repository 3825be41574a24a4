"""The energy head on the trunk: layout, gradients, every estimator, and classification by it."""

import dataclasses

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.energy_net import EnergyConv, EnergyHead, EnergyMLP
from pretrain.objectives import _dcd_inference as inference
from pretrain.objectives.dcd import DCD
from pretrain.task import check_objectives
from tests.support import tiny

CASES = {
    "finite": {},
    "finite vp": {"process": "vp"},
    "levels": {"levels": 3},
    "captions": {"against": "captions", "negatives": 3},
    "one step": {"estimator": "one_step"},
    "one step vp": {"estimator": "one_step", "process": "vp"},
    "cd": {"estimator": "cd", "langevin_steps": 3, "energy_l2": 0.1},
}
SMALL = {"dim": 8, "width": 16, "negatives": 4, "weight": 1.0}


def task_of(case, **changes):
    return tiny.task({"dcd": SMALL | CASES[case] | changes}, unet=tiny.ONE_LEVEL)


def head(levels=1):
    torch.manual_seed(0)
    return EnergyHead(token_width=6, dim=4, width=8, levels=levels)


@pytest.mark.parametrize("case", CASES)
def test_every_estimator_teaches_head_and_trunk(case):
    task = task_of(case)
    output = task(tiny.batch(4))
    assert torch.isfinite(output.loss)
    output.loss.backward()
    for name, p in task.objectives["dcd"].named_parameters():
        assert p.grad is not None and p.grad.any() and torch.isfinite(p.grad).all(), name
    assert task.model.trunk.head.from_map.weight.grad.any()
    # Every parameter of the alignment head takes part, that of ê_0 too.
    assert all(p.grad is not None for p in task.model.trunk.head.parameters())


@pytest.mark.parametrize("case", CASES)
def test_no_estimator_sends_gradient_into_the_captions(case):
    task = task_of(case)
    batch = tiny.batch(4)
    features = task.model.encode_text(batch.tokens_BL, batch.mask_BL)[0]
    e = features.e_BE.detach().requires_grad_()
    assert not task.objectives["dcd"].project(e).requires_grad
    before = task.model.text_encoder
    grads = torch.autograd.grad(
        task(batch).loss, list(before.parameters()), allow_unused=True, retain_graph=True
    )
    # The null prompt's condition is what remains.
    null = task.model.null_condition()
    assert any(g is not None and g.any() for g in grads) and null.requires_grad


@pytest.mark.parametrize("case", ["finite", "levels", "one step", "one step vp", "cd"])
@torch.no_grad()
def test_times_are_in_units_of_the_captions_spread(case, monkeypatch):
    """Captions moved and spread fourfold, and a head that undoes it: the same loss."""
    task = task_of(case)
    dcd, batch = task.objectives["dcd"], tiny.batch(4)
    plain, project, head = task(batch).loss, dcd.project, dcd.head.forward
    monkeypatch.setattr(dcd, "project", lambda e: 4 * project(e) + 1)

    def undone(token, x, level, probe=None):
        found = head(token, (x - 1) / 4, level, probe)
        return found if probe is None else (found[0], found[1] / 4, found[2] / 16)

    monkeypatch.setattr(dcd.head, "forward", undone)
    assert torch.allclose(task(batch).loss, plain, rtol=1e-3, atol=2e-3)
    monkeypatch.setattr(dcd.head, "forward", head)
    assert not torch.allclose(task(batch).loss, plain, rtol=1e-3, atol=2e-3)


def test_row_k_b_is_sample_bs():
    net, g = head(levels=2), torch.Generator().manual_seed(0)
    token, x = torch.randn(3, 6, generator=g), torch.randn(15, 4, generator=g)
    level = torch.tensor([0, 1, 1])
    with torch.no_grad():
        net.level.normal_(generator=g)
        (all_rows,) = net(token, x, level)
        for b in range(3):
            (own,) = net(token[b : b + 1], x[b::3], level[b : b + 1])
            assert torch.allclose(all_rows[b::3], own, atol=1e-6)


def test_the_heads_derivatives_are_autograds():
    net, g = head().double(), torch.Generator().manual_seed(0)
    token, x = torch.randn(3, 6, generator=g), torch.randn(3, 4, generator=g)
    level = torch.zeros(3, dtype=torch.int64)
    probe = torch.randn(3, 4, generator=g).sign()
    value, gradient, laplacian = net(token, x, level, probe)
    for b in range(3):

        def one(p, b=b):
            return net(token[b : b + 1], p[None], level[:1])[0].sum()

        assert torch.allclose(value[b], one(x[b]), atol=1e-5)
        assert torch.allclose(gradient[b], torch.autograd.functional.jacobian(one, x[b]), atol=1e-5)
        hessian = torch.autograd.functional.hessian(one, x[b])
        assert torch.allclose(laplacian[b], probe[b] @ hessian @ probe[b], atol=1e-5)


def test_the_projection_keeps_lengths_on_average_and_is_no_parameter():
    dcd = task_of("finite").objectives["dcd"]
    (rotation,) = dcd._projection
    assert torch.allclose(rotation.T @ rotation, 24 * torch.eye(8), atol=1e-4)
    e = torch.nn.functional.normalize(torch.randn(4000, 24), dim=-1)
    assert dcd.project(e).square().mean().item() == pytest.approx(1, rel=0.05)
    assert not list(dcd.buffers())
    again = task_of("finite", width=32).objectives["dcd"]
    assert torch.equal(rotation, again._projection[0]), "another run must find the same points"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"against": "captions", "estimator": "cd"}, "against"),
        ({"levels": 2, "estimator": "one_step"}, "levels"),
        ({"levels": 2, "last_sigma": 0.4}, "last_sigma"),
        ({"dim": 65}, "dim"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        check_objectives({"dcd": {"weight": 1.0, **fields}})


def test_more_dimensions_than_the_query_has_are_refused():
    with pytest.raises(ConfigError, match=r"objectives\.dcd\.dim=32.*query_dim=24"):
        tiny.task({"dcd": {"weight": 1.0, "dim": 32}})


def test_captions_need_another_sample():
    with pytest.raises(ConfigError, match=r"objectives\.dcd\.against"):
        task_of("captions")(tiny.batch(1))


@torch.no_grad()
def test_class_energies_are_each_classs_own():
    task = task_of("finite").eval()
    dcd = inference.energy_of(task.objectives.items())
    assert isinstance(dcd, DCD)
    images = tiny.batch(3).images_BCHW
    e = torch.nn.functional.normalize(torch.randn(5, 24), dim=-1)
    all_BC = inference.class_energies(task.model, dcd, images, e, noises=2)
    assert all_BC.shape == (3, 5)
    for c in range(5):
        one = inference.class_energies(task.model, dcd, images, e[c : c + 1], noises=2)
        assert torch.allclose(all_BC[:, c : c + 1], one, atol=1e-5)
    alone = inference.class_energies(task.model, dcd, images[1:2], e, noises=2)
    assert torch.allclose(all_BC[1:2], alone, atol=1e-4)
    with pytest.raises(ConfigError, match=r"objectives\.dcd\.weight"):
        inference.energy_of(tiny.task({"align": {}}).objectives.items())


@pytest.mark.parametrize("case", ["levels", "finite"])
@torch.no_grad()
def test_points_are_sampled_from_the_energy(case):
    task = task_of(case).eval()
    dcd, images = inference.energy_of(task.objectives.items()), tiny.batch(3).images_BCHW
    e = torch.nn.functional.normalize(torch.randn(5, 24), dim=-1)
    first, again = (inference.sample_points(task.model, dcd, images, e, steps=3) for _ in range(2))
    assert first.shape == (3, 8) and torch.isfinite(first).all() and torch.equal(first, again)


def test_a_trained_energy_tells_the_captions_of_its_images_apart():
    """Beside `align`, which spreads the captions; alone, an untrained text encoder's are too close
    together to be told apart within a test."""
    changes = {"time": 1.0, "width": 64, "negatives": 16}
    task = tiny.task({"align": {}, "dcd": SMALL | changes}, unet=tiny.ONE_LEVEL)
    batch = tiny.batch(8)
    optimizer = torch.optim.Adam(task.parameters(), lr=2e-3)
    for step in range(160):
        optimizer.zero_grad()
        # other positions, so other draws
        again = dataclasses.replace(batch, positions_B=batch.positions_B + 8 * step)
        task(again).loss.backward()
        optimizer.step()
    task.eval()
    dcd = inference.energy_of(task.objectives.items())
    e = task.model.encode_text(batch.tokens_BL, batch.mask_BL)[0].e_BE
    found = inference.class_energies(task.model, dcd, batch.images_BCHW, e).argmin(1)
    right = (found == torch.arange(8)).float().mean().item()
    print(f"{right:.2f} of 8 right, chance 0.125")
    assert right >= 0.75


def test_a_run_with_it_can_be_planned_without_memory():
    """On the meta device, where nothing that depends on data can be computed."""
    for case in CASES.values():
        with torch.device("meta"):
            task = tiny.task({"dcd": SMALL | case}, unet=tiny.ONE_LEVEL)
        batch = tiny.batch(4)
        batch = dataclasses.replace(batch.to("meta"), positions_B=batch.positions_B)
        assert task(batch).loss.device.type == "meta"


def test_stand_alone_networks_are_smooth_energies():
    torch.manual_seed(0)
    for net, x in (
        (EnergyMLP(2, 16, 3, levels=2, frequencies=(0.5, 1.0)), torch.randn(5, 2)),
        (EnergyConv(1, 4, levels=2), torch.randn(5, 1, 8, 8)),
    ):
        level = torch.tensor([0, 1, 0, 1, 1])
        with torch.no_grad():
            net.level.weight.normal_()
        assert net(x, level).shape == (5,)
        assert torch.allclose(net(x[1:2], level[1:2]), net(x, level)[1:2], atol=1e-5)
        assert not torch.allclose(net(x, level), net(x, 1 - level))
        x = x.requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        assert h.abs().max() > 0
