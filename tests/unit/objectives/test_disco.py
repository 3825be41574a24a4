"""DisCo-Diff against closed forms: draws, gradients, and marginals by enumeration over codes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pretrain.config import build
from pretrain.diffusion.curvature import curvature
from pretrain.diffusion.path import StreamConfig, build_path
from pretrain.diffusion.sampler import sample
from pretrain.diffusion.schedule import EDMConfig
from pretrain.errors import ConfigError
from pretrain.inference import Heads, InferenceConfig
from pretrain.objectives import _disco_prior as stage2
from pretrain.objectives._disco_codes import draw_codes, entropy, missing_entropy, use_of_codes
from pretrain.objectives._disco_prior import FitConfig, Prior, PriorConfig
from pretrain.objectives._disco_sampling import CodeGuidance
from pretrain.objectives.disco import Codes, Disco, Settings
from pretrain.rng import SampleRandom
from pretrain.task import PretrainTask, check_objectives
from tests.support import tiny

SMALL = {
    "codes": 3,
    "values": 4,
    "encoder": {"width": 16, "layers": 1, "head_dim": 8, "patch": 4},
    "tokens": {"width": 16, "layers": 1, "head_dim": 8},
}


def task(**changes: object) -> tuple[PretrainTask, Disco]:
    made = tiny.task({"generate": {}, "disco": {**SMALL, **changes}})
    disco = made.objectives["disco"]
    assert isinstance(disco, Disco)
    return made, disco


# Draws


@pytest.mark.parametrize("temperature", [0.01, 1.0, 5.0])
def test_straight_through_frequencies_equal_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    n, logits = 40_000, torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 0.5]])
    codes = draw_codes(logits.expand(n, -1, -1), torch.rand(n, 2, 3), temperature, hard=True)
    # Values exactly one-hot but for the rounding of x + (y - y).
    assert ((codes < 1e-6) | ((codes - 1).abs() < 1e-6)).all()
    p = logits.softmax(-1)
    deviations = (codes.mean(0) - p).abs() / (p * (1 - p) / n).sqrt()
    assert deviations.max() < 4


def test_the_gradient_is_the_soft_draws() -> None:
    """d soft_k / d logit_j = soft_k (delta_kj - soft_j) / tau."""
    u, tau, weight = torch.rand(1, 1, 4), 0.7, torch.tensor([1.0, -2.0, 0.5, 3.0])
    logits = torch.randn(1, 1, 4, requires_grad=True)
    soft = draw_codes(logits.detach(), u, tau, hard=False)[0, 0]
    (draw_codes(logits, u, tau, hard=True)[0, 0] * weight).sum().backward()
    expected = soft * (weight - (soft * weight).sum()) / tau
    assert logits.grad is not None and torch.allclose(logits.grad[0, 0], expected, atol=1e-6)


def test_a_draw_of_zero_or_nearly_one_is_finite() -> None:
    u = torch.tensor([0.0, 1 - 2**-24, 0.5, 0.0])[None, None]
    assert torch.isfinite(draw_codes(torch.zeros(1, 1, 4), u, 1.0, hard=False)).all()


def test_use_of_codes_tells_collapse_noise_and_use_apart() -> None:
    n, k = 64, 4
    even = 50 * torch.nn.functional.one_hot(torch.arange(n) % k, k).float()[:, None]
    collapsed, noise = torch.zeros(n, 1, k), torch.zeros(n, 1, k)
    collapsed[..., 0] = 50
    found = {name: use_of_codes(x) for name, x in [("e", even), ("c", collapsed), ("n", noise)]}
    assert float(found["e"]["perplexity_0"]) == pytest.approx(k)
    assert float(found["c"]["perplexity"]) == pytest.approx(1)
    assert float(found["n"]["perplexity_min"]) == pytest.approx(k)
    assert float(found["e"]["information"]) == pytest.approx(math.log(k), rel=1e-4)
    assert float(found["n"]["information"]) == pytest.approx(0, abs=1e-5)
    assert float(missing_entropy(collapsed.softmax(-1).mean(0))) == pytest.approx(math.log(k))
    assert float(missing_entropy(noise.softmax(-1).mean(0))) == pytest.approx(0, abs=1e-6)


# Enumeration over codes: data of four atoms blurred, one code of each


MEANS, SPREAD = torch.tensor([-3.0, -1.0, 1.5, 3.0]), 0.2
SHARES = torch.tensor([0.4, 0.3, 0.2, 0.1])


def denoiser_given(k: int):
    """D(x, sigma, z = k) of N(mean_k, SPREAD^2)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s2 = (sigma**2).view(-1, *(1,) * (x.ndim - 1))
        return (SPREAD**2 * x + s2 * MEANS[k]) / (SPREAD**2 + s2)

    return denoise


