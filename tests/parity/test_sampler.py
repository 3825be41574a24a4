"""Schedules and samplers against diffusers' schedulers, driven by the same made-up denoiser."""

import diffusers
import pytest
import torch

from pretrain.diffusion.path import StreamConfig, build_path
from pretrain.diffusion.sampler import sample, start
from pretrain.diffusion.schedule import EDMConfig, ScaledLinearConfig

SD = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)


def network(z, k):
    """A smooth stand-in for the eps-network, of the timestep too."""
    return torch.tanh(0.7 * z + 0.1 * k / 1000) + 0.05 * z.roll(1, -1)


def ours(method, steps, eps):
    path = build_path(StreamConfig(schedule=ScaledLinearConfig(), predict="eps"))

    def denoise(z, t):
        return path.x0_of(network(z, t[0] - 1), z, t)  # time k is diffusers' timestep k - 1

    return sample(path, denoise, eps, steps, method)


def theirs(scheduler, steps, eps):
    scheduler.set_timesteps(steps)
    z = eps * path_sigma_max()
    for k in scheduler.timesteps:
        z = scheduler.step(network(z, k), k, z).prev_sample
    return z


def path_sigma_max():
    path = build_path(StreamConfig())
    return path.schedule.sigma(torch.tensor(1000.0))


def test_alphas_equal_diffusers():
    schedule = build_path(StreamConfig()).schedule
    reference = diffusers.DDIMScheduler(**SD).alphas_cumprod
    ours = schedule.alpha(torch.arange(1, 1001).float()) ** 2
    assert (ours - reference).abs().max() < 1e-6  # diffusers multiplies in fp32: measured 3.6e-7


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_ddim_equals_diffusers(steps):
    eps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.DDIMScheduler(
        **SD,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type="epsilon",
    )
    expected = theirs(scheduler, steps, eps)
    assert torch.allclose(ours("ddim", steps, eps), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [10, 20])
def test_dpmpp_equals_diffusers(steps):
    eps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD,
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
        lower_order_final=True,
        euler_at_final=False,
    )
    expected = theirs(scheduler, steps, eps)
    assert torch.allclose(ours("dpmpp_2m", steps, eps), expected, atol=2e-4, rtol=2e-4)


def test_edm_grid_equals_diffusers():
    config = EDMConfig()
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=config.sigma_min, sigma_max=config.sigma_max, sigma_data=0.5, rho=config.rho
    )
    scheduler.set_timesteps(18)
    grid = build_path(StreamConfig(schedule=config, predict="edm")).schedule.grid(18)
    assert torch.allclose(grid, scheduler.sigmas, rtol=1e-5)


@pytest.mark.parametrize(
    ("stream", "method", "steps", "ratio"),
    [
        (StreamConfig(schedule=EDMConfig(), predict="edm"), "heun", 50, 0.3),  # second order: 1/4
        (StreamConfig(schedule=EDMConfig(), predict="edm"), "ddim", 500, 0.6),  # first order: 1/2
        (StreamConfig(), "ddim", 500, 0.6),
        (StreamConfig(), "dpmpp_2m", 500, 0.6),  # its last step, to clean data, is first order
        (StreamConfig(gamma=0.7, predict="x0"), "ddim", 500, 0.6),
    ],
)
def test_samplers_converge_to_the_exact_flow_of_a_gaussian(stream, method, steps, ratio):
    """For x_0 ~ N(mu, s^2) the probability-flow ODE has a closed form: x_0 = mu + s (z_T - a mu) /
    sqrt(a^2 s^2 + b^2).

    Twice the steps must divide the error by what the sampler's order says.
    """
    path, mu, s = build_path(stream), 0.6, 0.25

    def level(t):
        t = torch.as_tensor(t, dtype=torch.float32).reshape(1)
        return path.schedule.alpha(t) * stream.gamma, path.schedule.sigma(t)

    def denoise(z, t):
        a, b = level(t[0])
        return mu + s**2 * a / (a**2 * s**2 + b**2) * (z - a * mu)  # E[x_0 | z_t]

    def error(n):
        return (sample(path, denoise, eps, n, method) - exact).abs().max().item()

    eps = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    a, b = level(path.schedule.t_max)
    exact = mu + s * (start(path, eps) - a * mu) / (a**2 * s**2 + b**2).sqrt()
    coarse, fine = error(steps), error(2 * steps)
    assert coarse < 0.1 and fine < ratio * coarse, (coarse, fine)


def test_sampling_can_end_early_with_the_estimate_of_the_last_level_above():
    path = build_path(StreamConfig(schedule=EDMConfig(), predict="edm"))
    seen = []

    def denoise(z, t):
        seen.append(float(t[0]))
        return 0 * z + t[0]

    out = sample(path, denoise, torch.ones(2, 3), 18, "ddim", last_noise=0.3)
    assert seen == [float(t) for t in path.schedule.grid(18) if t > 0.3]
    assert torch.allclose(out, torch.full_like(out, seen[-1]))
