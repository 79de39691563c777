"""Samplers and pruners as a study file names them, asked as launchers ask: a new one for every trial."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from bdense_core.errors import BadValue
from search.samplers import _selection, importances, make_pruner, make_sampler
from search.spec import Study
from search.study_file import load_study

KINDS = ("tpe", "gp", "cmaes", "qmc", "random", "grid")
LEARNING = ("tpe", "gp", "cmaes")
SPACE = {"a": FloatDistribution(-1, 3), "b": FloatDistribution(-5, 0)}


def study(*overrides: str) -> Study:
    return load_study(Path("synthetic.yaml"), overrides=("sampler.startup_trials=4", *overrides))


def asked(kind: str, *overrides: str) -> Study:
    return study(f"sampler.kind={kind}", *overrides)


def claim(running: optuna.Study, spec: Study) -> Trial:
    running.sampler = make_sampler(spec)
    trial = running.ask()
    for name, (low, high) in spec.spec.space.axes().items():
        trial.suggest_float(name, low, high)
    return trial


def place(trial: Trial | FrozenTrial) -> tuple[float, ...]:
    return tuple(trial.params.values())


def run(running: optuna.Study, spec: Study, num_trials: int) -> list[Trial]:
    trials = []
    for _ in range(num_trials):
        trial = claim(running, spec)
        running.tell(trial, (trial.params["a"] - 1.4) ** 2)
        trials.append(trial)
    return trials


def with_history() -> optuna.Study:
    """Controls without parameters, and ended trials of every kind."""
    running = optuna.create_study()
    running.add_trials(
        [
            create_trial(value=2.0, user_attrs={"role": "control:endpoint_only"}),
            create_trial(
                value=1.0, params={"a": 0.0, "b": -1.4}, distributions=SPACE, user_attrs={"role": "control:uniform"}
            ),
            *(
                create_trial(
                    state=state, value=None if state == TrialState.FAIL else (a - 1) ** 2,
                    params={"a": a, "b": -a - 1}, distributions=SPACE, intermediate_values={1: a + 5},
                )
                for i, a in enumerate(0.13 + 0.21 * i for i in range(12))
                for state in [(TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL)[i % 4]]
            ),
        ]
    )  # fmt: skip
    return running


@pytest.mark.parametrize("kind", KINDS)
def test_proposals_in_flight_differ_and_stay_inside_the_space(kind: str) -> None:
    running, spec = with_history(), asked(kind)
    proposals = [claim(running, spec).params for _ in range(8)]
    assert len({tuple(params.values()) for params in proposals}) == 8
    assert all(-1 <= params["a"] <= 3 and -5 <= params["b"] <= 0 for params in proposals)


@pytest.mark.parametrize("kind", ("tpe", "gp", "cmaes", "random", "qmc"))
def test_a_row_that_waited_without_parameters_shares_no_proposal_with_the_next(kind: str) -> None:
    """As after a launcher that died between asking and proposing: its row is asked again, and no row is new."""
    running, spec = optuna.create_study(), asked(kind)
    running.enqueue_trial({})
    running.enqueue_trial({})
    assert len({place(claim(running, spec)) for _ in range(6)}) == 6


@pytest.mark.parametrize("kind", ("random", "qmc", "grid"))
def test_what_is_proposed_depends_on_the_study_and_not_on_who_asks(kind: str) -> None:
    first, again = ([place(trial) for trial in run(optuna.create_study(), asked(kind), 6)] for _ in range(2))
    assert first == again
    other = run(optuna.create_study(), asked(kind, "sampler.seed=1"), 6)
    assert [place(trial) for trial in other] != first


@pytest.mark.parametrize("kind", LEARNING)
def test_a_sampler_that_learns_comes_closer_to_the_optimum(kind: str) -> None:
    trials = run(optuna.create_study(), asked(kind), 60)
    early, late = (sum(abs(t.params["a"] - 1.4) for t in part) for part in (trials[:15], trials[-15:]))
    assert late < early / 2


def valley() -> optuna.Study:
    """Twenty finished trials of a single axis, lowest at a = 1.4."""
    running = optuna.create_study()
    for a in (-1 + 4 * i / 19 for i in range(20)):
        running.add_trial(create_trial(value=(a - 1.4) ** 2, params={"a": a}, distributions={"a": SPACE["a"]}))
    return running


@pytest.mark.parametrize(("kind", "spread"), [("gp", 0.01), ("tpe", 0.5)])
def test_proposals_in_flight_keep_the_next_ones_away(kind: str, spread: float) -> None:
    """Where running trials are not known, all six are within 0.002 (gp) and 0.25 (tpe) of each other: measured."""
    running, spec = valley(), asked(kind, "space.b=[-1, -1]")
    proposals = [claim(running, spec).params["a"] for _ in range(6)]
    assert max(proposals) - min(proposals) > spread


def test_one_pruned_trial_with_a_huge_score_does_not_flatten_the_gaussian_process() -> None:
    running, spec = valley(), asked("gp", "space.b=[-1, -1]")
    hopeless = create_trial(state=TrialState.PRUNED, value=1e6, params={"a": -0.9}, distributions={"a": SPACE["a"]})
    running.add_trial(hopeless)
    assert all(abs(claim(running, spec).params["a"] - 1.4) < 0.3 for _ in range(3))


def test_of_too_many_trials_a_gaussian_process_gets_the_best_and_some_of_all_others() -> None:
    trials = [create_trial(value=float(value)) for value in range(10_000)]
    for number, trial in enumerate(trials):
        trial.number = number
    kept = [trial.value for trial in _selection(trials[::-1], {t.number: float(t.number) for t in trials})]
    assert kept[:250] == list(range(250))
    assert (len(kept), kept[-1]) == (500, 9999)
    assert max(after - before for before, after in pairwise(kept)) < 50


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_that_is_run_late_takes_no_proposal_and_does_no_harm(kind: str) -> None:
    """As one that was lost and is queued again, here after every third searched trial."""
    calm, disturbed = optuna.create_study(), optuna.create_study()
    spec = asked(kind, "sampler.startup_trials=2", "budget.trials=20")
    searched = []
    for _ in range(7):
        searched += run(disturbed, spec, 3)
        disturbed.enqueue_trial({}, user_attrs={"role": "control:endpoint_only"})
        disturbed.sampler = make_sampler(spec)
        control = disturbed.ask()
        assert control.relative_params == {}
        disturbed.tell(control, 9.0)
    if kind in ("qmc", "grid"):  # the others' seeds follow the trials' numbers
        assert list(map(place, run(calm, spec, 21))) == list(map(place, searched))


def test_pruned_trials_fill_a_generation_of_cma_es() -> None:
    """A generation has six trials in two dimensions."""
    running, spec = optuna.create_study(), asked("cmaes", "sampler.startup_trials=0")
    for number in range(7):
        trial = claim(running, spec)
        trial.report(1.0, 1)
        running.tell(
            trial, *([1.0] if number % 2 else []), state=TrialState.COMPLETE if number % 2 else TrialState.PRUNED
        )
    assert [t.system_attrs["cma:generation"] for t in running.trials] == [0, 0, 0, 0, 0, 0, 1]


def test_a_gaussian_process_does_not_propose_again_what_was_pruned() -> None:
    """The finished trials fall towards a = 1.4 from both sides; there, all were pruned."""
    running, spec = optuna.create_study(), asked("gp", "space.b=[-1, -1]")
    space = {"a": SPACE["a"]}
    for a in (-1.0, -0.5, 0.0, 0.5, 2.3, 2.6, 3.0):
        running.add_trial(create_trial(value=(a - 1.4) ** 2, params={"a": a}, distributions=space))
    for a in (1.2, 1.3, 1.4, 1.5, 1.6):
        pruned = create_trial(state=TrialState.PRUNED, value=50.0, params={"a": a}, distributions=space)
        running.add_trial(pruned)
    assert all(abs(claim(running, spec).params["a"] - 1.4) > 0.25 for _ in range(4))


def test_the_first_points_of_a_low_discrepancy_sequence_fill_every_eighth_of_each_axis() -> None:
    trials = run(optuna.create_study(), asked("qmc"), 8)
    for name, axis in SPACE.items():
        cells = [math.floor(8 * (t.params[name] - axis.low) / (axis.high - axis.low)) for t in trials]
        assert sorted(cells) == list(range(8))


def test_a_grid_runs_each_point_once_though_trials_fail_and_are_lost() -> None:
    running, spec = optuna.create_study(), asked("grid", "sampler.grid_points=3", "budget.trials=9")
    retry = RetryHeartbeatStaleTrialCallback(max_retry=2)
    running.enqueue_trial({}, user_attrs={"role": "control:endpoint_only"})
    running.enqueue_trial({"a": 1.0, "b": -2.5}, user_attrs={"role": "control:on_the_grid"})
    running.sampler = make_sampler(spec)
    running.tell(running.ask(), 3.0)
    running.tell(claim(running, spec), 3.0)
    in_flight = [claim(running, spec) for _ in range(3)]
    for number, trial in enumerate(in_flight):
        running.tell(trial, 1.0) if number else running.tell(trial, state=TrialState.FAIL)
    retry(running, running.trials[in_flight[0].number])
    for _ in range(7):
        running.tell(claim(running, spec), 1.0)
    searched = [t for t in running.trials if "role" not in t.user_attrs and t.state == TrialState.COMPLETE]
    assert Counter(map(place, searched)) == {(a, b): 1 for a in (-1.0, 1.0, 3.0) for b in (-5.0, -2.5, 0.0)}


def test_only_when_nothing_else_is_left_a_grid_tries_a_failed_point_again() -> None:
    running, spec = optuna.create_study(), asked("grid", "sampler.grid_points=2", "budget.trials=4")
    others = run(running, spec, 1)
    failed = claim(running, spec)
    running.tell(failed, state=TrialState.FAIL)
    others += run(running, spec, 2)
    assert len({place(failed), *map(place, others)}) == 4
    assert place(claim(running, spec)) == place(failed)


def test_a_grid_looks_past_the_brackets_of_hyperband() -> None:
    spec = asked("grid", "pruner.kind=hyperband", "method.budget_kimg=9", "sampler.grid_points=4", "budget.trials=16")
    running = optuna.create_study(study_name="t", pruner=make_pruner(spec))
    first = claim(running, spec)
    first.report(1.0, 1)
    assert not first.should_prune()  # from here on there are brackets
    running.tell(first, 1.0)
    assert len({place(trial) for trial in [first, *run(running, spec, 15)]}) == 16


def test_an_axis_of_a_single_point_is_no_part_of_the_search() -> None:
    for kind in ("tpe", "gp", "qmc", "grid"):
        trials = run(optuna.create_study(), asked(kind, "space.b=[-2, -2]", "budget.trials=5"), 5)
        assert [t.params["b"] for t in trials] == [-2.0] * 5
        assert len({t.params["a"] for t in trials}) == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("sampler.kind=cmaes", "space.family=slope"),
            "cmaes needs two axes, and this space searches a; use tpe or gp",
        ),
        (("sampler.kind=cmaes", "space.b=[0, 0]"), "cmaes needs two axes"),
        (("sampler.kind=grid", "sampler.grid_points=3"), "the grid over a and b has 9 points"),
        (("sampler.kind=grid", "space.family=slope"), "the grid over a has 5 points"),
        (("pruner.kind=hyperband", "pruner.min_resource_kimg=3"), "trials end at 3 kimg"),
        (("sampler.kind=annealing",), "sampler.kind"),
    ],
)
def test_a_sampler_or_pruner_that_cannot_work_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        study("budget.trials=12", *overrides)


def prune_all(spec: Study, scores: list[float]) -> list[FrozenTrial]:
    """One trial after another, each falling to its score from above; the last step is not asked about."""
    running = optuna.create_study(study_name="t", pruner=make_pruner(spec))
    for score in scores:
        trial = running.ask()
        for step in spec.steps:
            trial.report(score * (2 - step / spec.steps[-1]), step)
            if step < spec.steps[-1] and trial.should_prune():
                running.tell(trial, state=TrialState.PRUNED)
                break
        else:
            running.tell(trial, score)
    return running.trials


@pytest.mark.parametrize("kind", ("median", "percentile", "successive_halving", "hyperband"))
def test_bad_trials_are_pruned_and_good_ones_survive(kind: str) -> None:
    spec = study(f"pruner.kind={kind}", "method.budget_kimg=12", "pruner.startup_trials=3")
    scores = [5.0, 6.0, 7.0, 20.0, 4.0, 21.0, 22.0, 3.0, 23.0, 24.0, 2.0, 25.0]
    ended = prune_all(spec, scores)
    state = {score: trial.state for score, trial in zip(scores, ended, strict=True)}
    assert {state[score] for score in (5.0, 4.0, 3.0, 2.0)} == {TrialState.COMPLETE}
    assert {state[score] for score in (20.0, 21.0, 22.0, 23.0, 24.0, 25.0)} == {TrialState.PRUNED}


def test_a_percentile_spares_what_the_median_would_stop() -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 3.5]
    for kind, state in (("median", TrialState.PRUNED), ("percentile", TrialState.COMPLETE)):
        spec = study(f"pruner.kind={kind}", "pruner.percentile=90", "pruner.startup_trials=4")
        assert prune_all(spec, scores)[-1].state == state


def test_no_pruner_prunes_nothing() -> None:
    ended = prune_all(study("pruner.kind=none"), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 99.0])
    assert {trial.state for trial in ended} == {TrialState.COMPLETE}


@pytest.mark.parametrize("kind", ("successive_halving", "hyperband"))
def test_before_the_first_rung_no_trial_is_stopped(kind: str) -> None:
    spec = study(f"pruner.kind={kind}", "method.budget_kimg=12", "pruner.min_resource_kimg=4")
    stopped = [t for t in prune_all(spec, [2.0, 1.0, *(50.0 + i for i in range(8))]) if t.state == TrialState.PRUNED]
    assert stopped
    assert min(t.last_step or 0 for t in stopped) == 4


def test_the_axis_that_the_value_depends_on_is_the_important_one() -> None:
    running = optuna.create_study()
    running.add_trial(create_trial(value=0.0))
    run(running, asked("random"), 60)
    found = importances(running, study())
    assert list(found) == ["a", "b"]
    assert found["a"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    control = create_trial(value=-9.0, params={"a": 0, "b": -1}, distributions=SPACE, user_attrs={"role": "control:x"})
    running.add_trials([control] * 9)
    assert importances(running, study()) == found, "controls are nobody's proposals"


def test_importances_are_not_worked_out_of_a_single_axis_or_three_trials() -> None:
    running = optuna.create_study()
    run(running, asked("random"), 3)
    assert importances(running, study()) == {}
    run(running, asked("random"), 1)
    assert importances(running, study("space.b=[-1, -1]")) == {}
    found: dict[str, Any] = importances(running, study())
    assert found.keys() == {"a", "b"}
