"""Intervals, corrections and correlations beside scipy's, definitions and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from search.statistics import (
    Deviation,
    chance_of_best,
    chance_of_no_gain,
    holm,
    mean_interval,
    paired,
    pooled_deviation,
    rank_correlation,
    residual_deviation,
    summed,
)

values = st.lists(st.floats(-100, 100), min_size=2, max_size=8).filter(lambda xs: np.std(xs) > 1e-3)


@given(values)
def test_an_interval_is_student_s(numbers: list[float]) -> None:
    found, known = mean_interval(numbers), stats.ttest_1samp(numbers, 0)
    interval = known.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)
    assert (found.mean, found.sd, found.count) == pytest.approx((np.mean(numbers), stats.tstd(numbers), len(numbers)))


def test_one_value_has_a_mean_and_no_interval_and_none_has_nothing() -> None:
    one, none = mean_interval([3.0]), mean_interval([])
    assert (one.mean, one.low, one.high, one.count) == (3.0, -math.inf, math.inf, 1)
    assert (math.isnan(one.sd), math.isnan(none.mean), none.count) == (True, True, 0)
    assert chance_of_no_gain(one) == chance_of_no_gain(none) == 1.0


def test_only_shared_seeds_are_paired_and_what_a_seed_does_to_both_cancels() -> None:
    shift = {1: 10.0, 2: -40.0, 3: 7.0}
    first, second = {1: 1.5, 2: 1.7, 3: 1.1}, {1: 1.0, 2: 1.1, 3: 1.2}
    found = paired(first | {9: 1e6}, second | {8: -1e6})
    assert (found.count, found.mean) == (3, pytest.approx(0.3333333333))
    shifted = paired({s: v + shift[s] for s, v in first.items()}, {s: v + shift[s] for s, v in second.items()})
    assert (shifted.mean, shifted.low, shifted.high) == pytest.approx((found.mean, found.low, found.high))


@given(values, values)
def test_the_chance_of_no_gain_is_a_one_sided_paired_t_test(first: list[float], second: list[float]) -> None:
    pairs = list(zip(first, second, strict=False))
    if np.std([a - b for a, b in pairs]) < 1e-3:
        return
    known = stats.ttest_rel(*zip(*pairs, strict=True), alternative="greater").pvalue
    found = chance_of_no_gain(paired(dict(enumerate(first)), dict(enumerate(second))))
    assert found == pytest.approx(known, rel=1e-6, abs=1e-12)


def test_differences_that_never_vary_are_certain() -> None:
    assert [chance_of_no_gain(mean_interval([x] * 3)) for x in (0.5, 0.0, -0.5)] == [0.0, 1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closure_of_bonferroni(p_values: list[float]) -> None:
    everyone = range(len(p_values))
    groups = [g for n in range(1, len(p_values) + 1) for g in itertools.combinations(everyone, n)]
    tested = {group: min(1.0, len(group) * min(p_values[i] for i in group)) for group in groups}
    expected = [max(p for group, p in tested.items() if i in group) for i in everyone]
    assert holm(p_values) == pytest.approx(expected)


def test_residuals_know_neither_the_rows_means_nor_the_columns() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 50))
    table = noise * 0.3 + 10 * rng.normal(size=(40, 1)) + 5 * rng.normal(size=(1, 50))
    found = residual_deviation(table.tolist())
    assert found is not None
    assert found.df == 39 * 49
    assert found.sd == pytest.approx(0.3, rel=0.05)
    assert residual_deviation([[1.0, 2.0], [5.0, 9.0]]).sd == pytest.approx(1.5)  # |1 - 2 - 5 + 9| / 2, by hand
    assert residual_deviation([[1.0, 2.0]]) is residual_deviation([[1.0], [2.0]]) is residual_deviation([]) is None


def test_groups_of_one_value_tell_nothing_of_a_spread() -> None:
    assert pooled_deviation([[1.0], [7.0]]) is None
    found = pooled_deviation([[1.0], [1.0, 3.0], [5.0, 5.0, 8.0]])
    assert found is not None
    assert (found.sd, found.df) == (pytest.approx(math.sqrt((2 + 6) / 3)), 3)


def test_a_rank_correlation_is_spearman_s_and_needs_four_things_that_differ() -> None:
    xs, ys = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 9.0, 4.0, 4.0, 30.0, 10.0]
    found = rank_correlation(xs, ys)
    assert found is not None
    assert found.rho == pytest.approx(stats.spearmanr(xs, ys).statistic)
    assert -1 <= found.low < found.rho < found.high <= 1
    assert rank_correlation(xs[:3], ys[:3]) is None
    assert rank_correlation(xs, [2.0] * 6) is None


def test_a_perfect_order_of_few_things_is_not_certain() -> None:
    four, twenty = (rank_correlation(range(n), range(n)) for n in (4, 20))
    assert four is not None
    assert twenty is not None
    assert (four.rho, four.high) == (1.0, 1.0)
    assert four.low < 0.5 < twenty.low < 1
    falling = rank_correlation(range(4), range(4, 0, -1))
    assert falling is not None
    assert (falling.rho, falling.low, falling.high) == pytest.approx((-1, -1, -four.low))


def test_intervals_of_a_rank_correlation_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, rho, held = np.random.default_rng(0), 0.7, 0
    truth = 6 / math.pi * math.asin(rho / 2)  # of two normal variables
    for _ in range(500):
        x, z = rng.normal(size=(2, 12))
        found = rank_correlation(x.tolist(), (rho * x + math.sqrt(1 - rho**2) * z).tolist())
        assert found is not None
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 500 <= 0.98


@given(values, values)
def test_summed_noise_has_the_error_and_the_freedom_of_welchs_test(first: list[float], second: list[float]) -> None:
    """The error of a difference of two means is the sum of two noises that were estimated apart."""
    found = summed([Deviation(np.std(xs, ddof=1) / math.sqrt(len(xs)), len(xs) - 1) for xs in (first, second)])
    known = stats.ttest_ind(first, second, equal_var=False)
    interval = known.confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    assert found.sd == pytest.approx(half / stats.t.ppf(0.975, known.df), rel=1e-6)
    assert found.df <= known.df + 1e-6 < found.df + 1 + 1e-5
    assert summed([Deviation(0.3, 4)]) == Deviation(pytest.approx(0.3), 4)
    assert summed([Deviation(0.0, 4), Deviation(0.0, 1)]).sd == 0


@pytest.mark.parametrize(("gain", "df", "num_trials"), [(0.5, 4, 1), (2.0, 4, 12), (2.0, 40, 12), (3.0, 8, 60)])
def test_the_chance_of_the_best_agrees_with_brute_force(gain: float, df: int, num_trials: int) -> None:
    rng, count, sd = np.random.default_rng(0), 100_000, 0.05
    rival, trials = rng.normal(size=count), rng.normal(size=(count, num_trials))
    estimate = np.sqrt(rng.chisquare(df, size=count) / df)
    brute = np.mean((rival - trials.min(axis=1)) / estimate >= gain)
    error = 3 * math.sqrt(brute * (1 - brute) / count) + 2e-3
    assert chance_of_best(gain * sd, sd, df, num_trials) == pytest.approx(brute, abs=error)


def test_the_chance_of_a_single_trial_is_that_of_a_difference_of_two_runs() -> None:
    for gain in (-1.0, 0.0, 0.7, 2.5):
        assert chance_of_best(gain, 1.0, 6, 1) == pytest.approx(stats.t.sf(gain / math.sqrt(2), 6), abs=2e-3)
    assert (chance_of_best(0.1, 0.0, 6, 5), chance_of_best(0.0, 0.0, 6, 5)) == (0.0, 1.0)
