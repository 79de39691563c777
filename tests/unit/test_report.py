"""Tables and what they dare to say."""

import io
import math
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table

from bdense_core.weights import log_linear
from search import figures, quality
from search.errors import NothingFinished, UnlikeProtocols
from search.labels import term_labels
from search.noise import (
    NoiseFloor,
    choosable,
    infeasible,
    luck,
    noise_floor,
    noise_line,
    ranked,
    rival,
    rungs,
    samples_at,
    spreads,
    verdict,
    what_differs,
)
from search.records import Row, count, mixed_versions
from search.report import (
    curve_of,
    curve_table,
    importance_line,
    metrics_table,
    rung_table,
    spread_table,
    trial_object,
    trial_table,
)
from search.spec import Study
from search.statistics import chance_of_best
from search.study_file import load_study, studies_folder


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
    assert (floor.step, floor.df, floor.num_seeds, floor.num_controls) == (2, 4, 3, 2)


def test_what_a_seed_does_to_all_weightings_is_no_paired_noise() -> None:
    """Differences of the two controls: 5, 4.8, 4.9; a difference has twice the variance of a run beside another."""
    rows = [control(0, (4.0, 4.2, 4.4)), control(1, (9.0, 9.0, 9.3), "paper")]
    floor = noise_floor(rows)
    assert floor is not None
    assert floor.paired_sd == pytest.approx(stdev((5.0, 4.8, 4.9)) / math.sqrt(2))
    assert floor.paired_df == 2
    shifted = noise_floor([control(0, (4.0, 14.2, 2.4)), control(1, (9.0, 19.0, 7.3), "paper")])
    assert shifted is not None
    assert shifted.paired_sd == pytest.approx(floor.paired_sd)
    assert shifted.sd > 10 * floor.sd
    alone = noise_floor(rows[:1])
    assert alone is not None
    assert (alone.paired_sd, alone.paired_df) == (None, 0)


def test_the_metric_s_own_noise_is_that_of_one_student_on_several_evaluation_seeds() -> None:
    rows = [
        replace(control(0, (4.0, 7.0)), evaluations=(4.1, 3.8)),
        replace(control(1, (9.0, 2.0), "paper"), evaluations=(9.3,)),
    ]
    floor = noise_floor(rows)
    assert floor is not None
    pooled = math.sqrt((2 * stdev((4.0, 4.1, 3.8)) ** 2 + stdev((9.0, 9.3)) ** 2) / 3)
    assert floor.evaluation_sd == pytest.approx(pooled)
    assert f"over evaluation seeds {pooled:.2g}" in noise_line(floor)
    early = noise_floor([replace(item, repeats=((1, 1, 5.0),)) for item in rows], step=1)
    assert early is not None
    assert early.evaluation_sd is None, "students are scored so at the end alone"


def test_without_repeats_there_is_no_noise_floor_and_that_is_said() -> None:
    rows = [control(0, (4.0,)), row(1, 3.0)]
    assert noise_floor(rows) is None
    assert "is not known: raise seeds.control_repeats" in verdict(study(), rows)
    assert "seeds.control_repeats" in noise_line(None)


def test_pruned_trials_are_compared_where_all_trials_were() -> None:
    rows = [control(0, (4.0, 4.2)), row(1, 3.0), row(2, 8.0, state="PRUNED")]
    at_end, in_common = spreads(rows)
    assert (at_end.step, at_end.num_weightings, at_end.lowest, at_end.highest) == (2, 2, 3, 4)
    assert at_end.ratio == pytest.approx(1 / stdev((4.0, 4.2)))
    assert (in_common.step, in_common.num_weightings, in_common.lowest, in_common.highest) == (1, 3, 4, 8)
    assert in_common.floor is None, "no control was scored on two seeds at 1 kimg"


CONTROLS = [control(0, (4.0, 4.2, 4.1)), control(1, (4.3, 4.6, 4.3), "paper")]


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (3.9, ": not distinguishable. It is better by 0.1, and the best of 1 trials of pure noise would look"),
        (4.05, ": not distinguishable. It is worse by 0.05, and"),
        (2.0, ": better than luck alone would make it. It is better by 2, and"),
        (50.0, ": worse by 46, more than two runs differ by"),
    ],
)
def test_a_gain_within_the_noise_is_not_called_one(best: float, words: str) -> None:
    found = verdict(study(), [*CONTROLS, row(2, best)])
    assert f"best trial 2 against control:uniform{words}" in found
    assert ("bdense-weights confirm --study synthetic --top 3 --seeds 5" in found) == (best < 50)


