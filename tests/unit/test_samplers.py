"""Samplers and pruners as a study file names them, asked as launchers ask: a new one for every trial."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from bdense_core.errors import BadValue
from search import samplers
from search.samplers import Ended, _selection, _values_of_ended, importances, make_pruner, make_sampler, suggest
from search.spec import Study
from search.study_file import load_study, studies_folder

KINDS = ("tpe", "gp", "cmaes", "qmc", "random", "grid")
LEARNING = ("tpe", "gp", "cmaes")
SPACE = {"a": FloatDistribution(-1, 3), "b": FloatDistribution(-5, 0)}


def study(*overrides: str) -> Study:
    return load_study(Path("synthetic.yaml"), overrides=("sampler.startup_trials=4", *overrides))


def asked(kind: str, *overrides: str) -> Study:
    return study(f"sampler.kind={kind}", *overrides)


def scored(spec: Study, early_samples: int) -> Study:
    """The study with scores of 1000 samples in the end, and of so many on the way."""
    digits = load_study(studies_folder() / "digits.yaml", overrides=(f"evaluation.early_samples={early_samples}",))
    return replace(spec, evaluation=digits.evaluation)


def claim(running: optuna.Study, spec: Study) -> Trial:
    running.sampler = make_sampler(spec)
    trial = running.ask()
    suggest(trial, spec)
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


@pytest.mark.parametrize(("early", "is_believed"), [(1000, True), (200, False)])
def test_a_gaussian_process_believes_early_scores_only_if_they_are_of_as_many_samples(
    early: int, is_believed: bool
) -> None:
    """Those that finished are best at a = 1.4; those that were pruned, at early scores better than all, at a = -1."""
    running, spec, space = optuna.create_study(), scored(asked("gp", "space.b=[-1, -1]"), early), {"a": SPACE["a"]}
    for a in np.linspace(0, 3, 12):
        running.add_trial(create_trial(value=1 + (a - 1.4) ** 2, params={"a": a}, distributions=space))
    for a in np.linspace(-0.9, -0.1, 6):
        running.add_trial(create_trial(state=TrialState.PRUNED, value=a, params={"a": a}, distributions=space))
    proposals = [claim(running, spec).params["a"] for _ in range(3)]
    assert [a < 0 for a in proposals] == [is_believed] * 3


def test_early_scores_of_other_samples_are_all_as_bad_as_the_worst_final_one() -> None:
    trials = [create_trial(value=value) for value in (3.0, 7.0)]
    trials += [create_trial(state=TrialState.PRUNED, value=value) for value in (1.0, 5.0, 9.0)]
    for number, trial in enumerate(trials):
        trial.number = number
    assert list(_values_of_ended(trials, early_is_other=True).values()) == [3, 7, 7, 7, 7]
    assert list(_values_of_ended(trials, early_is_other=False).values()) == [3, 7, 1, 5, 7]
    assert list(_values_of_ended(trials[2:], early_is_other=True).values()) == [1, 5, 9], "they stand among themselves"


def test_of_too_many_trials_a_gaussian_process_gets_the_best_and_some_of_all_others() -> None:
    trials = [create_trial(value=float(value)) for value in range(10_000)]
    for number, trial in enumerate(trials):
        trial.number = number
    kept = [trial.value for trial in _selection(trials[::-1], {t.number: float(t.number) for t in trials})]
    assert kept[:250] == list(range(250))
    assert (len(kept), kept[-1]) == (500, 9999)
    assert max(after - before for before, after in pairwise(kept)) < 50


@contextmanager
def limits(most: int, num_best: int, num_newest: int) -> Iterator[None]:
    """TPE's limits, small enough for histories of a few dozen trials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_MOST_KERNELS", most)
        patch.setattr(samplers, "_BEST", num_best)
        patch.setattr(samplers, "_NEWEST", num_newest)
        yield


