"""What a comparison dares to say."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from scipy import stats

from bdense_core.errors import BadValue
from search.comparison import Comparison, are_equal, compare, further_table, noise_on_seeds, table, to_dict
from search.errors import UnlikeProtocols
from search.records import ARM, Row
from search.scores import Scores
from search.sections import Arm
from search.spec import Study
from search.study_file import load_study
from tests.rows import row

SEEDS = (1000, 1001, 1002, 1003, 1004)
WEIGHTS = {"endpoint_only": (0.0, 0.0, 1.0), "uniform": (1.0, 1.0, 1.0), "trial-1": (0.0, 1.0, 3.0),
           "trial-2": (0.0, 1.0, 4.0), "trial-3": (0.0, 1.0, 5.0)}  # fmt: skip
QUIET = (0.01, -0.01, 0.02, 0.0, -0.02)
"""What makes the runs of an arm differ, small beside the differences between arms below."""


def study(seeds: tuple[int, ...] = SEEDS, **changed: dict[str, Any]) -> Study:
    arms = [
        {"name": name, "weights": weights, "is_control": not name.startswith("trial"), **changed.get(name, {})}
        for name, weights in WEIGHTS.items()
    ]
    section = {"kind": "confirm", "of": "digits", "of_created": "", "target": "digits", "arms": arms, "seeds": seeds}
    return load_study(Path("synthetic.yaml")).edited({"method.num_branches": 3, "comparison": section})


def runs(of: Study, **means: float) -> list[Row]:
    """Every arm on every seed: its mean, what the seed does to all, and a noise that is unlike another arm's."""
    means = dict.fromkeys(WEIGHTS, 4.0) | means
    seeds = of.spec.comparison.seeds if of.spec.comparison else ()
    rows = []
    for index, (name, mean) in enumerate(means.items()):
        for i, seed in enumerate(seeds):
            value = mean + 10 * i + QUIET[(i + index) % 5]
            rows.append(
                replace(row(len(rows), role=ARM + name, value=value, seeds=(seed,)), protocol=of.protocol_hash())
            )
    return rows


def better(by: float, **others: float) -> Comparison:
    of = study()
    return compare(of, runs(of, **{"trial-2": 4.0 - by}, **others))


def arm(comparison: Comparison, name: str) -> Any:
    return next(item for item in comparison.arms if item.name == name)


def test_a_candidate_that_beats_every_control_on_the_same_seeds_wins() -> None:
    found = better(1.0)
    assert (found.winner, found.arms[0].name, found.is_complete) == ("trial-2", "trial-2", True)
    assert found.verdict.startswith("trial-2 is better than every control over 5 fresh seeds: than ")
    assert "the nearest, by 1 (95% interval 0.9" in found.verdict
    assert [item.name for item in found.arms if item.is_confirmed] == ["trial-2"]


def test_gains_are_scipy_s_paired_t_tests() -> None:
    found = better(0.02)
    by_seed = {item.name: [item.by_seed[seed] for seed in SEEDS] for item in found.arms}
    for gain in arm(found, "trial-2").gains:
        known = stats.ttest_rel(by_seed[gain.control], by_seed["trial-2"], alternative="greater")
        both = stats.ttest_rel(by_seed[gain.control], by_seed["trial-2"]).confidence_interval(0.95)
        assert gain.p_value == pytest.approx(known.pvalue)
        assert (gain.interval.low, gain.interval.high) == pytest.approx((both.low, both.high))


def test_without_a_difference_nobody_wins_and_the_controls_are_named() -> None:
    found = better(0.0)
    assert found.winner is None
    assert found.verdict.startswith("not distinguishable from endpoint_only, uniform over 5 fresh seeds: ")


def test_beating_one_control_of_two_is_not_enough_and_the_other_one_is_named() -> None:
    found = better(0.0, uniform=6.0)
    assert found.winner is None
    assert found.verdict.startswith("not distinguishable from endpoint_only over 5 fresh seeds: ")


def test_candidates_that_are_all_worse_are_called_so() -> None:
    of = study()
    found = compare(of, runs(of, **{"trial-1": 5.0, "trial-2": 5.1, "trial-3": 5.2}))
    assert found.verdict.startswith("no candidate is better than ")
    assert "over 5 fresh seeds: trial-1, the best, is worse by 1 (95% interval 0.9" in found.verdict