def chance_of(floor: NoiseFloor, gain: float, num_trials: int, num_seeds: int = 1) -> float:
    noise = floor.beside(CONTROLS[0], num_seeds)
    return chance_of_best(gain, noise.sd, noise.df, num_trials)


def test_the_same_gain_is_less_of_a_finding_the_more_trials_it_was_picked_from() -> None:
    floor = noise_floor(CONTROLS)
    assert floor is not None
    trials = [row(i, 3.4 + 0.001 * i) for i in range(2, 102)]
    chances = [chance_of(floor, 4.0 - 3.402, n) for n in (1, 100)]
    assert chances[0] < 0.05 < chances[1]
    assert "better than luck" in verdict(study(), [*CONTROLS, *trials[:1]])
    found = verdict(study(), [*CONTROLS, *trials[:50], *(replace(item, state="PRUNED") for item in trials[50:])])
    assert ": not distinguishable." in found
    assert f"the best of 100 trials of pure noise would look at least as good in {chances[1]:.0%} of" in found


def test_rules_that_learn_are_no_part_of_the_noise_and_no_control_to_beat() -> None:
    gate = replace(control(7, (1.0, 9.0, 3.0), "gate"), rule="gate", evaluations=(8.0,))
    meta = replace(control(8, (2.0, 2.5, 7.0), "meta"), rule="meta")
    rows = [*CONTROLS, row(2, 3.9)]
    assert noise_floor([*rows, gate, meta]) == noise_floor(rows)
    assert verdict(study(), [*rows, gate, meta]) == verdict(study(), rows)
    found = rival([gate, meta, *rows])
    assert found is not None and found.role == "control:uniform"
    assert ranked([*rows, gate])[0] is gate, "it is ranked all the same"
    assert (rival([gate, rows[2]]), noise_floor([gate, meta])) == (None, None)
    assert verdict(study(), [gate, rows[2]]) == "no trial to compare with a control yet"


def untrained(number: int, values: tuple[float, ...], **more: object) -> Row:
    return replace(control(number, values, "teacher"), is_trained=False, **more)


def test_a_control_that_trains_nothing_is_no_evidence_of_training_noise_and_still_to_be_beaten() -> None:
    """The same on all seeds, it would halve every spread."""
    rows = [*CONTROLS, row(2, 3.9), row(3, 4.4)]
    teacher = untrained(9, (3.0, 3.0, 3.0))
    assert noise_floor([*rows, teacher]) == noise_floor(rows)
    assert (noise_floor([teacher]), spreads([*rows, teacher])) == (None, spreads(rows))
    assert spreads([rows[0], teacher]) == [], "one weighting has no spread"
    assert rungs(study(), [*rows, teacher]) == rungs(study(), rows)
    assert rival([*rows, teacher]) is teacher
    assert rival([*rows, teacher], trained_only=True) is rival(rows)
    assert "best trial 2 against control:teacher: " in verdict(study(), [*rows, teacher])


def test_what_scores_differ_by_between_evaluation_seeds_needs_no_training() -> None:
    floor = noise_floor([*CONTROLS, untrained(9, (3.0, 3.0), evaluations=(3.5, 3.1))])
    assert floor is not None
    assert floor.evaluation_sd == pytest.approx(stdev((3.0, 3.5, 3.1)))
    assert floor.num_controls == 2


def test_beside_a_control_that_trains_nothing_trials_have_all_the_noise_of_their_seeds() -> None:
    """What a seed does to all trials alike does not cancel against what it does nothing to."""
    shaken = [control(0, (4.0, 9.2, 1.1)), control(1, (4.3, 9.6, 1.3), "paper")]
    teacher = untrained(9, (3.5, 3.5, 3.5))
    trained, found = (luck(study(), [*shaken, *more, row(2, 3.3)]) for more in ([], [teacher]))
    assert trained is not None and found is not None
    floor = found.floor
    assert (trained.noise.sd, trained.noise.df) == (pytest.approx(floor.paired_sd), floor.paired_df)
    assert (found.noise.sd, found.noise.df) == (pytest.approx(floor.sd), floor.df)
    assert found.noise.sd > 10 * trained.noise.sd
    assert trained.chance < 0.05 < found.chance


