"""Tables and what they dare to say."""

import math
from dataclasses import replace
from statistics import stdev

import pytest

from bdense_core.weights import log_linear
from search.records import Row, count
from search.report import noise_floor, ranked, spreads, verdict


def row(number: int, value: float, *, role: str = "search", state: str = "COMPLETE", repeats: tuple = ()) -> Row:
    steps = {1: value + 1, 2: value} if state == "COMPLETE" else {1: value}
    return Row(
        number=number, state=state, role=role, params={}, weights=log_linear(1, 0, 4), seeds=(0,), value=value,
        intermediate=steps, repeats=repeats, duration_s=1.0, reason=None, is_final=False,
        owner=None, retry_of=None, protocol="p",
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
