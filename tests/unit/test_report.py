"""Tables and what they dare to say."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest

from bdense_core.weights import log_linear
from search import figures, quality
from search.records import Row, count
from search.report import curve_of, importance_line, noise_floor, ranked, spreads, trial_object, verdict
from search.spec import Study
from search.study_file import load_study


def row(number: int, value: float, *, role: str = "search", state: str = "COMPLETE", repeats: tuple = ()) -> Row:
    steps = {1: value + 1, 2: value} if state == "COMPLETE" else {1: value}
    return Row(
        number=number, state=state, role=role, params={}, weights=log_linear(1, 0, 4), seeds=(0,), value=value,
        intermediate=steps, repeats=repeats, duration_s=1.0, reason=None, is_final=False,
        is_enqueued=False, owner=None, retry_of=None, protocol="p",
    )  # fmt: skip


def control(number: int, values: tuple[float, ...], name: str = "uniform") -> Row:
    repeats = tuple((seed, 2, value) for seed, value in enumerate(values[1:], start=1))
    return row(number, values[0], role=f"control:{name}", repeats=repeats)


def test_the_noise_floor_pools_the_spread_within_each_control() -> None:
    rows = [control(0, (4.0, 4.2, 4.4)), control(1, (9.0, 9.0, 9.3), "paper"), row(2, 1.0)]
    floor = noise_floor(rows)
    assert floor is not None
    assert floor.sd == pytest.approx(math.sqrt((stdev((4, 4.2, 4.4)) ** 2 + stdev((9, 9, 9.3)) ** 2) / 2))
    assert floor.largest_range == pytest.approx(0.4)
    assert (floor.step, floor.num_seeds, floor.num_controls) == (2, 3, 2)


def test_without_repeats_there_is_no_noise_floor_and_that_is_said() -> None:
    rows = [control(0, (4.0,)), row(1, 3.0)]
    assert noise_floor(rows) is None
    assert "is not known: raise seeds.control_repeats" in verdict(rows)


def test_pruned_trials_are_compared_where_all_trials_were() -> None:
    rows = [control(0, (4.0, 4.2)), row(1, 3.0), row(2, 8.0, state="PRUNED")]
    at_end, in_common = spreads(rows)
    assert (at_end.step, at_end.num_weightings, at_end.lowest, at_end.highest) == (2, 2, 3, 4)
    assert at_end.ratio == pytest.approx(1 / stdev((4.0, 4.2)))
    assert (in_common.step, in_common.num_weightings, in_common.lowest, in_common.highest) == (1, 3, 4, 8)
    assert in_common.floor is None, "no control was scored on two seeds at 1 kimg"


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (3.9, "not distinguishable, -0.1 lies within"),
        (4.05, "not distinguishable, +0.05"),
        (2.0, "better by 2, more than"),
        (50.0, "worse by 46, more than"),
    ],
)
def test_a_gain_within_the_noise_is_not_called_one(best: float, words: str) -> None:
    rows = [control(0, (4.0, 4.2, 4.1)), row(1, best)]
    assert words in verdict(rows)


def test_rows_are_ranked_by_value_then_number_and_only_if_they_ended() -> None:
    rows = [row(3, 2.0), row(1, 2.0), row(2, 1.0, state="PRUNED"), control(0, (1.5,))]
    assert [r.number for r in ranked(rows)] == [0, 1, 3]
    assert [r.number for r in ranked(rows, searched_only=True)] == [1, 3]


def test_counts_keep_controls_and_searched_trials_apart() -> None:
    rows = [row(0, 1), row(1, 1, state="PRUNED"), control(2, (1.0,)), replace(row(3, 1), state="RUNNING")]
    counts = count([*rows, replace(row(4, 1), state="FAIL"), replace(row(5, 1), state="WAITING")])
    assert (counts.counted, counts.controls_done, counts.running, counts.failed, counts.waiting) == (2, 1, 1, 1, 1)


def study(*overrides: str) -> Study:
    return load_study(Path("synthetic.yaml"), overrides=overrides)


def placed(number: int, value: float, **params: float) -> Row:
    return replace(row(number, value), params=params)


def test_b_is_called_flat_unless_it_is_fixed_or_no_axis() -> None:
    (note,) = quality.notes(study())
    assert "space.b only scales the loss, which Adam cancels" in note
    assert "`space: {family: slope}`" in note
    assert "\n" not in note
    assert quality.notes(study("space.b=[-1, -1]")) == quality.notes(study("space.family=slope")) == []


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (2.95, "trial 9 lies on the upper edge of space.a (2.95, the range ends at 3)"),
        (-0.99, "trial 9 lies on the lower edge of space.a (-0.99, the range ends at -1)"),
        (2.9, None),
        (-0.9, None),
    ],
)
def test_a_best_trial_within_two_percent_of_an_end_is_told(best: float, words: str | None) -> None:
    rows = [placed(i, 5.0 + i, a=1.0, b=-1.0) for i in range(3)] + [placed(9, 1.0, a=best, b=-5.0)]
    found = quality.findings(study(), rows)
    assert [words in line for line in found] == ([True] if words else [])
    assert quality.findings(study(), rows[1:]) == [], "three finished trials"


def test_a_control_or_a_pruned_trial_on_an_edge_is_no_finding() -> None:
    rows = [placed(i, 5.0 + i, a=1.0) for i in range(4)]
    rows.append(replace(placed(7, 1.0, a=3.0), state="PRUNED"))
    rows.append(replace(placed(8, 1.0, a=3.0), role="control:paper"))
    assert quality.findings(study("space.family=slope"), rows) == []


def test_importances_from_few_trials_carry_a_caution() -> None:
    assert importance_line({"a": 0.9, "b": 0.1}, 12) == (
        "importance of the axes, from 12 finished trials: a 90%, b 10%; from fewer than 50, hardly more than noise"
    )
    assert importance_line({"a": 0.9, "b": 0.1}, 50).endswith("a 90%, b 10%")


@pytest.mark.parametrize("family", ["log_linear", "slope"])
def test_a_row_of_either_family_has_the_a_and_b_of_its_weights(family: str) -> None:
    searched = study(f"space={{family: {family}}}")
    params = {"a": 0.7, "b": -2.0}
    params = {name: params[name] for name in searched.spec.space.axes()}
    weights = searched.spec.space.weights(params, 4)
    shown = trial_object(searched, replace(row(0, 1.0), params=params, weights=weights))
    assert (shown["params"], shown["a"]) == (params, 0.7)
    assert log_linear(shown["a"], shown["b"], 4) == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("family", ["log_linear", "slope"])
def test_a_control_keeps_the_scale_it_ran_with(family: str) -> None:
    paper = replace(row(0, 1.0, role="control:paper"), weights=log_linear(1.386, -4.274, 4), params={"a": 1.386})
    assert curve_of(study(f"space.family={family}"), paper) == pytest.approx((1.386, -4.274))
    assert curve_of(study(f"space.family={family}"), replace(paper, weights=(0.0, 0.0, 0.0, 1.0), params={})) is None


def test_the_map_of_two_axes_is_a_plane_and_of_one_axis_a_line_of_scores() -> None:
    rows = [placed(0, 1.5, a=1.0, b=-2.0), row(1, 2.0, role="control:endpoint_only")]
    (point,) = figures.points(study(), rows)
    assert (figures.map_axes(study()), point.x, point.y, point.value) == (("a", "b"), 1.0, -2.0, 1.5)
    for one in (study("space.family=slope"), study("space.b=[-2, -2]")):
        (point,) = figures.points(one, rows)
        assert (figures.map_axes(one), point.x, point.y, point.value) == (("a", one.metric), 1.0, 1.5, 1.5)