def test_what_the_one_evaluation_seed_does_to_each_weighting_counts_and_no_training_seed_takes_it_away() -> None:
    """Differences of the two students: 0.3 on the trials' own evaluation seed, 0.7 on another."""
    scored = [replace(CONTROLS[0], evaluations=(4.5,)), replace(CONTROLS[1], evaluations=(5.2,))]
    plain, floor = noise_floor(CONTROLS), noise_floor(scored)
    assert plain is not None and floor is not None and plain.paired_sd is not None
    assert (plain.evaluation_paired_sd, plain.evaluation_paired_df) == (None, 0)
    assert (floor.evaluation_paired_sd, floor.evaluation_paired_df) == (pytest.approx(0.4 / 2), 1)
    for num_seeds in (1, 4, 10**6):
        noise = floor.beside(CONTROLS[0], num_seeds)
        assert noise.sd == pytest.approx(math.hypot(plain.paired_sd / math.sqrt(num_seeds), 0.2))
    assert noise.df == 1
    assert chance_of(floor, 0.6, 100) > chance_of(plain, 0.6, 100)
    alone = noise_floor([scored[0], CONTROLS[1]])
    assert alone is not None and alone.evaluation_paired_sd is None, "one student is beside no other"


def broken(number: int, value: float, *names: str) -> Row:
    return replace(row(number, value), violated=names or ("rho",))


def test_a_trial_that_violates_a_constraint_is_never_the_best_whatever_its_value() -> None:
    rows = [*CONTROLS, row(2, 3.9), broken(3, 1.0)]
    assert [item.number for item in ranked(rows, searched_only=True)] == [2]
    assert (ranked(rows)[0].number, [item.number for item in infeasible(rows)]) == (3, [3])
    assert [item.number for item in choosable("t", rows)] == [2]
    found = luck(study(), rows)
    assert found is not None
    assert (found.best.number, found.num_trials) == (2, 2), "it was one of the chances all the same"


def test_a_control_that_violates_a_constraint_is_to_be_beaten_all_the_same() -> None:
    rows = [replace(CONTROLS[0], violated=("rho",)), CONTROLS[1]]
    assert rival([*rows, row(2, 5.0)]) is rows[0]
    assert noise_floor(rows) == noise_floor(CONTROLS)


def test_that_all_trials_violate_constraints_is_said_and_not_that_none_has_ended() -> None:
    rows = [*CONTROLS, broken(2, 3.0, "rho"), broken(3, 2.0, "cos", "rho")]
    words = "all searched trials that ran to their end (2) violate the study's constraints (cos, rho)"
    assert verdict(study(), rows) == words
    with pytest.raises(NothingFinished) as caught:
        choosable("t", rows)
    assert str(caught.value).startswith(f"study 't': {words}; ")
    with pytest.raises(NothingFinished, match=r"no searched trial that ran to its end \(0 running, 0 waiting"):
        choosable("t", CONTROLS)


def test_the_rival_is_the_best_control_over_its_seeds_and_not_by_one_lucky_one() -> None:
    lucky = control(0, (3.0, 6.0, 6.0))
    found = rival([lucky, control(1, (4.0, 4.1, 4.2), "paper")])
    assert found is not None and found.role == "control:paper"


def test_luck_carries_the_numbers_of_the_verdict() -> None:
    rows = [*CONTROLS, row(2, 3.9), row(3, 4.5), row(4, 9.0, state="PRUNED")]
    found, floor = luck(study(), rows), noise_floor(rows)
    assert found is not None and floor is not None
    assert (found.best.number, found.rival.role, found.num_trials, found.num_seeds) == (2, "control:uniform", 3, 1)
    assert found.gain == pytest.approx(0.1)
    assert found.chance == chance_of(floor, found.gain, 3)
    assert (found.is_worse, found.is_distinguishable) == (False, False)
    assert f"in {found.chance:.0%} of studies" in verdict(study(), rows)
    far = luck(study(), [*CONTROLS, row(2, 50.0)])
    assert far is not None and far.is_worse and -far.gain > floor.finding
    near = luck(study(), [*CONTROLS, row(2, 2.0)])
    assert near is not None and near.is_distinguishable
    assert (
        luck(study(), CONTROLS) is luck(study(), rows[2:]) is luck(study(), [control(0, (4.0,)), row(1, 3.0)]) is None
    )