def test_a_noisy_control_takes_nothing_from_the_other_pairs() -> None:
    of = study()
    rows = runs(of, **{"trial-2": 3.9})
    noisy = [
        replace(item, value=(item.value or 0) + shake)
        for item, shake in zip((r for r in rows if r.arm == "uniform"), (40, -20, 30, -10, 60), strict=True)
    ]
    quiet = compare(of, rows)
    found = compare(of, [*(item for item in rows if item.arm != "uniform"), *noisy])
    gains = [next(g for g in arm(item, "trial-2").gains if g.control == "endpoint_only") for item in (quiet, found)]
    assert gains[0] == gains[1]
    assert (quiet.winner, found.winner) == ("trial-2", None)
    assert found.verdict.startswith("not distinguishable from uniform over 5 fresh seeds: ")


def alone(of: Study) -> Study:
    """The comparison with trial-2 for its only candidate."""
    section = of.spec.comparison
    assert section is not None
    kept = [item.model_dump() for item in section.arms if item.name not in ("trial-1", "trial-3")]
    return of.edited({"comparison": section.model_dump() | {"arms": kept}})


def test_three_candidates_pay_for_three_chances() -> None:
    """0.05 / 3 < p < 0.025: clear for a candidate alone, not for the best of three."""
    of = study()
    rows = runs(of, **{"trial-2": 3.9704}, uniform=4.5)
    single, among = compare(alone(of), rows), compare(of, rows)
    raw = max(gain.p_value for gain in arm(single, "trial-2").gains)
    assert 0.05 / 3 < raw < 0.025
    assert arm(single, "trial-2").p_value == pytest.approx(raw)
    assert arm(among, "trial-2").p_value == pytest.approx(3 * raw)
    assert (single.winner, among.winner) == ("trial-2", None)


def test_whoever_is_confirmed_shows_intervals_above_zero() -> None:
    """A single candidate with 0.025 < p < 0.05 is clear one-sided, and has a two-sided interval that holds 0."""
    of, found = alone(study()), []
    for by in (0.02, 0.025, 0.0296, 0.04):
        result = arm(compare(of, runs(of, **{"trial-2": 4 - by})), "trial-2")
        found.append((result.p_value <= 0.05, result.is_confirmed))
        assert result.is_confirmed == all(gain.interval.low > 0 for gain in result.gains)
    assert found == [(False, False), (True, False), (True, True), (True, True)]


def test_missing_runs_are_counted_and_named_and_their_arm_is_not_ranked() -> None:
    of = study()
    rows = [
        item
        for item in runs(of, **{"trial-2": 3.0, "trial-1": 2.0})
        if item.role != "arm:trial-1" or item.seeds[0] < 1003
    ]
    found = compare(of, rows)
    assert not found.is_complete
    assert (found.winner, found.arms[-1].name, found.arms[-1].missing) == ("trial-2", "trial-1", (1003, 1004))
    assert found.verdict.endswith("; missing: 2 of 25 runs (trial-1 on 1003 1004)")


def test_nothing_is_said_while_a_control_lacks_a_run_or_nothing_has_run() -> None:
    of = study()
    rows = [item for item in runs(of, **{"trial-2": 3.0}) if (item.arm, item.seeds) != ("uniform", (1002,))]
    found = compare(of, rows)
    assert (found.winner, found.verdict) == (
        None,
        "nothing can be said yet; missing: 1 of 25 runs (uniform on 1002)",
    )
    assert "beside a control of other weights" in compare(of.edited({"comparison.arms": []}), []).verdict
    nothing = compare(of, [])
    assert nothing.verdict.startswith("nothing can be said yet; missing: 25 of 25 runs (")
    assert json.dumps(to_dict(nothing), allow_nan=False)


def test_a_failure_makes_no_other_candidate_clearer() -> None:
    of = study()
    rows = runs(of, **{"trial-2": 3.9704})
    failed = [replace(item, state="FAIL", value=None) if item.arm == "trial-1" else item for item in rows]
    assert arm(compare(of, failed), "trial-2").p_value == arm(compare(of, rows), "trial-2").p_value


