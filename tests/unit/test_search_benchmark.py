"""The benchmark of searches, on landscapes that are made up and known: what it calls truth, noise, work and reached."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.pruners import ThresholdPruner
from optuna.samplers import RandomSampler

from bdense_core.errors import BadValue
from bdense_core.methods.synthetic import Synthetic
from benchmarks import search as benchmark
from benchmarks.search import Array, Contestant, Quadratic, Recorded, Run
from search.study_file import load_study

SLOPES = np.linspace(benchmark.LOW, benchmark.HIGH, 25)
STEPS = (1, 2, 3, 4)
REPEATS = [np.array([[0.0, 0.0, 0.0, -0.01], [0.0, 0.0, 0.0, 0.01]])]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def made_up(*, noise: float, repeats: list[Array] = REPEATS) -> Recorded:
    """0.04 (a - 2)^2 + 1 / kimg on three seeds, whose noise falls with the slope and is common to all steps."""
    truth = 0.04 * (SLOPES - 2)[:, None] ** 2 + 1 / np.array(STEPS)
    of_seeds = noise * np.exp(-SLOPES / 4)[:, None] * np.random.default_rng(0).normal(size=(25, 3))
    of_seeds -= of_seeds.mean(axis=1, keepdims=True)
    values = truth[:, None] + of_seeds[:, :, None] + np.array([0.3, -0.1, -0.2])[None, :, None]
    return Recorded(SLOPES, values, np.full((3, 4), 0.65), repeats, STEPS)


def test_the_truth_is_the_mean_over_seeds_at_the_recorded_slopes_and_close_to_it_between() -> None:
    landscape = made_up(noise=0.02)
    assert landscape.truth(SLOPES)[:, -1] == pytest.approx(0.04 * (SLOPES - 2) ** 2 + 0.25)
    between = (SLOPES[1:] + SLOPES[:-1]) / 2
    assert landscape.truth(between)[:, -1] == pytest.approx(0.04 * (between - 2) ** 2 + 0.25, abs=0.001)


def test_simulated_seeds_have_the_covariance_of_the_recorded_ones_and_no_common_shift() -> None:
    landscape = made_up(noise=0.1, repeats=[np.zeros((2, 4))])
    some = SLOPES[[0, 8, 24]]
    seen = np.array([[landscape.seeded(seed)(a) for a in some.tolist()] for seed in range(3000)])
    noise = (seen - landscape.truth(some))[:, :, -1]
    recorded = landscape.remainders[[0, 8, 24], :, -1]
    assert np.cov(noise.T) == pytest.approx(np.cov(recorded), rel=0.15, abs=2e-4)
    assert landscape.remainders.mean(axis=0) == pytest.approx(0, abs=1e-12)


def test_two_trials_at_one_slope_differ_as_runs_that_differ_by_b_alone() -> None:
    scores = made_up(noise=0.1).seeded(0)
    last = np.array([scores(1.0) for _ in range(2000)])
    assert last[:, :3].std(axis=0) == pytest.approx(0, abs=1e-12)
    assert last[:, 3].std() == pytest.approx(math.sqrt(2) * 0.01, rel=0.1)


def test_a_share_of_the_range_gives_the_regret_of_a_parabola() -> None:
    """Within 3 q of its middle a parabola has the share q of the range [-1, 5]."""
    goals = benchmark.goals(made_up(noise=0.0).truth(benchmark.GRID)[:, -1], {"0.04": 0.04})
    regret, share = goals["a tenth of the range"]
    assert regret == pytest.approx(0.04 * 0.3**2, rel=0.1)
    assert share == pytest.approx(0.1, abs=0.002)
    assert goals["0.04"][1] == pytest.approx(1 / 3, abs=0.01)


def test_random_search_needs_as_many_trials_as_chance_says() -> None:
    landscape, contestant = Quadratic(0.0), benchmark.by_optuna(RandomSampler)
    truth = landscape.truth(benchmark.GRID)[:, -1]
    target = float(np.quantile(truth, 0.25))
    work = [benchmark.work_to_reach(landscape, contestant, seed, [target], 1000)[0] for seed in range(200)]
    assert all(needed % 4 == 0 for needed in work)
    assert np.mean(np.array(work) <= 3 * 4) == pytest.approx(1 - 0.75**3, abs=0.1)


def test_a_stopped_trial_counts_the_kimg_it_ran_and_is_never_recommended() -> None:
    """Everything above 1.1 is stopped at its first score; at one kimg that is what lies 0.1 above the lowest."""
    contestant = Contestant({"a": (-1.0, 5.0)}, lambda seed: (RandomSampler(seed=seed), ThresholdPruner(upper=1.1)))
    landscape = made_up(noise=0.0, repeats=[np.zeros((2, 4))])
    seen = list(benchmark.recommendations(landscape, contestant, 0, 100))
    costs = {after - before for (before, _), (after, _) in itertools.pairwise([(0.0, math.nan), *seen])}
    assert costs == {1, 4}
    assert seen[-1][0] <= 100
    assert all(math.isnan(slope) or 0.04 * (slope - 2) ** 2 <= 0.11 for _, slope in seen)


def test_on_one_seed_a_whole_grid_leaves_nothing_without_noise_and_more_with_more_noise() -> None:
    left = []
    for noise in (0.0, 0.05, 0.2):
        landscape = made_up(noise=noise, repeats=[np.zeros((2, 4))])
        left.append(benchmark.floor(landscape, float(landscape.truth(benchmark.GRID)[:, -1].min()), 100))
    assert left[0] == pytest.approx(0, abs=1e-9)
    assert left[0] < left[1] < left[2]


def test_the_ratio_to_itself_is_one_and_half_the_work_is_half() -> None:
    work = np.random.default_rng(1).integers(4, 100, size=200) * 2.0
    assert benchmark.ratio(work, work, 1000) == [1, 1, 1]
    half, low, high = benchmark.ratio(work / 2, work, 1000) or [0, 0, 0]
    assert (low, half, high) == (0.5, 0.5, 0.5)  # the same seeds are drawn for both
    shuffled = np.random.default_rng(2).permutation(work)
    middle, low, high = benchmark.ratio(shuffled, work, 1000) or [0, 0, 0]
    assert low < middle == 1 < high
    assert benchmark.ratio(np.array([math.inf, math.inf, 1.0]), work[:3], 1000) is None


@pytest.mark.parametrize("name", benchmark.CONTESTANTS)
def test_every_contestant_finds_the_valley_of_a_function_without_noise(name: str) -> None:
    landscape = Quadratic(0.0)
    target = float(np.quantile(landscape.truth(benchmark.GRID)[:, -1], 0.1))
    needed = benchmark.work_to_reach(landscape, benchmark.CONTESTANTS[name](), 0, [target], 400)
    assert needed[0] < 400


def test_a_recorded_table_holds_what_the_runs_gave_and_goes_on_where_it_was(tmp_path: Path) -> None:
    study = load_study(Path("synthetic.yaml"), overrides=("method.seconds=0",))
    path, runs = tmp_path / "table.json", benchmark.planned(num_slopes=5, seeds=(0, 1))
    benchmark.record(study, runs[:3], path)
    begun = json.loads(path.read_text())["runs"]
    benchmark.record(study, runs, path)
    table = json.loads(path.read_text())
    assert table["runs"][:3] == begun
    assert [Run(run["a"], run["b"], run["seed"]) for run in table["runs"]] == runs
    whole = path.read_bytes()
    benchmark.record(study, runs, path)
    assert path.read_bytes() == whole
    method = study.spec.method
    assert isinstance(method, Synthetic)
    away = [abs(run["values"][-1] - method.truth(Run(run["a"], run["b"], 0).weights(4))) for run in table["runs"]]
    assert max(away) < 5 * method.noise
    assert benchmark.recorded(path).steps == study.steps


def test_a_table_of_other_settings_is_refused_and_so_is_half_a_table(tmp_path: Path) -> None:
    study = load_study(Path("synthetic.yaml"), overrides=("method.seconds=0",))
    path, runs = tmp_path / "table.json", benchmark.planned(num_slopes=5, seeds=(0, 1))
    with pytest.raises(BadValue, match="--record"):
        benchmark.recorded(path)
    benchmark.record(study, runs[:4], path)
    with pytest.raises(BadValue, match="--record"):
        benchmark.recorded(path)
    with pytest.raises(BadValue, match="other settings"):
        benchmark.record(study.edited({"method.noise": 0.5}), runs, path)
