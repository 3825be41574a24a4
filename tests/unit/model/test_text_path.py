"""What the text stream's output stands for: ê_0 by the path's closed form, in loss and chain."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.diffusion.path import StreamConfig
from pretrain.inference import Heads, InferenceConfig
from pretrain.rng import generator
from pretrain.task import PretrainTask, TaskConfig
from tests.support import tiny

GAMMA = 0.7


def of(predict: str, gamma: float = GAMMA) -> tuple[PretrainTask, torch.Tensor]:
    """A task whose text stream predicts ``predict``, and the raw output F it will give, one row of
    constants: the predictor's bias, its weight being zero."""
    task = tiny.task({"align": {}}, text_path=StreamConfig(predict=predict, gamma=gamma)).eval()
    predictor = task.model.trunk.head.predictor
    row = torch.linspace(-1, 1, predictor.out_features)
    with torch.no_grad():
        predictor.weight.zero_()
        predictor.bias.copy_(row)
    return task, row


def signal(task: PretrainTask, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar) and sqrt(1 - abar) of Stable Diffusion's schedule, from its betas in float64."""
    c = task.model.config.text_path.schedule
    betas = torch.linspace(c.beta_start**0.5, c.beta_end**0.5, c.steps, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[t.long() - 1]
    return abar.sqrt()[:, None], (1 - abar).sqrt()[:, None]


@torch.no_grad()
@pytest.mark.parametrize("predict", ["x0", "eps"])
def test_e0_is_what_the_path_makes_of_the_output(predict: str) -> None:
    task, row = of(predict)
    noised = task.noise(tiny.batch(6))
    e0_hat = task.model(noised, generation=False).e0_hat_BE
    expected = row.double().expand_as(e0_hat)
    if predict == "eps":  # e_t = gamma sqrt(abar) e_0 + sqrt(1 - abar) eps, solved for e_0
        alpha, sigma = signal(task, noised.t_e_B)
        expected = (noised.e_t_BE.double() - sigma * expected) / (GAMMA * alpha)
    torch.testing.assert_close(e0_hat.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_right_eps_gives_the_clean_query_back() -> None:
    """With the very noise as output, ê_0 is e_0 and the loss is that of perfect alignment."""
    task, _ = of("eps")
    noised = task.noise(tiny.batch(6))
    e0 = task.model.text_path.x0_of(noised.noise_e_BE, noised.e_t_BE, noised.t_e_B)
    torch.testing.assert_close(e0, noised.text.e_BE, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("predict", ["x0", "eps"])
def test_the_chain_follows_ddim_in_closed_form(predict: str) -> None:
    """Two steps of Alg. 3 by hand: e_T noise, ê_0 on the unit sphere, eps from it, the next e_t."""
    task, row = of(predict)
    heads = Heads(task.model, InferenceConfig())
    images = torch.zeros(1, 3, tiny.SIZE, tiny.SIZE)
    found = heads.embed_images(images, seed=5, steps=2, noises=1)[0].double()

    def estimate(e_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        e0 = row.double()
        if predict == "eps":
            e0 = (e_t - sigma * e0) / (GAMMA * alpha)
        return F.normalize(e0, dim=0)

    times = task.model.text_path.schedule.grid(2)
    (alpha, alpha_next), (sigma, sigma_next) = (s[:, 0].tolist() for s in signal(task, times[:2]))
    e_t = sigma * torch.randn(len(row), generator=generator(5, "align", 0)).double()
    e0 = estimate(e_t, alpha, sigma)
    eps = (e_t - GAMMA * alpha * e0) / sigma
    e_t = GAMMA * alpha_next * e0 + sigma_next * eps
    torch.testing.assert_close(found, estimate(e_t, alpha_next, sigma_next), rtol=1e-4, atol=1e-4)


def test_eps_trains_the_head_and_the_text_encoder() -> None:
    """The loss reaches both through the algebra, and is finite at every time."""
    task = tiny.task(
        {"align": {}}, config=TaskConfig(), text_path=StreamConfig(predict="eps", gamma=0.1)
    )
    noised = task.noise(tiny.batch(8))
    ends = dataclasses.replace(noised, t_e_B=torch.tensor([1.0, 1000.0]).repeat(4))
    assert torch.isfinite(task.model(ends).e0_hat_BE).all()
    loss = task(tiny.batch(8)).loss
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    for module in (task.model.trunk.head.predictor, task.model.text_encoder.query):
        assert module.weight.grad is not None and module.weight.grad.abs().sum() > 0