def cdf(x: Tensor, mean: Tensor, std: float) -> Tensor:
    return torch.special.ndtr((x - mean) / std)


def test_the_marginal_by_enumeration_over_codes_is_the_data() -> None:
    """sum_z p(z) (the ODE under D(., z)) is the mixture: quantiles of noise go to quantiles."""
    path = build_path(StreamConfig(schedule=EDMConfig(sigma_max=80), predict="edm"))
    u = (torch.arange(2000) + 0.5) / 2000
    eps = torch.special.ndtri(u)[:, None]
    x = torch.linspace(-4, 4, 41)
    found = torch.zeros_like(x)
    for k, share in enumerate(SHARES):
        made = sample(path, denoiser_given(k), eps, 60, "heun")[:, 0]
        found += share * (made[None] <= x[:, None]).float().mean(1)
    truth = (SHARES * cdf(x[:, None], MEANS, SPREAD)).sum(1)
    assert (found - truth).abs().max() < 0.01


def test_codes_make_the_enumerated_loss_smaller_by_the_modes_uncertainty() -> None:
    """E |D(x) - y|^2 = sum_z p(z) E|D(x, z) - y|^2 + E Var_z(D(x, z) | x): Monte Carlo against the
    posterior enumerated over codes."""
    torch.manual_seed(0)
    n, sigma = 20_000, 2.0
    z = torch.multinomial(SHARES, n, replacement=True)
    y = MEANS[z] + SPREAD * torch.randn(n)
    x = y + sigma * torch.randn(n)
    std = (SPREAD**2 + sigma**2) ** 0.5
    log_p = SHARES.log() - 0.5 * ((x[:, None] - MEANS) / std) ** 2
    posterior = log_p.softmax(-1)
    given = torch.stack([denoiser_given(k)(x, torch.full((n,), sigma)) for k in range(4)], 1)
    marginal = (posterior * given).sum(1)
    told = given[torch.arange(n), z]
    spread = (posterior * (given - marginal[:, None]) ** 2).sum(1).mean()
    without, having = (marginal - y).square().mean(), (told - y).square().mean()
    exact = SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2)
    assert float(having) == pytest.approx(exact, rel=0.05)
    assert float(without) == pytest.approx(float(having + spread), rel=0.05)
    assert without > 10 * having


# Curvature


def test_curvature_equals_that_of_a_gaussians_trajectories() -> None:
    """x_i = a_i sqrt(s_i^2 + t^2): kappa = |x' y'' - y' x''| / |x'|^3."""
    spread, a, t = torch.tensor([0.3, 2.0]), torch.tensor([1.0, -0.7]), 1.3
    root = (spread**2 + t**2).sqrt()
    first, second = a * t / root, a * spread**2 / root**3
    kappa = (first[0] * second[1] - first[1] * second[0]).abs() / first.norm() ** 3

    def denoise(x: Tensor, sigma_B: Tensor) -> Tensor:
        return x * spread**2 / (spread**2 + sigma_B[:, None] ** 2)

    x, sigma_B = (a * root).double()[None], torch.tensor([t]).double()
    found = curvature(denoise, x, sigma_B, 1e-3)
    assert float(found) == pytest.approx(float(kappa), rel=5e-3)
    assert kappa > 0.1

    def round_one(x: Tensor, sigma_B: Tensor) -> Tensor:
        return x / (1 + sigma_B[:, None] ** 2)

    assert float(curvature(round_one, x, sigma_B, 1e-3)) < 1e-6


