import math
from itertools import pairwise

import pytest

from bdense_core import sigmas
from bdense_core.errors import BadValue


@pytest.mark.parametrize("schedule", sigmas.SCHEDULES)
@pytest.mark.parametrize("num_steps", [2, 4, 13])
def test_grids_fall_strictly_between_their_limits(schedule, num_steps):
    grid = sigmas.student_grid(num_steps, schedule=schedule)
    assert len(grid) == num_steps
    assert all(later < earlier for earlier, later in pairwise(grid))
    assert (grid[0], grid[-1]) == pytest.approx((80.0, 0.006), rel=1e-9)


@pytest.mark.parametrize("schedule", sigmas.SCHEDULES)
@pytest.mark.parametrize("num_branches", [1, 2, 3, 4, 7])
def test_teacher_grid_contains_every_student_level_bit_for_bit(schedule, num_branches):
    for num_steps in range(2, 9):
        teacher = sigmas.teacher_grid(num_steps, num_branches, schedule=schedule)
        assert len(teacher) == num_branches * (num_steps - 1) + 1
        assert teacher[::num_branches] == sigmas.student_grid(num_steps, schedule=schedule)


def test_teacher_of_a_four_point_student_with_four_branches_has_thirteen_points():
    assert len(sigmas.teacher_grid(4, 4)) == 13  # spec/methods.md 1.2


def test_polynomial_with_rho_one_is_linear():
    assert sigmas.polynomial(3, sigma_min=1.0, sigma_max=3.0, rho=1.0) == pytest.approx((3.0, 2.0, 1.0))


def test_logsnr_has_equal_ratios():
    assert sigmas.logsnr(4, sigma_min=0.1, sigma_max=100.0) == pytest.approx((100.0, 10.0, 1.0, 0.1))


def test_discrete_hits_the_table_at_its_own_times():
    table = [1 / (1 + s**2) for s in (0.5, 1.0, 2.0, 4.0)]  # alpha-bar of these sigmas
    grid = sigmas.discrete(4, sigma_min=0.5, sigma_max=4.0, alphas_cumprod=table)
    assert grid == pytest.approx((4.0, 2.0, 1.0, 0.5), rel=1e-12)


def test_vp_time_inverts_vp_sigma():
    constants = sigmas.vp_constants(0.002, 80.0)
    assert sigmas.vp_sigma(1.0, *constants) == pytest.approx(80.0)
    assert sigmas.vp_sigma(0.001, *constants) == pytest.approx(0.002)
    assert sigmas.vp_time(sigmas.vp_sigma(0.3, *constants), *constants) == pytest.approx(0.3)


@pytest.mark.parametrize(("nfe", "num_steps"), [(2, 4), (3, 5), (4, 6), (5, 7)])
def test_an_analytic_first_step_counts_no_network_call(nfe, num_steps):
    assert sigmas.num_steps_of(nfe) == num_steps
    assert sigmas.nfe_of(num_steps) == nfe
    assert sigmas.num_steps_of(nfe, afs=False) == num_steps - 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_steps": 1}, "num_steps"),
        ({"num_steps": 4, "sigma_min": 80.0}, "sigma_min"),
        ({"num_steps": 4, "sigma_min": math.nan}, "sigma_min"),
        ({"num_steps": 4, "rho": 0.0}, "rho"),
        ({"num_steps": 4, "schedule": "polynomal"}, "did you mean polynomial"),
    ],
)
def test_impossible_grids_are_named(wrong, named):
    with pytest.raises(BadValue, match=named):
        sigmas.student_grid(**wrong)
