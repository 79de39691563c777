"""Branch weights: closed forms, and what holds for all of them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdense_core.errors import WeightsError
from bdense_core.weights import PAPER_BEST, checked, endpoint_only, log_linear, shares, uniform

slopes = st.floats(-5, 5)
intercepts = st.floats(-5, 5)
branches = st.integers(1, 8)
weights = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


def approx(values):
    return pytest.approx(values, rel=1e-9)


# --- by hand --------------------------------------------------------------------------------------------


def test_slope_ln4_gives_powers_of_four():
    assert log_linear(math.log(4), 0.0, 4) == approx([1, 4, 16, 64])
    assert shares(log_linear(math.log(4), 0.0, 4)) == approx([1 / 85, 4 / 85, 16 / 85, 64 / 85])


def test_slope_zero_is_uniform_and_the_intercept_is_the_log_of_the_first_weight():
    assert log_linear(0.0, math.log(3), 3) == approx([3, 3, 3])
    assert log_linear(1.0, math.log(0.5), 2) == approx([0.5, 0.5 * math.e])
    assert log_linear(-math.log(2), 0.0, 3) == approx([1, 0.5, 0.25])


def test_the_papers_best_row_gives_its_published_shares():
    """spec/methods.md 5.2: endpoint .71 to .75, then .19 to .21, .047 to .061, .012 to .018."""
    first, second, third, endpoint = shares(log_linear(*PAPER_BEST, 4))
    assert 0.71 <= endpoint <= 0.755
    assert 0.185 <= third <= 0.215
    assert 0.0465 <= second <= 0.0615
    assert 0.0115 <= first <= 0.0185


def test_uniform_and_endpoint_only():
    assert uniform(4) == (0.25, 0.25, 0.25, 0.25)
    assert endpoint_only(4) == (0.0, 0.0, 0.0, 1.0)
    assert uniform(1) == endpoint_only(1) == (1.0,)


# --- for all --------------------------------------------------------------------------------------------


@given(a=slopes, b=intercepts, num_branches=branches)
def test_intercept_never_changes_the_shares(a, b, num_branches):
    assert shares(log_linear(a, b, num_branches)) == approx(shares(log_linear(a, 0.0, num_branches)))


@given(a=slopes, b=intercepts, num_branches=branches, origin=st.integers(-2, 3))
def test_another_index_origin_is_a_shift_of_the_intercept_by_the_slope(a, b, num_branches, origin):
    moved = log_linear(a, b, num_branches, index_origin=origin)
    assert moved == approx(log_linear(a, b + origin * a, num_branches))


@given(a=st.floats(0.01, 5), b=intercepts, num_branches=st.integers(2, 8))
def test_a_positive_slope_rises_towards_the_endpoint_and_a_negative_one_mirrors_it(a, b, num_branches):
    rising = log_linear(a, b, num_branches)
    assert all(earlier < later for earlier, later in pairwise(rising))
    assert shares(log_linear(-a, b, num_branches)) == approx(shares(rising)[::-1])


@given(a=slopes, b=intercepts, num_branches=st.integers(2, 8))
def test_neighbours_differ_by_the_factor_e_to_the_slope(a, b, num_branches):
    found = log_linear(a, b, num_branches)
    assert [math.log(found[k + 1] / found[k]) for k in range(num_branches - 1)] == pytest.approx(
        [a] * (num_branches - 1), abs=1e-9
    )


@given(weights=weights)
def test_shares_sum_to_one_and_keep_the_proportions(weights):
    found = shares(weights)
    assert math.fsum(found) == pytest.approx(1, abs=1e-12)
    assert [share * weights[0] for share in found] == approx([w * found[0] for w in weights])


# --- refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "empty"),
        ([0.5, -0.1], r"finite and >= 0, got \[0\.5, -0\.1\]"),
        ([0.5, math.nan], "finite"),
        ([math.inf, 1.0], "finite"),
        ([0.0, 0.0], "all 2 branch weights are 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, message):
    with pytest.raises(WeightsError, match=message):
        checked(weights)
    with pytest.raises(WeightsError, match=message):
        shares(weights)


@pytest.mark.parametrize(
    ("a", "b", "num_branches", "message"),
    [
        (1.0, 0.0, 0, "at least one branch, got 0"),
        (1000.0, 0.0, 4, "smaller"),  # exp overflows
        (0.0, -1000.0, 4, "all 4 branch weights are 0"),  # and underflows
        (math.nan, 0.0, 4, "finite"),
    ],
)
def test_slopes_and_intercepts_beyond_floats_are_refused(a, b, num_branches, message):
    with pytest.raises(WeightsError, match=message):
        log_linear(a, b, num_branches)


def test_accepted_weights_come_back_unchanged_as_floats():
    assert checked([1, 0, 2.5]) == (1.0, 0.0, 2.5)
    assert all(type(w) is float for w in checked([1, 0]))
