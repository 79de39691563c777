"""The variance-preserving frame: what its two ways of writing one state have in common, and where it ends."""

import math

import pytest
import torch

from bdense_core import discrete, solvers, vp
from bdense_core.networks import coefficients

SHAPE = (2, 3, 4, 4)
OFFICIAL = vp.Cosine()


def drawn(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_snr_falls_from_its_maximum_to_its_minimum_and_alpha_and_sigma_lie_on_a_circle():
    schedule, u = vp.Cosine(-8.0, 12.0), torch.linspace(0, 1, 50, dtype=torch.float64)
    level = schedule.at(u)
    assert level.logsnr[[0, -1]].tolist() == pytest.approx([12.0, -8.0])
    assert (level.logsnr.diff() < 0).all()
    assert (level.alpha**2 + level.sigma**2).tolist() == pytest.approx([1.0] * 50)


def test_the_official_limits_are_noise_levels_of_22026_and_its_inverse():
    """exp(10), in the units of variance-exploding networks; SFD's 80 and 0.006 are -8.76 and 10.23."""
    level = OFFICIAL.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert level.in_exploding.tolist() == pytest.approx([math.exp(-10), math.exp(10)], rel=1e-9)
    edm = vp.Cosine(-2 * math.log(80), -2 * math.log(0.006)).at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert edm.in_exploding.tolist() == pytest.approx([0.006, 80.0])


def test_a_level_is_the_same_by_its_log_snr_and_by_its_noise_level_in_the_other_frame():
    level = OFFICIAL.at(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    for other in (vp.Level.of_logsnr(level.logsnr), vp.Level.exploding(level.in_exploding)):
        assert torch.allclose(other.alpha, level.alpha, rtol=1e-12)
        assert torch.allclose(other.sigma, level.sigma, rtol=1e-12)
    assert (vp.CLEAN.alpha, vp.CLEAN.sigma, vp.CLEAN.in_exploding) == (1, 0, 0)


@pytest.mark.parametrize("mean_type", ["x", "eps", "v", "both"])
def test_a_right_prediction_of_any_kind_gives_back_image_noise_and_v(mean_type):
    x, eps, level = drawn(0), drawn(1), OFFICIAL.at(torch.tensor([0.2, 0.7], dtype=torch.float64))
    at = level.beside(x)
    z, v = at.alpha * x + at.sigma * eps, at.alpha * eps - at.sigma * x
    output = {"x": x, "eps": eps, "v": v, "both": torch.cat([x, eps], 1)}[mean_type]
    found = vp.predict(output, z, level, mean_type=mean_type)
    for mine, true in ((found.x, x), (found.eps, eps), (found.v, v)):
        assert torch.allclose(mine, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mean_type", ["x", "eps", "v", "both"])
def test_networks_of_the_other_frame_turn_raw_outputs_into_the_same_image(mean_type):
    """D = c_skip x + c_out F at x = z / alpha is what `predict` makes of F at z."""
    level = OFFICIAL.at(torch.tensor([0.2, 0.7], dtype=torch.float64))
    z, output = drawn(0), drawn(1, (2, 6, 4, 4) if mean_type == "both" else SHAPE)
    at = coefficients(mean_type, level.in_exploding)
    first, *second = output.split(3, dim=1)
    image = at.skip[:, None, None, None] * z / level.beside(z).alpha + at.out[:, None, None, None] * first
    if second:
        image = image + at.out2[:, None, None, None] * second[0]
    assert torch.allclose(image, vp.predict(output, z, level, mean_type=mean_type).x, rtol=1e-10, atol=1e-12)
    assert torch.allclose(at.scale[:, None, None, None] * z / level.beside(z).alpha, z)


def test_clipping_changes_the_image_first_and_noise_and_v_follow():
    x, z, level = 3 * drawn(0), drawn(1), OFFICIAL.at(torch.tensor(0.5, dtype=torch.float64))
    found = vp.predict(x, z, level, clip=True)
    assert found.x.abs().max() == 1
    at = level.beside(z)
    assert torch.allclose(at.alpha * found.x + at.sigma * found.eps, z)
    assert torch.allclose(at.alpha * z - at.sigma * found.v, found.x)


def test_ddim_is_eulers_method_in_the_other_frame():
    """On one network, whose levels end above 0; alpha z + ... there is x + (t' - t)(x - D) / t."""

    def denoised(x, sigma):
        return (x / (1 + sigma**2)).tanh()

    levels = OFFICIAL.grid(6)[1:-1]
    z = drawn(3)
    walked = [state for _, state in vp.ddim(vp.of_exploding(denoised), z, levels)]
    sigmas = [float(level.in_exploding) for level in levels]
    expected = solvers.solve(denoised, z / levels[0].alpha, sigmas, solver="euler")[1:]
    for state, level, euler in zip(walked, levels[1:], expected, strict=True):
        assert torch.allclose(state / level.alpha, euler, rtol=1e-9)


def test_the_last_step_returns_the_predicted_image_itself():
    z = drawn(2)
    *_, (believed, state) = vp.ddim(lambda z, level: z.tanh(), z, OFFICIAL.grid(3))
    assert torch.equal(state, believed.x)


def test_a_grid_begins_at_noise_alone_and_divides_time_evenly():
    grid = vp.Cosine(-10, 10).grid(4)
    assert len(grid) == 5
    assert [float(level.logsnr) for level in grid[:-1]] == pytest.approx(
        [float(vp.Cosine(-10, 10).at(torch.tensor(u, dtype=torch.float64)).logsnr) for u in (1.0, 0.75, 0.5, 0.25)]
    )
    assert grid[-1] is vp.CLEAN


def test_the_linear_schedule_is_that_of_ddpm_between_its_steps():
    table = discrete.linear().alphas_cumprod  # after t + 1 of 1000 steps
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    found = vp.Linear().at(u)
    logs = found.alpha.log() * 2
    # A sum of log(1 - beta) is below the integral of -beta by half the sum of beta^2, and by a step's half at its ends.
    assert ((table.log() - logs).abs() <= 0.07 * u + 1e-4).all()
    torch.testing.assert_close(found.alpha**2 + found.sigma**2, torch.ones_like(u))
    assert float(vp.Linear().at(torch.zeros((), dtype=torch.float64)).sigma) == 0
