"""The method without networks: what is said about its scores holds for them."""

from statistics import fmean, stdev

import pytest

from bdense_core.errors import BadValue
from bdense_core.methods.synthetic import Synthetic
from bdense_core.task import Score, Task
from bdense_core.weights import endpoint_only, log_linear, uniform

SEEDS = range(400)
EVEN = uniform(4)


def scores(method: Synthetic, weights=EVEN, seed=0, **settings) -> list[Score]:
    task = Task(weights=weights, seed=seed, every_kimg=1, teacher=None, evaluation=None, cache_root=None, **settings)
    return [event for event in method.run(task) if isinstance(event, Score)]


def values(method: Synthetic, weights) -> list[float]:
    return [scores(method, weights, seed)[-1].value for seed in SEEDS]


def near(expected: float, sd: float) -> object:
    """Four standard errors of a mean over the seeds."""
    return pytest.approx(expected, abs=4 * sd / len(SEEDS) ** 0.5)


def test_without_a_curvature_all_weightings_are_the_same_noise():
    method = Synthetic(curvature=0.0, noise=0.05)
    for weights in (uniform(4), endpoint_only(4), log_linear(1.4, 0.0, 4)):
        found = values(method, weights)
        assert fmean(found) == near(4.0, 0.05)
        assert stdev(found) == near(0.05, 0.05)


def test_with_a_curvature_there_is_a_real_gap_of_the_documented_size():
    method = Synthetic(noise=0.05)
    assert fmean(values(method, endpoint_only(4))) == near(4.25, 0.05)
    assert fmean(values(method, uniform(4))) == near(5.0, 0.05)


def test_noise_of_two_weightings_and_of_two_rules_on_one_seed_is_not_the_same():
    method = Synthetic(curvature=0.0)
    found = {
        scores(method, endpoint_only(4))[-1].value,
        scores(method)[-1].value,
        scores(method, rule="gate")[-1].value,
        scores(method, rule="meta")[-1].value,
        scores(method, schedule=((uniform(4),),))[-1].value,
    }
    assert len(found) == 5


def test_evaluation_noise_spreads_the_scores_of_one_run_and_its_own_is_that_of_seed_0():
    method = Synthetic(curvature=0.0, noise=0.05, evaluation_noise=0.3)
    *early, last = scores(method, evaluation_seeds=tuple(SEEDS))
    exact = scores(Synthetic(curvature=0.0, noise=0.05))[-1].value
    assert last.value == last.evaluations[0]
    assert fmean(last.evaluations) == near(exact, 0.3)
    assert stdev(last.evaluations) == near(0.3, 0.3)
    assert all(score.evaluations == () for score in early)


def test_the_surrogate_is_the_score_without_noise():
    noisy, exact = scores(Synthetic(noise=0.2, evaluation_noise=0.2)), scores(Synthetic(noise=0.0))
    assert [score.surrogate for score in noisy] == [score.value for score in exact]
    assert [score.value for score in noisy] != [score.value for score in exact]


@pytest.mark.parametrize("name", ["noise", "evaluation_noise", "curvature", "seconds"])
def test_negative_sizes_are_refused(name):
    with pytest.raises(BadValue, match=name):
        Synthetic(**{name: -0.1})
