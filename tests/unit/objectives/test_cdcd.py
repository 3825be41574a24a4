"""CDCD's losses against enumeration and hand computation, and the objective on the tiny model."""

import dataclasses
import itertools

import pytest
import torch

from pretrain.diffusion.discrete import (
    DiscreteProcess,
    ProcessConfig,
    auxiliary,
    log_one_hot,
    vb_terms,
)
from pretrain.errors import ConfigError
from pretrain.objectives import _cdcd_loss as loss
from pretrain.objectives import _cdcd_tokens as tokens
from pretrain.objectives.base import Context
from pretrain.rng import SampleRandom
from pretrain.task import PretrainTask, TaskConfig, check_objectives
from tests.support import tiny
from tests.unit.diffusion.test_discrete import exact_bounds, process

BC = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])  # p(z | c), of two conditions


@pytest.mark.parametrize("kind", ["absorbing", "multinomial", "mask_and_replace"])
def test_the_bounds_give_the_density_ratio_and_infonce_on_them_is_bayes_rule(kind: str) -> None:
    p = process(kind)
    marginal = BC.mean(0)
    with_c = torch.stack([exact_bounds(p, row) for row in BC])
    ratio_CZ = tokens.log_ratio(with_c, exact_bounds(p, marginal))
    assert torch.allclose(ratio_CZ, (BC / marginal).log(), atol=2e-4)
    # z^0..z^2, one of them from p(z|c), the rest from p(z): P(it is z^0) by enumeration.
    critic = ratio_CZ[0]
    information = 0.0
    for z in itertools.product(range(3), repeat=3):
        chances = [
            torch.stack([(BC[0] if i == right else marginal)[k] for i, k in enumerate(z)]).prod()
            for right in range(3)
        ]
        bayes = chances[0] / torch.stack(chances).sum()
        z_t = torch.tensor(z)
        real = torch.ones(1, 2, dtype=torch.bool)
        term = loss.contrast(-critic[z_t[1:]][None], real, -critic[z_t[:1]], "info_nce")
        assert float((-term).exp()) == pytest.approx(float(bayes), abs=1e-4)
        information += float(chances[0]) * (torch.tensor(3.0).log() - term)
    # ... and so the loss bounds the mutual information of z and this c from below.
    divergence = float((BC[0] * (BC[0] / marginal).log()).sum())
    assert 0 < float(information) <= divergence


def test_what_is_subtracted_is_clamped_and_masked() -> None:
    d = torch.tensor([[1.0, 5.0], [2.0, 3.0]], requires_grad=True)
    real = torch.tensor([[True, True], [True, False]])
    none = loss.contrast(d, real, torch.zeros(2), "none")
    assert float(none.detach()) == pytest.approx(-(3 + 2) / 2)
    clamped = loss.contrast(d, real, torch.zeros(2), "clamp", margin=2.5)
    assert float(clamped.detach()) == pytest.approx(-(1.75 + 2) / 2)
    clamped.backward()
    assert d.grad.tolist() == [[-0.25, 0.0], [-0.5, 0.0]], "past the margin nothing is pushed"
    weighed = loss.contrast(d, real, torch.zeros(2), "none", weight_B=torch.tensor([2.0, 0.0]))
    assert float(weighed.detach()) == pytest.approx(-3)
    nothing = loss.contrast(d, torch.zeros_like(real), torch.ones(2), "info_nce")
    assert float(nothing.detach()) == 0
    assert loss.time_weight(torch.tensor([0, 40, 80]), 80).tolist() == [1.0, 1.5, 2.0]