def thinned_from_scratch(trials: list[FrozenTrial], most: int, num_best: int, num_newest: int) -> list[int]:
    """The numbers of the trials that TPE is to see, in plain steps."""
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(ended) <= most:
        return [t.number for t in trials]
    missing = {t.number: sum(max(0, excess) for excess in t.constraints.values()) for t in ended}
    kept_all = [t for t in ended if not missing[t.number]]
    finished = sorted((t for t in kept_all if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    pruned = sorted((t for t in kept_all if t.state == TrialState.PRUNED), key=lambda t: (-(t.last_step or 0), t.value))
    finished += pruned + sorted((t for t in ended if missing[t.number]), key=lambda t: missing[t.number])
    others = ended[:-num_newest]
    even = [others[i] for i in np.linspace(0, len(others) - 1, most - num_newest - num_best, dtype=int)]
    still_open = [t for t in trials if not t.state.is_finished()]
    kept = [*finished[:num_best], *even, *ended[-num_newest:], *still_open]
    return sorted({t.number for t in kept})


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, FrozenTrial]]:
    """What happens to a study: trials that open or end, in any order, each with the place where it stands."""
    events: list[tuple[int, FrozenTrial]] = []
    running: list[int] = []
    for _ in range(draw(st.integers(15, 90))):
        if not running or draw(st.integers(0, 2)) == 0:
            number = sum(trial.state == TrialState.RUNNING for _, trial in events)
            running.append(number)
            ended = create_trial(state=TrialState.RUNNING)
        else:
            number = running.pop(draw(st.integers(0, len(running) - 1)))
            state = draw(st.sampled_from((TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)))
            value = None if state == TrialState.FAIL else float(draw(st.integers(0, 9)))
            steps = dict.fromkeys(range(draw(st.integers(0, 3))), 1.0)
            misses = [draw(st.integers(-2, 2)) / 2] if state == TrialState.COMPLETE else []
            ended = create_trial(
                state=state, value=value, intermediate_values=steps, system_attrs={"constraints": misses}
            )
        ended.number = number
        events.append((number, ended))
    return events


@given(events=histories(), views=st.lists(st.sampled_from(("all", "even", "odd")), min_size=1, max_size=7))
def test_thinned_trials_are_those_of_a_selection_from_scratch_whatever_the_order_of_ends(
    events: list[tuple[int, FrozenTrial]], views: list[str]
) -> None:
    """Also where it is asked for one bracket of Hyperband, then for another: here by even and odd numbers."""
    trials: list[FrozenTrial] = []
    ended = Ended()
    for time, (number, trial) in enumerate(events):
        trials[number : number + 1] = [trial]
        view = views[time % len(views)]
        shown = [t for t in trials if view == "all" or (t.number % 2 == 0) == (view == "even")]
        with limits(14, 4, 3):
            kept = [t.number for t in ended.thinned(shown)]
        assert kept == thinned_from_scratch(shown, 14, 4, 3)
        assert {t.number for t in shown if t.state == TrialState.RUNNING} <= set(kept)


def test_of_thousands_of_trials_a_thousand_that_ended_are_kept_and_all_open_ones() -> None:
    trials = [create_trial(value=float(value % 777)) for value in range(4000)]
    for number, trial in enumerate(trials):
        trial.number = number
        if number % 400 == 7:
            trial.state, trial.value = TrialState.RUNNING, None
    kept = Ended().thinned(trials)
    assert [t.number for t in kept] == thinned_from_scratch(trials, 1000, 25, 25)
    assert sum(t.state == TrialState.RUNNING for t in kept) == 10
    assert 975 <= sum(t.state == TrialState.COMPLETE for t in kept) <= 1000


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


@pytest.mark.parametrize(("early", "generations"), [(1000, [0, 0, 0, 0, 0, 0, 1]), (200, [0] * 7)])
def test_pruned_trials_fill_a_generation_of_cma_es_only_if_their_scores_are_as_final_ones(
    early: int, generations: list[int]
) -> None:
    """A generation has six trials in two dimensions."""
    running, spec = optuna.create_study(), scored(asked("cmaes", "sampler.startup_trials=0"), early)
    for number in range(7):
        trial = claim(running, spec)
        trial.report(1.0, 1)
        running.tell(
            trial, *([1.0] if number % 2 else []), state=TrialState.COMPLETE if number % 2 else TrialState.PRUNED
        )
    assert [t.system_attrs["cma:generation"] for t in running.trials] == generations


