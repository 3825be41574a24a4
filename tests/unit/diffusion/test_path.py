"""The algebra of paths: inverses, round trips, and what each loss is in closed form."""

import pytest
import torch

from pretrain.diffusion.path import StreamConfig, build_path
from pretrain.diffusion.schedule import EDMConfig, ScaledLinear, ScaledLinearConfig
from pretrain.errors import ConfigError

STREAMS = {
    "eps": StreamConfig(predict="eps"),
    "x0": StreamConfig(predict="x0"),
    "v": StreamConfig(predict="v"),
    "x0 with gamma": StreamConfig(predict="x0", gamma=0.3),
    "edm": StreamConfig(predict="edm", schedule=EDMConfig()),
    "edm over scaled_linear": StreamConfig(predict="edm", schedule=ScaledLinearConfig()),
}


def draw(stream, n=64):
    path, g = build_path(stream), torch.Generator().manual_seed(0)
    t = path.schedule.training_times(torch.rand(n, generator=g) * 0.9 + 0.05)
    x0, eps = torch.randn(n, 5, generator=g), torch.randn(n, 5, generator=g)
    return path, x0, eps, t, path.noised(x0, eps, t)


@pytest.mark.parametrize("name", STREAMS)
def test_the_right_output_gives_back_the_data_and_the_noise(name):
    path, x0, eps, t, z_t = draw(STREAMS[name])
    f = path.f_target(x0, z_t, t)
    assert torch.allclose(path.x0_of(f, z_t, t), x0, atol=2e-3)
    assert torch.allclose(path.eps_of(z_t, x0, t), eps, atol=2e-3)


def test_the_target_of_eps_is_the_noise_and_of_v_is_v():
    path, x0, eps, t, z_t = draw(STREAMS["eps"])
    assert torch.allclose(path.f_target(x0, z_t, t), eps, atol=1e-3)
    path, x0, eps, t, z_t = draw(STREAMS["v"])
    a, s = path.schedule.alpha(t)[:, None], path.schedule.sigma(t)[:, None]
    assert torch.allclose(path.f_target(x0, z_t, t), a * eps - s * x0, atol=1e-3)


def test_edm_loss_is_the_papers_weighted_denoising_loss():
    """Karras et al. 2022, Eq. 8: (s^2 + d^2) / (s d)^2 |D - x_0|^2 equals the MSE in the network's
    output."""
    path, x0, _, t, z_t = draw(STREAMS["edm"])
    f = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    d, s = 0.5, t[:, None]
    papers = (s**2 + d**2) / (s * d) ** 2 * (path.x0_of(f, z_t, t) - x0) ** 2
    assert torch.allclose((f - path.f_target(x0, z_t, t)) ** 2, papers, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", [ScaledLinearConfig(), EDMConfig()])
def test_time_is_the_inverse_of_noise_to_signal(schedule):
    s = build_path(StreamConfig(schedule=schedule, predict="edm")).schedule
    t = torch.tensor([1.0, 1.5, 20.25, 70.0])
    assert torch.allclose(s.time_of(s.sigma(t) / s.alpha(t)), t, rtol=1e-3)


@pytest.mark.parametrize("schedule", [ScaledLinearConfig(), EDMConfig()])
def test_time_zero_is_clean_data_and_embeds_as_zero(schedule):
    s = build_path(StreamConfig(schedule=schedule, predict="edm")).schedule
    zero = torch.zeros(1)
    assert s.alpha(zero).item() == 1 and s.sigma(zero).item() == 0 and s.embed(zero).item() == 0
    grid = s.grid(7)
    assert len(grid) == 8 and grid[0] == s.t_max and grid[-1] == 0 and (grid.diff() < 0).all()


def test_scaled_linear_trains_on_every_timestep_alike():
    s = build_path(StreamConfig(schedule=ScaledLinearConfig(steps=10))).schedule
    times = s.training_times((torch.arange(1000) + 0.5) / 1000)
    assert times.unique(return_counts=True)[1].tolist() == [100] * 10
    assert (times.min(), times.max()) == (1, 10)


def test_edm_times_are_log_normal():
    s = build_path(StreamConfig(schedule=EDMConfig(), predict="edm")).schedule
    logs = s.training_times((torch.arange(20_000) + 0.5) / 20_000).log()
    assert abs(logs.mean() + 1.2) < 1e-2 and abs(logs.std() - 1.2) < 1e-2


@pytest.mark.parametrize(
    "stream",
    [StreamConfig(predict="v", gamma=0.5), StreamConfig(predict="eps", schedule=EDMConfig())],
)
def test_a_pair_that_does_not_go_together_is_refused(stream):
    with pytest.raises(ConfigError, match="predict="):
        build_path(stream)


def test_the_table_of_a_schedule_is_numbers_where_a_model_is_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        made = ScaledLinear(ScaledLinearConfig())
    t = torch.tensor([0.0, 1.0, 500.5])
    assert torch.equal(made.alpha(t), ScaledLinear(ScaledLinearConfig()).alpha(t))