def test_the_last_attempt_of_a_run_counts() -> None:
    of = study()
    rows = runs(of, **{"trial-2": 3.0})
    first = next(item for item in rows if item.arm == "trial-2")
    again = replace(first, number=99, retry_of=first.number)
    failed = [replace(item, state="FAIL", value=None) if item is first else item for item in rows]
    assert compare(of, failed).winner is None
    assert compare(of, [*failed, again]).winner == "trial-2"


@pytest.mark.parametrize(
    "weights", [{"weights": (0.0, 0.0, 7.0)}, {"weights": (1.0, 1.0, 1.0), "schedule": (((0, 0, 1),), ((0, 0, 2),))}]
)
def test_the_weights_of_a_control_by_another_name_are_never_better(weights: dict[str, Any]) -> None:
    of = study(**{"trial-2": weights})
    found = compare(of, runs(of, **{"trial-2": 1.0}))
    result = arm(found, "trial-2")
    assert (found.winner, result.same_as, result.p_value) == (None, "endpoint_only", None)
    assert "is endpoint_only" in shown(found)


def test_a_rule_that_learns_is_not_the_weighting_that_it_begins_with() -> None:
    of = study(**{"trial-2": {"weights": (1.0, 1.0, 1.0), "rule": "gate"}})
    found = compare(of, runs(of, **{"trial-2": 3.0}))
    assert found.arms[0].name == "trial-2" and found.arms[0].is_confirmed
    assert "trial-2, which learns its weights, is better than every control" in found.verdict
    assert found.winner is None, "it has no weights to export"


def told(rows: list[Row], **figures: dict[str, list[float]]) -> list[Row]:
    """The runs with further figures: name -> arm -> a value for each seed."""
    return [
        replace(
            item,
            metrics={
                name: by_arm[item.arm][SEEDS.index(item.seeds[0])]
                for name, by_arm in figures.items()
                if item.arm in by_arm
            },
        )
        for item in rows
    ]


BALANCE = {
    "endpoint_only": [0.5, 0.75, 0.6, 0.7, 0.9], "uniform": [0.6, 0.8, 0.8, 0.7, 1.0],
    "trial-2": [0.1, 0.4, 0.3, 0.35, 0.5],
}  # fmt: skip


def test_further_figures_are_means_and_paired_differences_of_trials_and_controls() -> None:
    """Controls among themselves, too: the plain method against uniform weights may be all there is to see."""
    of = study()
    found = compare(of, told(runs(of), balance=BALANCE))
    figures = found.metrics["balance"]
    assert set(figures) == set(BALANCE), "who has no such figure has no place"
    for name, others in {"trial-2": ["endpoint_only", "uniform"], "uniform": ["endpoint_only"]}.items():
        for control in others:
            known = stats.ttest_rel(BALANCE[name], BALANCE[control]).confidence_interval(0.95)
            interval = figures[name].differences[control]
            assert (interval.low, interval.high) == pytest.approx((known.low, known.high))
    assert figures["endpoint_only"].differences.keys() == {"uniform"}
    assert figures["uniform"].mean.mean == pytest.approx(sum(BALANCE["uniform"]) / 5)


def test_the_verdict_does_not_ask_for_further_figures() -> None:
    of = study()
    for means in ({}, {"trial-2": 3.0}):
        plain, more = (compare(of, rows) for rows in (runs(of, **means), told(runs(of, **means), balance=BALANCE)))
        assert (plain.winner, plain.verdict, plain.arms) == (more.winner, more.verdict, more.arms)


def test_figures_stand_in_the_methods_order_and_what_it_does_not_know_last() -> None:
    of = study()
    found = compare(of, told(runs(of), zebra=BALANCE, ape=BALANCE, balance=BALANCE))
    assert list(found.metrics) == ["balance", "ape", "zebra"]