@pytest.mark.parametrize("early", [1000, 200])
def test_tpe_ranks_no_pruned_trial_above_a_finished_one_whatever_its_score(early: int) -> None:
    """Where pruned trials have the best values of all, no more is proposed than beside the hopeless."""
    space = {"a": SPACE["a"]}
    proposals = []
    for value in (-9.0, 99.0):
        running, spec = valley(), scored(asked("tpe", "space.b=[-1, -1]"), early)
        for a in (-0.9, -0.8, -0.7):
            steps = {1: value}
            running.add_trial(
                create_trial(
                    state=TrialState.PRUNED, value=value, params={"a": a}, distributions=space,
                    intermediate_values=steps,
                )
            )  # fmt: skip
        proposals.append([claim(running, spec).params["a"] for _ in range(4)])
    assert proposals[0] == proposals[1]


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


def mixed(kind: str, folder: Path, *overrides: str) -> Study:
    """A study of two weights and of settings of every kind."""
    path = folder / "mixed.yaml"
    tune = {"lr": [1e-4, 1e-2], "student_blocks": [1, 3], "curriculum": ["uniform", "tirt"]}
    content = {"name": "t", "method": {"kind": "dash"}, "teacher": "digits", "space": {"family": "free"}, "tune": tune}
    path.write_text(yaml.safe_dump(content))
    return load_study(path, overrides=("sampler.startup_trials=4", f"sampler.kind={kind}", *overrides))


def evaluate(params: dict[str, Any]) -> float:
    """Lowest at lr = 1e-3; a curriculum costs 2."""
    return float((math.log10(params["lr"]) + 3) ** 2 + 2 * (params["curriculum"] == "tirt"))


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_every_kind_are_proposed_beside_the_weights(kind: str, tmp_path: Path) -> None:
    running, spec = optuna.create_study(), mixed(kind, tmp_path, "sampler.grid_points=2", "budget.trials=30")
    for _ in range(12):
        trial = claim(running, spec)
        params = trial.params
        assert list(params) == ["u1", "u2", "lr", "curriculum", "student_blocks"]
        assert 1e-4 <= params["lr"] <= 1e-2 and params["student_blocks"] in (1, 2, 3)
        assert isinstance(params["student_blocks"], int) and params["curriculum"] in ("uniform", "tirt")
        running.tell(trial, evaluate(params))
    proposals = [tuple(trial.params.values()) for trial in running.trials]
    assert len(set(proposals)) == 12
    assert {trial.params["curriculum"] for trial in running.trials} == {"uniform", "tirt"}