def test_trials_on_several_seeds_have_less_noise() -> None:
    floor = noise_floor(CONTROLS)
    assert floor is not None
    assert chance_of(floor, 0.2, 5, num_seeds=4) == pytest.approx(chance_of(floor, 0.4, 5))


def test_rows_are_ranked_by_value_then_number_and_only_if_they_ended() -> None:
    rows = [row(3, 2.0), row(1, 2.0), row(2, 1.0, state="PRUNED"), control(0, (1.5,))]
    assert [r.number for r in ranked(rows)] == [0, 1, 3]
    assert [r.number for r in ranked(rows, searched_only=True)] == [1, 3]


def test_values_of_two_protocols_are_never_ranked_or_shown_together() -> None:
    other = replace(row(7, 1.0), protocol="other")
    for rows in ([*CONTROLS, other], [*CONTROLS, replace(other, state="PRUNED")]):
        with pytest.raises(UnlikeProtocols, match="trial 7 was scored by protocol other"):
            ranked(rows)
        with pytest.raises(UnlikeProtocols):
            noise_floor(rows)
    assert len(ranked([*CONTROLS, replace(other, state="WAITING", value=None)])) == 2


def digits(*overrides: str) -> Study:
    return load_study(studies_folder() / "digits.yaml", overrides=overrides)


def test_early_scores_of_fewer_samples_say_so() -> None:
    scored = digits("evaluation.early_samples=200")
    assert [samples_at(scored, step) for step in (1, 3, 4)] == [200, 200, 1000]
    assert samples_at(digits(), 1) == 1000
    assert samples_at(study(), 1) is None


def text_of(table: Table) -> str:
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_a_pruned_trial_s_score_of_fewer_samples_stands_in_no_column_of_final_scores() -> None:
    rows = [*CONTROLS, replace(row(2, 3.217, state="PRUNED"), intermediate={2: 3.217})]
    cells = {}
    for early in ("200", "1000"):
        store = SimpleNamespace(name="digits", study=digits(f"evaluation.early_samples={early}"))
        line = next(line for line in text_of(trial_table(store, rows, top=None)).splitlines() if "PRUNED" in line)
        cells[early] = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells["200"][5:] == ["", "", "PRUNED at 2 kimg with 3.217 on 200 samples"]
    assert cells["1000"][5:] == ["(3.217)", "", "PRUNED at 2 kimg"]


@pytest.mark.parametrize(("early", "is_other"), [("200", True), ("1000", False)])
def test_a_pruned_trial_s_score_of_fewer_samples_is_no_value_for_programs(early: str, is_other: bool) -> None:
    scored = digits(f"evaluation.early_samples={early}")
    pruned = replace(row(2, 3.217, state="PRUNED"), intermediate={1: 4.0, 2: 3.217})
    shown = trial_object(scored, pruned)
    assert (shown["value"], shown["by_seed"]) == ((None, {}) if is_other else (3.217, {"0": 3.217}))
    assert (shown["last_step"], shown["intermediate"]) == (2, {"1": 4.0, "2": 3.217})
    ended = replace(pruned, state="COMPLETE", intermediate={1: 4.0, 4: 3.217})
    assert trial_object(scored, ended)["value"] == 3.217


def staged(*overrides: str) -> Study:
    """Progressive distillation: students of 8, 4 and 2 steps after 2, 4 and 6 kimg."""
    return load_study(studies_folder() / "digits-pd.yaml", overrides=overrides)


def test_a_score_of_a_student_with_more_steps_stands_in_no_column_of_final_scores() -> None:
    study = staged()
    pruned = replace(row(2, 3.217, state="PRUNED"), intermediate={4: 3.217}, protocol=study.protocol_hash())
    assert [study.nfe_at(step) for step in study.steps] == [8, 4, 2] and study.early_is_other
    table = text_of(trial_table(SimpleNamespace(name="pd", study=study), [pruned], top=None))
    assert "PRUNED at 4 kimg with 3.217 at NFE 4" in table and "(3.217)" not in table
    assert trial_object(study, pruned)["value"] is None
    both = what_differs(staged("evaluation.early_samples=200"), 2)
    assert both == "on 200 samples at NFE 8"
    assert what_differs(study, 6) == "" and not digits().early_is_other