# The objective


def test_tokens_are_appended_for_the_generation_half_alone() -> None:
    made, _ = task()
    batch = tiny.batch(4)
    plain, context = made.noise(batch), made.context(batch)
    c = context.noised.c_BLD
    assert c.shape[1] == plain.c_BLD.shape[1] + 3
    assert torch.equal(c[:, :-3], plain.c_BLD)
    assert torch.equal(context.noised.null_c_BLD, plain.null_c_BLD)


@torch.no_grad()
def test_the_alignment_half_is_that_of_a_task_without_codes() -> None:
    """The stacked pass masks what it pads: equal but for rounding."""
    objectives = {"generate": {}, "align": {}}
    made = tiny.task({**objectives, "disco": SMALL})
    without = tiny.task(objectives)
    ours, theirs = (t.context(tiny.batch(4)).output.e0_hat_BE for t in (made, without))
    assert ours is not None and theirs is not None
    assert torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_dropped_samples_are_told_nothing() -> None:
    made, disco = task(drop=0.5)
    batch = tiny.batch(16)
    noised = made.context(batch).noised
    null_B = noised.extra(Codes).null_B
    assert 2 < int(null_B.sum()) < 14
    rng = SampleRandom(made.seed, batch.positions_B)
    assert torch.equal(null_B, rng.uniform("disco/drop") < 0.5)
    tokens = noised.c_BLD[:, -3:]
    null = disco.null_tokens(1)
    assert torch.allclose(tokens[null_B], null.expand(int(null_B.sum()), -1, -1), atol=1e-5)
    assert not torch.isclose(tokens[~null_B], null, atol=1e-5).all(-1).all(-1).any()


@torch.no_grad()
def test_codes_are_given_at_large_noise_only() -> None:
    made, _ = task(drop=0.0, min_noise=1.0)
    noised = made.context(tiny.batch(24)).noised
    schedule = made.model.image_path.schedule
    small = schedule.sigma(noised.t_z_B) < schedule.alpha(noised.t_z_B)
    assert 0 < int(small.sum()) < 24
    assert torch.equal(noised.extra(Codes).null_B, small)


def test_the_bonus_teaches_the_encoder_and_is_off_by_default() -> None:
    made, disco = task()
    assert Settings().entropy_bonus == 0
    term = disco(made.context(tiny.batch(4)))
    assert float(term.loss.detach()) == 0
    made, disco = task(entropy_bonus=0.5)
    context = made.context(tiny.batch(4))
    term = disco(context)
    p = context.noised.extra(Codes).logits_BMK.softmax(-1).mean(0)
    expected = 0.5 * (math.log(4) - entropy(p)).mean()
    assert torch.allclose(term.loss, expected)
    term.loss.backward()
    weight = disco.encoder.logits.weight.grad
    assert weight is not None and weight.any()
    assert disco.tokens.out.weight.grad is None


def test_it_is_refused_without_generation_and_with_bad_shapes() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.disco works through objectives\.generate"):
        check_objectives({"disco": {}, "align": {}})
    with pytest.raises(ConfigError, match=r"patch=64 is more than the 8 latent pixels"):
        task(encoder={"patch": 64})
    with pytest.raises(ConfigError, match=r"width=20 is not a multiple of head_dim=8"):
        task(tokens={"width": 20, "head_dim": 8})


# Stage 2 and inference


def prior(codes: int = 3, values: int = 4, **changes: object) -> Prior:
    torch.manual_seed(0)
    fields = {"width": 16, "layers": 1, "head_dim": 8, **changes}
    return Prior(build(PriorConfig, fields), codes, values, 32).eval()


@torch.no_grad()
def test_the_priors_probabilities_sum_to_one_over_all_codes_and_are_what_it_draws() -> None:
    net = prior(codes=2)
    net.logits.weight.mul_(4)
    every = torch.tensor(list(itertools.product(range(4), repeat=2)))
    pooled = torch.randn(1, 32)
    p = net.log_prob(every, pooled.expand(16, -1)).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    n = 4000
    drawn = net.sample(pooled.expand(n, -1), range(n))
    share = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16) / n
    assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-4).all()
    assert torch.equal(net.sample(pooled, [7]), drawn[7:8]), "a draw depends on the batch"