def test_shuffled_keeps_chunks_whole_and_is_never_the_same() -> None:
    x = torch.arange(12.0)[None, :, None].expand(3, -1, 1)
    keys = torch.rand(3, 50, 4, generator=torch.Generator().manual_seed(0))
    out = loss.shuffled(x, keys)[..., 0]
    assert out.shape == (3, 50, 12)
    assert (out.sort(-1).values == torch.arange(12.0)).all()
    assert (out != torch.arange(12.0)).any(-1).all(), "one of 150 orders of 4 is likely the old one"
    within = out.reshape(3, 50, 4, 3)
    assert (within.diff(dim=-1) == 1).all()
    order = torch.tensor([[[2.0, 0.0, 3.0, 1.0]]])  # new order: chunks 1, 3, 0, 2
    starts = loss.shuffled(x[:1], order)[0, 0, ::3, 0]
    assert starts.tolist() == [3.0, 9.0, 0.0, 6.0]
    with pytest.raises(ValueError, match="chunks=13"):
        loss.shuffled(x, torch.rand(3, 1, 13))


def test_others_are_others_and_all_are_found() -> None:
    positions = torch.tensor([40, 10, 30, 20])
    seen = set()
    for u in torch.linspace(0, 0.999, 7):
        chosen = loss.others(positions, u.expand(4), 2, gather=False)
        assert chosen.real_BK.all()
        for i, row in enumerate(chosen.index_BK.tolist()):
            assert i not in row and len(set(row)) == 2
            seen |= {(i, j) for j in row}
    assert len(seen) == 12
    few = loss.others(positions[:2], torch.zeros(2), 3, gather=False)
    assert few.real_BK.tolist() == [[True, False, False]] * 2
    assert not loss.others(positions[:1], torch.zeros(1), 1, gather=False).real_BK.any()


def test_the_released_loss_by_hand() -> None:
    p = DiscreteProcess(ProcessConfig(steps=10), 4)
    log_x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    x0 = torch.tensor([[0, 1, 2], [3, 3, 0]])
    wrong = torch.tensor([[[1, 1, 1]], [[2, 0, 0]]])
    x_t, t, real = torch.full((2, 3), 4), torch.tensor([5, 10]), torch.ones(2, 1).bool()
    config = {"auxiliary": 0.1, "contrast": 0.05, "mechanism": "sample"}
    got = tokens.token_loss(p, log_x0, x0, x_t, t, wrong, real, tokens.TokenLossConfig(**config))
    vb = vb_terms(p, log_x0, x0, x_t, t).mean(-1)
    aux = auxiliary(log_x0, x0).mean(-1)
    negative = auxiliary(log_x0, wrong[:, 0]).mean(-1)
    expected = vb + 0.1 * (2 - t / 10) * aux - 0.05 * (1 + t / 10) * negative
    assert float(got.loss) == pytest.approx(float(expected.mean()), abs=1e-5)
    step = tokens.TokenLossConfig(**(config | {"mechanism": "step"}))
    terms = tokens.token_terms(p, log_x0, x0, x_t, t, wrong, step)
    assert torch.allclose(terms.negative_BK[:, 0], vb_terms(p, log_x0, wrong[:, 0], x_t, t).mean(1))


def test_a_step_wise_negative_that_cannot_be_has_no_pull() -> None:
    """In the absorbing process a token that is shown is what it is, for every x_0^k."""
    p = DiscreteProcess(ProcessConfig(kind="absorbing", steps=10), 4)
    x0, wrong, t = torch.tensor([[1, 2]]), torch.tensor([[[3, 2]]]), torch.tensor([5])
    log_x0 = torch.full((1, 2, 4), 0.25).log()
    shown = tokens.token_terms(p, log_x0, x0, x0, t, wrong, tokens.TokenLossConfig())
    assert shown.negative_BK.abs().max() < 1e-5
    plain = tokens.TokenLossConfig(likelihood="plain", mechanism="sample")
    assert tokens.token_terms(p, log_x0, x0, x0, t, wrong, plain).negative_BK.abs().max() == 0


def test_entropy_and_alarm() -> None:
    assert float(tokens.entropy(torch.full((1, 2, 4), 0.25).log())) == pytest.approx(
        1.3863, abs=1e-3
    )
    assert float(tokens.entropy(log_one_hot(torch.tensor([[1]]), 4))) == pytest.approx(0, abs=1e-6)
    alarm = loss.LikelihoodAlarm(tolerance=0.5)
    assert [alarm.rings(x) for x in (11.2, 11.0, 11.4, 11.6, float("nan"))] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("bound", ["none", "clamp"])