def test_the_tables_show_every_part_of_the_noise() -> None:
    rows = [replace(item, evaluations=(4.5,)) for item in CONTROLS]
    rows = [
        replace(item, intermediate={4: item.value}, repeats=tuple((s, 4, v) for s, _, v in item.repeats))
        for item in rows
    ]
    floor = noise_floor(rows)
    assert floor is not None
    trials = text_of(trial_table(SimpleNamespace(name="digits", study=digits()), rows))
    for part in (f"{floor.sd:.2g} (df 4)", f"{floor.paired_sd:.2g} (df 2)", f"{floor.evaluation_sd:.2g}"):
        assert part in " ".join(trials.split()), "the caption wraps"
    line = next(line for line in text_of(spread_table(digits(), rows)).splitlines() if line.startswith("│"))
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells[:3] + cells[6:8] == ["4", "1000", "2", f"{floor.sd:.2g}", f"{floor.paired_sd:.2g}"]


def lines_of(table: Table) -> dict[str, list[str]]:
    """The cells of each line, by the first one."""
    rows = [line.split("│")[1:-1] for line in text_of(table).splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells] for cells in rows}


def test_tables_show_settings_figures_and_what_a_trial_violates_below_the_others() -> None:
    of = study("constraints={balance: {max: 0.5}}")
    settings = {"shift": 0.12345678, "flavour": "bitter"}
    rows = [
        replace(CONTROLS[0], metrics={"balance": 0.75}),
        replace(row(2, 3.9), settings=settings, metrics={"balance": 0.25}),
        replace(broken(3, 1.0, "balance"), metrics={"balance": 0.875}),
    ]
    shown = trial_table(SimpleNamespace(name="synthetic", study=of), rows)
    cells = lines_of(shown)
    assert list(cells) == ["2", "0", "3"], "best first, and what may not be chosen last"
    assert "shift=0.1235 flavour=bitter" in cells["2"]
    assert (cells["2"][-1], cells["3"][-1]) == ("COMPLETE", "violates balance")
    assert (shown.rows[2].style, shown.rows[0].style) == ("dim", None)
    narrow = lines_of(trial_table(SimpleNamespace(name="synthetic", study=of), rows, wide=False))
    assert narrow["3"][1] == "violates balance"
    further = metrics_table(of, rows)
    assert further is not None
    assert {number: found[-1] for number, found in lines_of(further).items()} == {
        "2": "0.25",
        "0": "0.75",
        "3": "0.875",
    }
    caption = "balance: the share of all branches but the last (has to be at most 0.5)"
    assert caption in " ".join(text_of(further).split()), "the caption wraps"
    assert metrics_table(of, CONTROLS) is None


def test_names_of_figures_with_brackets_are_shown_whole() -> None:
    odd = "fd[guidance=1]"
    rows = [replace(CONTROLS[0], metrics={odd: 0.5}), replace(broken(3, 1.0, odd), metrics={odd: 0.75})]
    further = metrics_table(study(), rows)
    assert further is not None and odd in text_of(further)
    assert f"violates {odd}" in text_of(trial_table(SimpleNamespace(name="synthetic", study=study()), rows))


def test_weights_of_what_trains_nothing_are_not_shown() -> None:
    cells = lines_of(trial_table(SimpleNamespace(name="synthetic", study=study()), [*CONTROLS, untrained(9, (3.0,))]))
    assert (cells["9"][4], cells["0"][4]) == ("", "0.032 0.087 0.237 0.644")


def test_a_study_whose_trials_have_no_settings_has_no_column_for_them() -> None:
    columns = trial_table(SimpleNamespace(name="synthetic", study=study()), [*CONTROLS, row(2, 3.9)]).columns
    assert "settings" not in [column.header for column in columns]


def test_programs_get_settings_figures_and_violations() -> None:
    tuned = replace(broken(3, 1.0, "balance"), settings={"flavour": "plain"}, metrics={"balance": 0.9})
    shown = trial_object(study(), tuned)
    assert (shown["settings"], shown["metrics"]) == ({"flavour": "plain"}, {"balance": 0.9})
    assert (shown["violated"], shown["is_trained"]) == (["balance"], True)
    assert trial_object(study(), untrained(0, (1.0,)))["is_trained"] is False


def test_a_tuned_trial_s_line_is_that_of_its_weights() -> None:
    of = study("space.family=slope", "tune={flavour: [plain, bitter]}")
    found = curve_of(of, replace(placed(0, 1.0, a=0.7), params={"a": 0.7, "flavour": "bitter"}))
    assert found is not None and found[0] == 0.7