@torch.no_grad()
def test_a_code_is_predicted_from_those_before_it_alone() -> None:
    net, codes = prior(), torch.tensor([[1, 2, 3]])
    changed = torch.tensor([[1, 0, 0]])
    pooled = torch.zeros(1, 32)
    a, b = net(codes, pooled), net(changed, pooled)
    assert torch.allclose(a[:, :2], b[:, :2], atol=1e-6)
    assert not torch.allclose(a[:, 2], b[:, 2], atol=1e-4)


def test_fit_reaches_the_entropy_of_the_codes_and_keeps_the_best(tmp_path) -> None:
    """z_1 is uniform over two values, z_2 = z_1: log 2 nats."""
    net = prior(codes=2, values=2)

    def batches():
        draws = torch.Generator().manual_seed(0)
        while True:
            z = torch.randint(2, (64, 1), generator=draws).expand(-1, 2)
            yield z, torch.zeros(64, 32), torch.rand(64, generator=draws) < 0.2

    fitted = stage2.fit(net, batches(), FitConfig(samples=64 * 120, lr=1e-2, judge_every=64 * 30))
    assert fitted.heldout_nats == pytest.approx(math.log(2), abs=0.03)
    stage2.save(net, tmp_path, {})
    again = stage2.load(tmp_path, 2, 2, 32)
    pooled = torch.zeros(4, 32)
    assert torch.equal(again.sample(pooled, range(4)), net.eval().sample(pooled, range(4)))


@torch.no_grad()
def test_guidance_over_codes_is_the_printed_formula() -> None:
    """D(z) + w (D(z) - D(null)), and no codes below min_noise."""
    made, disco = task(min_noise=0.1)
    made.eval()
    model = made.model
    codes = torch.tensor([[0, 1, 2], [3, 3, 3]])
    guide = CodeGuidance(disco, model, lambda c, seeds: codes, weight=1.5)
    c = torch.randn(2, tiny.LENGTH, 32)
    t = torch.full((2,), 700.0)
    base, others = guide(c, torch.zeros_like(c), 0.0, [0, 1])(t)
    assert torch.equal(base[:, -3:], disco.tokens_of(codes))
    assert [w for w, _ in others] == [0.0, 1.5]
    assert torch.allclose(others[1][1], disco.condition_at_inference(c), atol=1e-6)
    below, _ = guide(c, c, 0.0, [0, 1])(torch.full((2,), 1.0))
    assert torch.allclose(below, disco.condition_at_inference(c), atol=1e-6)
    heads = Heads(model, InferenceConfig(steps=1, guidance=0), guide)
    tokens, mask = tiny.batch(2).tokens_BL, tiny.batch(2).mask_BL
    given, _ = model.encode_text(tokens, mask)
    seen = []
    plain = model.denoise_image
    model.denoise_image = lambda z_t, t, c: seen.append((z_t, t, c)) or plain(z_t, t, c)
    made_z = heads.generate_tokens(tokens, mask, [0, 1])
    ((z_t, t, stacked),) = seen
    with_z, without = plain(z_t, t, stacked).chunk(2)
    expected = model.autoencoder.decode(with_z + 1.5 * (with_z - without)).clamp(-1, 1)
    assert torch.allclose(made_z, expected, atol=1e-5)
    assert torch.allclose(stacked[:2, :-3], given.c_BLD, atol=1e-6)


@torch.no_grad()
def test_without_a_prior_images_are_drawn_with_null_tokens() -> None:
    made, disco = task()
    c = torch.randn(2, tiny.LENGTH, 32)
    base, ((w, null),) = made.conditions(c, torch.zeros_like(c), 2.0, [0, 1])(torch.ones(2))
    assert w == 2.0 and base.shape == null.shape == (2, tiny.LENGTH + 3, 32)
    assert torch.allclose(base[:, -3:], disco.null_tokens(2))
