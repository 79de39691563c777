"""Discrete noise schedules against their formulas, worked out one step at a time."""

import math

import pytest
import torch

from bdense_core import discrete
from bdense_core.discrete import DiscreteSchedule
from bdense_core.errors import BadValue

SCHEDULES = {"linear": discrete.linear, "cosine": discrete.cosine}
schedules = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


def running_product(betas):
    share, found = 1.0, []
    for beta in betas:
        share *= 1 - beta
        found.append(share)
    return found


def test_linear_is_the_schedule_of_ddpm():
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    share = discrete.linear().alphas_cumprod
    assert share.tolist() == pytest.approx(running_product(betas), rel=1e-12)
    assert share[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)  # what DDPM's papers call "about 4e-5"


def test_cosine_is_the_closed_form_wherever_no_limit_holds():
    def closed(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = discrete.cosine()
    limited = (schedule.betas == 1e-4) | (schedule.betas == 0.9999)
    assert limited.nonzero().flatten().tolist() == [*range(13), 999]
    share = schedule.alphas_cumprod
    for t in (13, 100, 500, 998):
        assert (share[t] / share[12]).item() == pytest.approx(closed(t + 1) / closed(13), rel=1e-9)
    assert share[12].item() == pytest.approx(0.9999**13)


@schedules
def test_noise_levels_and_ratios_describe_the_same_share(make):
    schedule = make(50)
    share = schedule.alphas_cumprod
    assert schedule.num_steps == 50
    assert torch.allclose(1 / (1 + schedule.sigmas**2), share, rtol=1e-12)
    assert torch.allclose(schedule.snr, 1 / schedule.sigmas**2, rtol=1e-3)  # 1e-8 in the denominator
    assert (schedule.snr < 1 / schedule.sigmas**2).all()
    assert torch.equal(schedule.alphas_cumprod_prev[1:], share[:-1])
    assert schedule.alphas_cumprod_prev[0] == 1
    assert share.dtype == torch.float64


@schedules
def test_the_step_of_a_steps_own_level_is_that_step(make):
    schedule = make()
    steps = torch.arange(1000, dtype=torch.float64)
    assert torch.allclose(schedule.step_of(schedule.sigmas), steps, atol=1e-9)
    single = schedule.step_of(schedule.sigmas.float())
    assert single.dtype == torch.float32
    assert (single.double() - steps).abs().max() < 1e-4


@schedules
def test_between_steps_the_logarithm_of_the_level_is_interpolated(make):
    schedule = make(20)
    between = schedule.sigmas[3] ** 0.25 * schedule.sigmas[4] ** 0.75
    assert schedule.step_of(between).item() == pytest.approx(3.75)
    assert schedule.step_of(torch.full((2, 3), between)).tolist() == [[pytest.approx(3.75)] * 3] * 2


@schedules
def test_beyond_the_ends_the_step_is_the_end(make):
    schedule = make(20)
    beyond = torch.tensor([0.0, 0.5 * schedule.sigmas[0], 2 * schedule.sigmas[-1], math.inf])
    assert schedule.step_of(beyond).tolist() == [0, 0, 19, 19]


@pytest.mark.parametrize("betas", [[0.5], [0.1, 1.0], [0.1, 0.0], [0.1, math.nan], [[0.1, 0.2]]])
def test_betas_that_are_no_variances_are_refused(betas):
    with pytest.raises(BadValue, match="between 0 and 1"):
        DiscreteSchedule(torch.tensor(betas, dtype=torch.float64))


def test_a_schedule_first_asked_for_without_memory_has_its_numbers():
    """What is computed is kept, so the default device of whoever comes first must not matter."""
    with torch.device("meta"):
        schedule = discrete.linear(30)
    assert schedule.alphas_cumprod.tolist() == pytest.approx(running_product(schedule.betas.tolist()))
