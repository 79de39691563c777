"""Weights over time and intervals: closed forms, and what holds for all schedules."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdense_core.errors import WeightsError
from bdense_core.weights import endpoint_only, log_linear, uniform, weights_at

parts = st.floats(0, 1)
slopes = st.floats(-4, 4)
rows = st.lists(st.floats(0, 1e3), min_size=4, max_size=4).filter(any).map(tuple)


def test_without_a_schedule_the_weights_hold_in_every_interval():
    assert weights_at((), (0.2, 0.8), 0.3, 3) == ((0.2, 0.8),) * 3


@given(row=rows, times=st.integers(1, 5), done=parts)
def test_a_constant_schedule_gives_exactly_its_weights_at_any_time(row, times, done):
    assert weights_at(((row,),) * times, uniform(4), done, 2) == (row, row)


@given(first=slopes, last=slopes, done=parts)
def test_between_two_log_linear_lines_lies_the_line_of_the_slope_between(first, last, done):
    schedule = tuple((log_linear(a, 0.0, 4),) for a in (first, last))
    expected = log_linear(first + (last - first) * done, 0.0, 4)
    assert weights_at(schedule, uniform(4), done, 1)[0] == pytest.approx(expected, rel=1e-12)


@given(knots=st.lists(rows, min_size=2, max_size=6), which=st.data())
def test_a_schedule_passes_through_its_weights_at_evenly_spaced_times(knots, which):
    index = which.draw(st.integers(0, len(knots) - 1))
    found = weights_at(tuple((row,) for row in knots), uniform(4), index / (len(knots) - 1), 1)[0]
    assert found == pytest.approx(knots[index], rel=1e-9, abs=1e-9)


def test_half_way_between_two_times_lies_their_geometric_mean():
    schedule = (((1.0, 1.0),), ((4.0, 1.0),), ((100.0, 1.0),))
    assert weights_at(schedule, uniform(2), 0.25, 1)[0] == pytest.approx((2.0, 1.0))
    assert weights_at(schedule, uniform(2), 0.75, 1)[0] == pytest.approx((20.0, 1.0))


def test_what_is_zero_at_both_times_stays_zero_and_what_is_at_one_fades_evenly():
    schedule = (((0.0, 0.6, 0.4),), ((0.0, 0.0, 0.4),))
    assert weights_at(schedule, uniform(3), 0.25, 1)[0] == pytest.approx((0.0, 0.45, 0.4))
    assert weights_at(schedule, uniform(3), 0.25, 1)[0][0] == 0.0


def test_each_interval_has_its_row_and_one_row_serves_all():
    early, late = (0.5, 0.5), (0.1, 0.9)
    schedule = ((uniform(2),), (early, late))
    assert weights_at(schedule, uniform(2), 0.0, 2) == (uniform(2), uniform(2))
    assert weights_at(schedule, uniform(2), 1.0, 2) == (early, late)
    middle = weights_at(schedule, uniform(2), 0.5, 2)[1]
    assert middle == pytest.approx((math.sqrt(0.05), math.sqrt(0.45)))


@pytest.mark.parametrize(
    ("schedule", "done"),
    [
        (((endpoint_only(3),),), 0.0),
        (((uniform(4), uniform(4)),), 0.0),
        (((uniform(4),), (uniform(4), uniform(3), uniform(4))), 0.0),
        ((((0.0, 0.0, 0.0, 0.0),),), 0.0),
        ((((0.5, -0.5, 0.5, 0.5),),), 0.0),
        (((uniform(4),),), 1.5),
        (((uniform(4),),), -0.1),
    ],
)
def test_other_branches_other_intervals_other_times_and_impossible_weights_are_refused(schedule, done):
    with pytest.raises(WeightsError):
        weights_at(schedule, uniform(4), done, 3)