def test_the_dictionary_and_a_table_of_their_own_show_further_figures() -> None:
    of = study()
    found = compare(of, told(runs(of), balance=BALANCE))
    values = to_dict(found)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    entry = values["metrics"]["balance"]["trial-2"]
    assert entry["by_seed"] == {str(seed): value for seed, value in zip(SEEDS, BALANCE["trial-2"], strict=True)}
    assert [item["control"] for item in entry["differences"]] == ["endpoint_only", "uniform"]
    assert values["baseline"] == "endpoint_only"
    further = further_table(found)
    assert further is not None
    text = printed(further)
    interval = found.metrics["balance"]["uniform"].differences["endpoint_only"]
    assert f"{interval.mean:+.2g} ({interval.low:+.2g} to {interval.high:+.2g})" in text
    assert "weighting - endpoint_only on the same seeds" in " ".join(text.split())
    assert further_table(compare(of, runs(of))) is None
    odd = further_table(compare(of, told(runs(of), **{"fd[guidance=1]": BALANCE})))
    assert odd is not None and "fd[guidance=1]" in printed(odd)


def test_single_differences_are_from_the_primary_term_alone_else_from_the_first_control() -> None:
    assert compare(study(), []).baseline == "endpoint_only"
    for changed in ({"weights": (0.0, 0.1, 1.0)}, {"settings": {"flavour": "bitter"}}, {"is_trained": False}):
        first = compare(study(uniform={"weights": (0.0, 0.0, 3.0)}, endpoint_only=changed), [])
        assert first.baseline == "uniform"
    as_it_stands = study(endpoint_only={"settings": {"flavour": "plain"}})
    assert compare(as_it_stands, []).baseline == "endpoint_only"
    none_is = study(endpoint_only={"weights": (0.0, 0.1, 1.0)})
    assert compare(none_is, []).baseline == "endpoint_only", "the first"


def bounded(**changed: dict[str, Any]) -> Study:
    return study(**changed).edited({"constraints": {"balance": {"max": 0.5}}})


def test_who_violates_a_constraint_in_the_mean_over_the_seeds_cannot_win() -> None:
    """trial-2's mean is 0.33, with one seed on the bound; trial-1's is above it, though not on each seed."""
    of = bounded()
    figures = BALANCE | {"trial-1": [0.2, 0.4, 0.9, 0.9, 0.9], "trial-3": [0.0] * 5}
    found = compare(of, told(runs(of, **{"trial-1": 2.0, "trial-2": 3.0}), balance=figures))
    best = arm(found, "trial-1")
    assert (found.arms[0].name, best.is_confirmed, best.violated, best.may_win) == (
        "trial-1",
        True,
        ("balance",),
        False,
    )
    assert (found.winner, arm(found, "trial-2").violated) == ("trial-2", ())
    assert found.verdict.startswith("trial-2 is better than every control over 5 fresh seeds: ")
    assert found.verdict.endswith("; trial-1 violates balance and cannot win")
    assert "violates balance" in shown(found)
    assert {item["name"]: item["violated"] for item in to_dict(found)["arms"]}["trial-1"] == ["balance"]
    assert (
        found.arms[0].p_value
        == arm(compare(study(), runs(study(), **{"trial-1": 2.0, "trial-2": 3.0})), "trial-1").p_value
    )


def test_who_does_not_tell_a_constrained_figure_cannot_win_and_controls_are_beaten_all_the_same() -> None:
    of = bounded()
    found = compare(of, told(runs(of, **{"trial-2": 3.0}), balance={"uniform": [0.9] * 5}))
    assert (found.winner, arm(found, "trial-2").violated) == (None, ("balance",))
    assert "not distinguishable" not in found.verdict and "is better than" not in found.verdict
    fine = {name: [0.1] * 5 for name in ("trial-1", "trial-2", "trial-3")}
    found = compare(of, told(runs(of, **{"trial-2": 3.0}), balance=fine | {"uniform": [0.9] * 5}))
    assert (found.winner, arm(found, "uniform").violated) == ("trial-2", ("balance",))
    assert "uniform violates" not in found.verdict, "a control is no candidate"


def test_other_settings_make_another_arm() -> None:
    """Trial 2 has the weights of endpoint only."""
    for settings, is_same in (({}, True), ({"flavour": "bitter"}, False)):
        of = study(**{"trial-2": {"weights": (0.0, 0.0, 2.0), "settings": settings}})
        found = arm(compare(of, runs(of, **{"trial-2": 1.0})), "trial-2")
        assert (found.same_as, found.is_confirmed) == (("endpoint_only", False) if is_same else (None, True))
    plain, still = (Arm(name="x", weights=(0.0, 1.0), is_trained=is_trained) for is_trained in (True, False))
    assert not are_equal(plain, still)