def test_a_weight_that_diverges_is_refused_by_name(bound: str) -> None:
    with pytest.raises(ConfigError, match=r"weight × contrast=0.06 is over 0.05.*lower it"):
        check_objectives({"cdcd": {"weight": 6.0, "contrast": 0.01, "bound": bound}})
    with pytest.raises(ValueError, match=r"contrast=0.1 is over 0.05"):
        tokens.TokenLossConfig(contrast=0.1, bound=bound)
    check_objectives({"cdcd": {"weight": 6.0, "contrast": 0.01, "bound": "info_nce"}})


def cdcd_task(config: TaskConfig | None = None, **settings) -> PretrainTask:
    return tiny.task({"cdcd": settings}, config=config or TaskConfig(caption_drop=0))


def term(task: PretrainTask, batch):
    noised = task.noise(batch)
    rng = SampleRandom(task.seed, batch.positions_B)
    output = task.model(noised, True, False)
    context = Context(batch, noised, output, task.model, rng)
    return task.objectives["cdcd"](context), context


ALL = list(itertools.product(["sample", "step"], ["inter", "intra"]))


@pytest.mark.parametrize(("mechanism", "negatives"), ALL)
@pytest.mark.parametrize("bound", ["none", "clamp", "info_nce"])
def test_each_combination_is_finite_and_reaches_the_trunk(mechanism, negatives, bound) -> None:
    task = cdcd_task(mechanism=mechanism, negatives=negatives, bound=bound, count=2, margin=50.0)
    got, _ = term(task, tiny.batch(4))
    assert torch.isfinite(got.loss) and all(torch.isfinite(v) for v in got.metrics.values())
    got.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in task.model.trunk.parameters())


@torch.no_grad()
def test_the_negative_is_the_error_for_anothers_caption() -> None:
    """By hand, of a batch of two: each is the other's negative."""
    got, context = term(cdcd_task(bound="none", contrast=0.05), tiny.batch(2))
    noised, model = context.noised, context.model
    f = model.predict_image(noised.z_t_BCHW, noised.t_z_B, noised.text.c_BLD.flip(0))
    d = (f - noised.noise_z_BCHW).square().flatten(1).mean(1)
    weight = 1 + model.image_path.schedule.embed(noised.t_z_B) / 1000
    assert float(got.loss) == pytest.approx(float(-0.05 * (weight * d).mean()), rel=1e-4)
    again = model.predict_image(noised.z_t_BCHW, noised.t_z_B, noised.c_BLD)
    assert torch.allclose(again, context.output.f_z_BCHW, atol=1e-5), "the forward's own half"


@torch.no_grad()
def test_no_caption_the_same_caption_and_no_other_sample_are_no_negatives() -> None:
    dropped = cdcd_task(TaskConfig(caption_drop=1.0))
    assert float(term(dropped, tiny.batch(4))[0].loss) == 0
    assert float(term(cdcd_task(), tiny.batch(1))[0].loss) == 0
    batch = tiny.batch(2)
    twins = dataclasses.replace(
        batch, tokens_BL=batch.tokens_BL[:1].repeat(2, 1), mask_BL=batch.mask_BL[:1].repeat(2, 1)
    )
    assert float(term(cdcd_task(), twins)[0].loss) == 0


@torch.no_grad()
def test_a_step_wise_negative_costs_no_further_pass() -> None:
    for mechanism, passes in (("step", 0), ("sample", 1)):
        task, calls = cdcd_task(mechanism=mechanism), []
        predict = task.model.predict_image
        task.model.predict_image = lambda *a, p=predict, c=calls: c.append(1) or p(*a)
        term(task, tiny.batch(3))
        assert len(calls) == passes