@pytest.mark.parametrize(("kind", "num_trials"), [("tpe", 60), ("gp", 30)])
def test_a_sampler_that_learns_finds_the_choice_and_the_order_of_magnitude(
    kind: str, num_trials: int, tmp_path: Path
) -> None:
    """At random half of the trials have the better choice, and half are within half an order of magnitude."""
    running, spec = optuna.create_study(), mixed(kind, tmp_path, "space.u=[0, 0]")
    for _ in range(num_trials):
        trial = claim(running, spec)
        running.tell(trial, evaluate(trial.params))
    late = [trial.params for trial in running.trials[-num_trials // 3 :]]
    assert sum(params["curriculum"] == "uniform" for params in late) >= 0.65 * len(late)
    assert np.median([abs(math.log10(params["lr"]) + 3) for params in late]) < 0.3


def test_a_grid_over_settings_of_every_kind_is_run_once_each(tmp_path: Path) -> None:
    running = optuna.create_study()
    spec = mixed("grid", tmp_path, "space.u=[-1, 1]", "sampler.grid_points=2", "budget.trials=32")
    for _ in range(32):
        running.tell(claim(running, spec), 1.0)
    along = ([-1.0, 1.0], [-1.0, 1.0], [1e-4, 1e-2], ["uniform", "tirt"], [1, 3])
    assert {place(trial) for trial in running.trials} == set(itertools.product(*along))
    with pytest.raises(BadValue, match="has 32 points"):
        mixed("grid", tmp_path, "sampler.grid_points=2", "budget.trials=33")


def test_cma_es_needs_two_axes_that_are_numbers(tmp_path: Path) -> None:
    assert mixed("cmaes", tmp_path, "space.u=[0, 0]").spec.sampler.kind == "cmaes"
    with pytest.raises(BadValue, match="cmaes needs two axes, and this space searches a that are numbers"):
        study("sampler.kind=cmaes", "space.family=slope", "tune={flavour: [plain, bitter]}")


def test_cma_es_leaves_choices_to_chance(tmp_path: Path) -> None:
    """Optuna's own would take each choice for an axis of its own."""
    running, spec = optuna.create_study(), mixed("cmaes", tmp_path, "sampler.startup_trials=0")
    trial = claim(running, spec)
    assert trial.relative_params.keys() == {"u1", "u2", "lr", "student_blocks"}
    assert trial.params.keys() == spec.spec.searched.keys()


def constrained(kind: str, limit: float) -> Study:
    """Asks that the last share be at most 1 - `limit`."""
    return asked(kind, "space.b=[-1, -1]", f"constraints.balance.min={limit}", "pruner.kind=none")


def run_constrained(running: optuna.Study, spec: Study, num_trials: int) -> list[Trial]:
    """The value falls with the slope, and with it the figure: at a = 0 it is 3/4, at a = 1 about 1/3."""
    trials = []
    for number in range(num_trials):
        trial = claim(running, spec)
        weights = spec.spec.space.weights(trial.params, 4)
        excesses = spec.excesses({"balance": 1 - weights[-1] / sum(weights)})
        if number % 7 == 6:  # a pruned one says nothing of its figures
            trial.report(9.0, 1)
            running.tell(trial, state=TrialState.PRUNED)
            continue
        running._storage.set_trial_system_attr(trial._trial_id, "constraints", excesses)
        running.tell(trial, -trial.params["a"])
        trials.append(trial)
    return trials


@pytest.mark.parametrize("kind", ("tpe", "gp"))
def test_a_sampler_that_learns_keeps_to_the_constraints_and_goes_to_their_edge(kind: str) -> None:
    """Without them it goes to a = 3."""
    running, spec = optuna.create_study(), constrained(kind, 0.5)
    late = [trial.params["a"] for trial in run_constrained(running, spec, 42)[-12:]]
    edge = 0.61  # where exp(-a) + exp(-2a) + exp(-3a) = 1: by hand, x + x^2 + x^3 = 1 at x = 0.5437
    assert 0.2 < np.median(late) < edge + 0.15
    free = [trial.params["a"] for trial in run_constrained(optuna.create_study(), constrained(kind, 0.0), 42)[-12:]]
    assert np.median(free) > 2


def test_trials_that_miss_a_constraint_are_the_last_of_the_best_however_good_their_value() -> None:
    best = [create_trial(value=5.0), create_trial(value=-9.0, system_attrs={"constraints": [0.1, -3.0]})]
    best += [create_trial(state=TrialState.PRUNED, value=7.0, intermediate_values={1: 7.0})]
    best += [create_trial(value=-99.0, system_attrs={"constraints": [0.3, -3.0]}), create_trial(value=6.0)]
    for number, trial in enumerate(best):
        trial.number = number
    assert [trial.number for trial in samplers._best_of(best)] == [0, 4, 2, 1, 3]


def prune_all(spec: Study, scores: list[float], *, metric: float | None = None) -> list[FrozenTrial]:
    """One trial after another, each falling to its score from above; the last step is not asked about.

    With a metric, that is all that is reported, and the scores are surrogates.
    """
    running = optuna.create_study(study_name="t", pruner=make_pruner(spec))
    for score in scores:
        trial = running.ask()
        surrogate = {}
        for step in spec.steps:
            surrogate[str(step)] = score * (2 - step / spec.steps[-1])
            if metric is not None:
                trial.set_user_attr("surrogate", surrogate)
            trial.report(surrogate[str(step)] if metric is None else metric / score, step)
            if step < spec.steps[-1] and trial.should_prune():
                running.tell(trial, state=TrialState.PRUNED)
                break
        else:
            running.tell(trial, score)
    return running.trials


@pytest.mark.parametrize(("on", "metric"), [("metric", None), ("surrogate", 5000.0)])
@pytest.mark.parametrize("kind", ("median", "percentile", "successive_halving", "hyperband"))
def test_bad_trials_are_pruned_and_good_ones_survive(kind: str, on: str, metric: float | None) -> None:
    """On the surrogate, the metric says the opposite of it, on a scale of its own."""
    overrides = (f"pruner.kind={kind}", f"pruner.by={on}", "method.budget_kimg=12", "pruner.startup_trials=3")
    spec = study(*overrides)
    scores = [5.0, 6.0, 7.0, 20.0, 4.0, 21.0, 22.0, 3.0, 23.0, 24.0, 2.0, 25.0]
    ended = prune_all(spec, scores, metric=metric)
    state = {score: trial.state for score, trial in zip(scores, ended, strict=True)}
    assert {state[score] for score in (5.0, 4.0, 3.0, 2.0)} == {TrialState.COMPLETE}
    assert {state[score] for score in (20.0, 21.0, 22.0, 23.0, 24.0, 25.0)} == {TrialState.PRUNED}


def test_a_percentile_spares_what_the_median_would_stop() -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 3.5]
    for kind, state in (("median", TrialState.PRUNED), ("percentile", TrialState.COMPLETE)):
        spec = study(f"pruner.kind={kind}", "pruner.percentile=90", "pruner.startup_trials=4")
        assert prune_all(spec, scores)[-1].state == state


@pytest.mark.parametrize("kind", ("median", "successive_halving"))
def test_a_trial_without_a_surrogate_at_its_last_step_is_not_pruned(kind: str) -> None:
    spec = study(f"pruner.kind={kind}", "pruner.by=surrogate", "pruner.startup_trials=1")
    running = optuna.create_study(pruner=make_pruner(spec))
    asked = {}
    for number, surrogate in enumerate(({"1": 1.0, "2": 0.5}, {"1": 9.0, "2": 9.0}, {"1": 9.0}, {})):
        trial = running.ask()
        trial.set_user_attr("surrogate", surrogate)
        trial.report(1.0, 1)
        trial.report(1.0, 2)
        asked[number] = trial.should_prune()
        running.tell(trial, 1.0)
    assert asked == {0: False, 1: True, 2: False, 3: False}


@pytest.mark.parametrize(
    ("on", "kind"), [("metric", "median"), ("surrogate", "median"), ("metric", "successive_halving")]
)
@pytest.mark.parametrize("misses", [True, False])
def test_trials_that_miss_a_constraint_stop_none_that_may_keep_it(on: str, kind: str, misses: bool) -> None:
    """Nine of them have far better scores than the next trial, which goes on only where they miss it."""
    overrides = (f"pruner.kind={kind}", f"pruner.by={on}", "pruner.startup_trials=3", "method.budget_kimg=4")
    spec = study(*overrides, "constraints.balance.min=0.3")
    running, was_stopped = optuna.create_study(study_name="t", pruner=make_pruner(spec)), []
    for number in range(12):
        trial, is_good = running.ask(), number < 9
        for step in spec.steps[:-1]:
            trial.set_user_attr("surrogate", {str(step): 1.0 if is_good else 9.0})
            trial.report(1.0 if is_good else 9.0, step)
            if stopped := trial.should_prune():
                break
        was_stopped += [] if is_good else [stopped]
        running._storage.set_trial_system_attr(trial._trial_id, "constraints", [0.1 if is_good and misses else -0.1])
        running.tell(trial, 1.0, state=TrialState.COMPLETE)
    assert was_stopped[0] is not misses
    assert misses or all(was_stopped)


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


def test_choices_and_whole_numbers_have_an_importance_too(tmp_path: Path) -> None:
    running, spec = optuna.create_study(), mixed("random", tmp_path, "tune.curriculum=")
    for _ in range(120):
        trial = claim(running, spec)
        running.tell(trial, 9.0 * (trial.params["curriculum"] != "tirt") + trial.number % 7)
    found = importances(running, spec)
    assert next(iter(found)) == "curriculum" and found.keys() == spec.spec.searched.keys()


def test_importances_are_not_worked_out_of_a_single_axis_or_three_trials() -> None:
    running = optuna.create_study()
    run(running, asked("random"), 3)
    assert importances(running, study()) == {}
    run(running, asked("random"), 1)
    assert importances(running, study("space.b=[-1, -1]")) == {}
    found: dict[str, Any] = importances(running, study())
    assert found.keys() == {"a", "b"}