def test_settings_stand_in_a_column_where_an_arm_has_any() -> None:
    of = study(**{"trial-2": {"settings": {"shift": 0.25, "flavour": "bitter"}}})
    text = shown(compare(of, runs(of)))
    assert "shift=0.25 flavour=bitter" in text
    assert "settings" not in shown(compare(study(), runs(study())))


def test_one_seed_decides_nothing() -> None:
    of = study(seeds=(1000,))
    found = compare(of, runs(of, **{"trial-2": 1.0}))
    assert found.winner is None
    assert "one seed has no interval" in found.verdict
    assert to_dict(found)["arms"][0]["mean"]["low"] is None


def test_a_run_of_another_protocol_is_refused() -> None:
    of = study()
    rows = runs(of)
    with pytest.raises(UnlikeProtocols, match="trial 3 was scored by protocol other"):
        compare(of, [replace(item, protocol="other") if item.number == 3 else item for item in rows])
    waiting = replace(row(99, "WAITING", role="arm:trial-1"), protocol=None)
    assert compare(of, [*rows, waiting]).is_complete


def test_a_search_has_no_arms_to_compare() -> None:
    with pytest.raises(BadValue, match="bdense-weights confirm --study synthetic"):
        compare(load_study(Path("synthetic.yaml")), [])


def test_scores_of_a_search_are_its_controls_by_seed() -> None:
    of = load_study(Path("synthetic.yaml"))
    control = replace(
        row(0, role="control:uniform", value=4.0), intermediate={1: 5.0, 3: 4.0},
        repeats=((1, 3, 4.5), (1, 1, 9.0)), protocol=of.protocol_hash(),
    )  # fmt: skip
    searched = replace(row(1, value=3.0), protocol=of.protocol_hash())
    assert Scores.of(of, [control, searched]).values == {"uniform": {0: 4.0, 1: 4.5}}


def test_a_better_weighting_is_told_to_have_had_more_chances_if_more_was_asked_for() -> None:
    of, found = study(), better(1.0)
    assert of.spec.comparison is not None
    widened = of.edited({"comparison": {**of.spec.comparison.model_dump(mode="json"), "widened": 2}})
    more = compare(widened, runs(widened, **{"trial-2": 3.0}))
    told = "; weightings or seeds were added 2 time(s) after it had begun, so luck is likelier than 5 %"
    assert more.verdict == found.verdict + told
    assert compare(widened, runs(widened)).verdict == compare(of, runs(of)).verdict, "where none is, nothing is claimed"


def test_the_tables_tell_the_noise_of_the_controls_on_their_seeds() -> None:
    found = better(0.1)
    values = np.array([list(arm(found, name).by_seed.values()) for name in ("endpoint_only", "uniform")])
    alone = math.sqrt(values.var(axis=1, ddof=1).mean())
    beside = (values[0] - values[1]).std(ddof=1) / math.sqrt(2)
    parts = f"sd of one run {alone:.2g}", f"beside others on its seed {beside:.2g} (df 4)"
    line = "noise on these seeds, of 2 control(s): " + ", ".join(parts)
    assert noise_on_seeds(found) == line
    assert line in " ".join(shown(found).split())


def shown(comparison: Comparison) -> str:
    return printed(table(comparison))


def printed(of: Table) -> str:
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(of)
    return console.export_text()


def test_the_table_and_the_dictionary_say_what_was_found() -> None:
    of = study(**{"trial-2": {"source_value": 3.5, "trial": 2}})
    found = compare(of, runs(of, **{"trial-2": 3.0}))
    text, values = shown(found), to_dict(found)
    first = next(line for line in text.splitlines() if "trial-2" in line)
    assert "3.5" in first
    assert text.count("beats every control") == 1
    assert text.count("gain over") == 2
    assert "in digits" in text
    best = values["arms"][0]
    assert (values["winner"], best["name"], best["trial"], best["is_confirmed"]) == ("trial-2", "trial-2", 2, True)
    assert best["shares"] == pytest.approx([0, 0.2, 0.8])
    assert [gain["control"] for gain in best["gains"]] == ["endpoint_only", "uniform"]
    assert json.loads(json.dumps(values, allow_nan=False)) == values
