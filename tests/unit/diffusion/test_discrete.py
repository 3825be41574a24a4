"""Discrete diffusion against what enumeration and matrix products give."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pretrain.config import build
from pretrain.diffusion import discrete
from pretrain.diffusion.discrete import DiscreteProcess, ProcessConfig
from pretrain.errors import ConfigError

V, T = 3, 6
SOFT = {"keep_first": 0.8, "keep_last": 0.05, "mask_first": 0.1, "mask_last": 0.7}
RELEASED = {"keep_first": 0.99999, "keep_last": 9e-6, "mask_first": 9e-6, "mask_last": 0.99999}
KINDS = ["absorbing", "multinomial", "mask_and_replace"]


def process(kind: str, codes: int = V, **fields) -> DiscreteProcess:
    return DiscreteProcess(ProcessConfig(kind=kind, **({"steps": T} | SOFT | fields)), codes)


def every(kind: str) -> tuple[DiscreteProcess, Tensor, Tensor]:
    """Each (x_0, x_t), as batches of one token."""
    pairs = torch.tensor(list(itertools.product(range(V), range(V + 1))))
    return process(kind), pairs[:, :1], pairs[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, RELEASED])
def test_the_closed_form_is_the_product_of_the_steps(kind: str, fields: dict) -> None:
    p = process(kind, **fields)
    for s, t in [(0, 1), (0, T), (2, 5), (0, 3)]:
        product = torch.eye(V + 1)
        for k in range(s, t):
            step = p.matrix(k, k + 1)
            assert torch.allclose(step.sum(1), torch.ones(V + 1)) and (step >= 0).all()
            product = product @ step
        assert torch.allclose(p.matrix(s, t), product, atol=2e-6)
    masks, replaces = p.matrix(0, T)[0, -1] > 0, p.matrix(0, T)[0, 1] > 0
    assert (bool(masks), bool(replaces)) == (kind != "multinomial", kind != "absorbing")


def test_alpha1_runs_from_the_released_first_to_the_released_last_values() -> None:
    p = DiscreteProcess(ProcessConfig(), 100)
    first, last = p.matrix(0, 1)[0], p.matrix(0, 80)[0]
    assert first[0] - first[1] == pytest.approx(0.99999, abs=1e-6)
    assert first[-1] == pytest.approx(9e-6, rel=1e-3)
    assert last[0] - last[1] == pytest.approx(9e-6, rel=1e-2)
    assert last[-1] == pytest.approx(0.99999, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_noising_draws_from_the_marginal(kind: str) -> None:
    p, n = process(kind), 40_000
    u = torch.rand(n, 1, V + 1, generator=torch.Generator().manual_seed(0))
    t = torch.full((n,), 4)
    x = p.noised(torch.ones(n, 1, dtype=torch.long), t, u)
    share = torch.bincount(x[:, 0], minlength=V + 1) / n
    assert torch.allclose(share, p.matrix(0, 4)[1], atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("s", "t"), [(0, 1), (1, 2), (3, 4), (2, 6), (0, 4)])
def test_posteriors_are_bayes_rule(kind: str, s: int, t: int) -> None:
    p, x0, x_t = every(kind)
    s_B, t_B = torch.full((len(x0),), s), torch.full((len(x0),), t)
    got = p.log_posterior(x0, x_t, s_B, t_B)[:, 0].exp()
    to_s, on, to_t = p.matrix(0, s), p.matrix(s, t), p.matrix(0, t)
    for row, a, b in zip(got, x0[:, 0], x_t[:, 0], strict=True):
        if to_t[a, b] > 0:
            assert torch.allclose(row, to_s[a] * on[:, b] / to_t[a, b], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reverse_is_the_mixture_of_posteriors(kind: str) -> None:
    """VQ-Diffusion Eq. 11, by enumeration of x_0, also where some x_0 cannot lead to x_t."""
    p = process(kind)
    probability = torch.tensor([0.5, 0.3, 0.2])
    for s, t in [(0, 1), (2, 3), (1, 5)]:
        to_s, on, to_t = (p.matrix(*k).double() for k in ((0, s), (s, t), (0, t)))
        for x_t in range(V + 1):
            expected = torch.zeros(V + 1).double()
            for x0 in range(V):
                if to_t[x0, x_t] > 0:
                    expected += probability[x0] * to_s[x0] * on[:, x_t] / to_t[x0, x_t]
            if expected.sum() == 0:
                continue
            at = torch.tensor([[x_t]]), torch.tensor([s]), torch.tensor([t])
            got = p.log_reverse(probability.log()[None, None], *at)[0, 0].exp()
            assert torch.allclose(got.double(), expected / expected.sum(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_of_an_exact_model_is_the_entropy_and_pointwise_the_likelihood(kind: str) -> None:
    p, data = process(kind), torch.tensor([0.6, 0.3, 0.1])
    bounds = exact_bounds(p, data)
    assert torch.allclose(bounds, -data.log(), atol=1e-4)
    entropy = -(data * data.log()).sum()
    assert float((data * bounds).sum()) == pytest.approx(float(entropy), abs=1e-4)
    worse = exact_bounds(p, data, believed=torch.tensor([0.2, 0.2, 0.6]))
    assert float((data * worse).sum()) > float(entropy) + 0.1


def exact_bounds(p: DiscreteProcess, data: Tensor, believed: Tensor | None = None) -> Tensor:
    """L_vb of each x_0, summed over t and x_t, of the model that is exact for ``believed``."""
    believed = data if believed is None else believed
    x0 = torch.arange(p.codes)[:, None]
    total = discrete.vb_prior(p, x0, believed @ p.matrix(0, p.steps)[:-1])[:, 0]
    for t in range(1, p.steps + 1):
        to_t = p.matrix(0, t)[:-1]
        for x_t in range(p.codes + 1):
            joint = believed * to_t[:, x_t]
            if joint.sum() == 0:
                continue
            log_x0 = (joint / joint.sum()).clamp(min=1e-30).log().expand(p.codes, 1, -1)
            at = torch.full((p.codes, 1), x_t), torch.full((p.codes,), t)
            terms = discrete.vb_terms(p, log_x0, x0, *at)[:, 0]
            total = total + torch.where(to_t[:, x_t] > 0, to_t[:, x_t] * terms, 0.0)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_an_exact_model_gives_the_data_in_any_number_of_steps(kind: str) -> None:
    """Of one token the reverse is exact over any stretch; the prior must be the data's own q(x_T),
    here of uniform data."""
    p, n = process(kind), 20_000
    for steps in (T, 2, 1):

        def denoise(x_t: Tensor, t_B: Tensor) -> Tensor:
            joint = p.matrix(0, int(t_B[0]))[:-1].T[x_t] / V
            return (joint / joint.sum(-1, keepdim=True)).clamp(min=1e-30).log()

        x = p.sample(denoise, (n, 1), steps, torch.Generator().manual_seed(1))
        share = torch.bincount(x[:, 0], minlength=V + 1) / n
        assert torch.allclose(share, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]), atol=0.015)


def test_sampling_is_the_models_and_temperature_sharpens() -> None:
    p = DiscreteProcess(ProcessConfig(kind="absorbing", steps=8), V)
    log_p = torch.tensor([0.7, 0.2, 0.1]).log()
    for temperature, expected in ((1.0, 0.7), (0.5, 0.49 / 0.54)):
        x = p.sample(
            lambda x, _: log_p.expand(*x.shape, -1),
            (4000, 2),
            4,
            torch.Generator().manual_seed(2),
            temperature,
        )
        assert float((x == 0).float().mean()) == pytest.approx(expected, abs=0.02)


def test_a_grid_skips_and_refuses_more_steps_than_there_are() -> None:
    p = DiscreteProcess(ProcessConfig(steps=12), V)
    assert p.grid(12) == list(range(12, -1, -1))
    assert p.grid(5)[0] == 12 and p.grid(5)[-1] == 0 and len(set(p.grid(5))) == 6
    with pytest.raises(ValueError, match=r"steps=13 .*1\.\.12"):
        p.grid(13)


def test_gradients_are_finite_where_probabilities_vanish() -> None:
    for kind in KINDS:
        p, x0, x_t = every(kind)
        logits = torch.zeros(len(x0), 1, V)
        logits[..., 0] = 200.0
        logits.requires_grad_()
        terms = discrete.vb_terms(p, logits.log_softmax(-1), x0, x_t, torch.full((len(x0),), 3))
        terms.sum().backward()
        assert torch.isfinite(terms).all() and torch.isfinite(logits.grad).all(), kind


def test_schedules_that_are_no_distribution_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask_last=0.9 .*lower"):
        build(ProcessConfig, {"keep_last": 0.2, "mask_last": 0.9})
    with pytest.raises(ConfigError, match="keep_first"):
        build(ProcessConfig, {"keep_first": 0.1, "keep_last": 0.9})
    with pytest.raises(ValueError, match="lower mask_last"):
        DiscreteProcess(ProcessConfig(keep_first=0.5, keep_last=0.5, mask_last=0.4), V)


def test_kl_is_zero_only_between_equals() -> None:
    a, b = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert float(discrete.kl(a, a)) == 0
    assert float(discrete.kl(a, b)) == pytest.approx(0.5 * math.log(25 / 9))