def test_the_weight_curve_calls_terms_by_their_names() -> None:
    lines = lines_of(curve_table(study(), row(0, 1.0)))
    assert list(lines) == ["1", "2", "3", "4"]
    assert "branch" in text_of(curve_table(study(), row(0, 1.0)))
    assert term_labels(("branch.1", "branch.2")) == ("branch", ("1", "2"))
    assert term_labels(("an", "un", "im")) == ("term", ("an", "un", "im"))
    assert term_labels(("a.x", "b.y")) == ("term", ("a.x", "b.y"))


def test_rungs_correlate_early_scores_and_the_surrogate_with_the_final_score_of_survivors() -> None:
    scored = digits("evaluation.early_samples=200")
    finals = (5.0, 4.0, 3.0, 2.0, 1.0)
    early, surrogate = (9.0, 8.0, 7.0, 5.0, 6.0), (1.0, 2.0, 3.0, 4.0, 5.0)
    rows = [
        replace(row(i, final), intermediate={2: e, 4: final}, surrogate={4: s})
        for i, (final, e, s) in enumerate(zip(finals, early, surrogate, strict=True))
    ]
    pruned = replace(row(9, 100.0, state="PRUNED"), intermediate={2: 100.0}, surrogate={2: 7.0})
    middle, end = rungs(scored, [*rows, pruned])
    assert (middle.step, middle.samples, middle.surrogate) == (2, 200, None)
    assert middle.metric is not None
    assert (middle.metric.rho, middle.metric.count) == (
        pytest.approx(1 - 6 * 2 / (5 * 24)),
        5,
    )  # two neighbours exchanged
    assert (end.step, end.samples, end.metric) == (4, 1000, None)
    assert end.surrogate is not None
    assert end.surrogate.rho == pytest.approx(-1)
    text = text_of(rung_table(scored, rows))
    assert "0.90 (" in text
    assert "-1.00 (" in text
    assert "n=5" in text
    assert "survivors" in text


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
    params = {name: params[name] for name in searched.spec.axes}
    weights = searched.spec.space.weights(params, 4)
    shown = trial_object(searched, replace(row(0, 1.0), params=params, weights=weights))
    assert (shown["params"], shown["a"]) == (params, 0.7)
    assert log_linear(shown["a"], shown["b"], 4) == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("family", ["log_linear", "slope"])
def test_a_control_keeps_the_scale_it_ran_with(family: str) -> None:
    paper = replace(row(0, 1.0, role="control:paper"), weights=log_linear(1.386, -4.274, 4), params={"a": 1.386})
    assert curve_of(study(f"space.family={family}"), paper) == pytest.approx((1.386, -4.274))
    assert curve_of(study(f"space.family={family}"), replace(paper, weights=(0.0, 0.0, 0.0, 1.0), params={})) is None
    assert curve_of(study(f"space.family={family}"), replace(paper, schedule=(((1.0,) * 4,),))) is None


def test_the_map_of_two_axes_is_a_plane_and_of_one_axis_a_line_of_scores() -> None:
    rows = [placed(0, 1.5, a=1.0, b=-2.0), row(1, 2.0, role="control:endpoint_only")]
    (point,) = figures.points(study(), rows)
    assert (figures.map_axes(study()), point.x, point.y, point.value) == (("a", "b"), 1.0, -2.0, 1.5)
    for one in (study("space.family=slope"), study("space.b=[-2, -2]")):
        (point,) = figures.points(one, rows)
        assert (figures.map_axes(one), point.x, point.y, point.value) == (("a", one.metric), 1.0, 1.5, 1.5)


def test_what_ran_on_several_versions_is_told_by_name() -> None:
    one = replace(row(1, 1.0), code="0.1.0", packages={"torch": "2.12.0", "numpy": "2.4.6", "optuna": "5.0.0"})
    other = replace(row(2, 1.0), code="0.1.0", packages={"torch": "2.13.0", "numpy": "2.4.6", "optuna": "5.1.0"})
    assert mixed_versions([one, one, row(3, 1.0), replace(row(4, 1.0), code="0.1.0")]) == ""
    told = "trials ran on several versions of torch (2.12.0, 2.13.0), and may differ for that alone"
    assert mixed_versions([one, other]) == told
    assert "of the code (0.1.0, 0.2.0), torch (" in mixed_versions([one, replace(other, code="0.2.0")])
