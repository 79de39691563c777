"""What pictures show, by name, colour and number, and that an SVG can stand in a page."""

import io
import re
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bdense_core.files import HashedFile
from bdense_core.methods import Synthetic
from bdense_core.methods.base import Axis
from bdense_core.methods.dash import DASH
from bdense_core.methods.pd import PD
from bdense_core.task import Evaluation
from bdense_core.weights import endpoint_only, log_linear, shares
from search import figures, marks, paper, plots
from search.comparison import Comparison, compare
from search.page import published
from search.page.evidence import Compared, Evidence
from search.page.parts import Table
from search.page.searched import luck
from search.records import Row
from search.spec import Study
from search.study_file import load_study, studies_folder

_METRIC = "<b>$x$ & y</b>"


def study(*overrides: str) -> Study:
    return load_study(studies_folder() / "synthetic.yaml", overrides=overrides)


def row(
    number: int, value: float, *, role: str = "search", state: str = "COMPLETE", seed: int = 0, **more: object
) -> Row:
    known = Row(
        number=number, state=state, role=role, params={}, weights=log_linear(1, 0, 4), seeds=(seed,), value=value,
        intermediate={1: value + 1, 2: value} if state == "COMPLETE" else {1: value}, repeats=(), duration_s=1.0,
        reason=None, is_final=False, owner=None, retry_of=None, protocol=study().protocol_hash(),
    )  # fmt: skip
    return replace(known, **more)


def control(number: int, values: tuple[float, ...], name: str = "uniform", **more: object) -> Row:
    repeats = tuple((seed, 2, value) for seed, value in enumerate(values[1:], start=1))
    return row(number, values[0], role=f"control:{name}", repeats=repeats, **more)


ARMS = (
    {"name": "trial-7", "weights": [1, 1, 1, 3], "trial": 7},
    {"name": "endpoint_only", "weights": [0, 0, 0, 1], "is_control": True},
)


def comparison(values: dict[str, list[float]]) -> Comparison:
    return compared(study(), ARMS, values)


def compared(of: Study, arms: tuple[dict, ...], values: dict[str, list[float]]) -> Comparison:
    section = {
        "kind": "confirm", "of": "t", "of_created": "2026-01-01", "target": "t", "arms": arms, "seeds": [10, 11, 12],
    }  # fmt: skip
    runs = [
        (arm, seed, value) for arm, found in values.items() for seed, value in zip((10, 11, 12), found, strict=True)
    ]
    rows = [
        row(i, value, role=f"arm:{arm}", seed=seed, protocol=of.protocol_hash())
        for i, (arm, seed, value) in enumerate(runs)
    ]
    return compare(of.edited({"comparison": section}), rows)


# -- names and colours


def test_a_weighting_has_one_name_and_one_colour_whether_it_is_a_trial_or_an_arm() -> None:
    searched = [row(12, 1.0), row(3, 2.0), control(0, (1.5, 1.6), "endpoint_only")]
    colors = marks.Colors(searched)
    assert marks.name_of(searched[0]) == marks.name_of(row(0, 1.0, role="arm:trial-12")) == "trial 12"
    assert marks.name_of(searched[2]) == marks.name_of(row(5, 1.0, role="arm:endpoint_only")) == "endpoint only"
    assert len({colors["trial 12"], colors["trial 3"], colors["endpoint only"], colors["trial 99"]}) == 4
    assert colors["trial 99"] == marks.OTHER


def test_a_control_keeps_its_colour_however_the_trials_rank() -> None:
    first, second = marks.Colors([row(1, 1.0)]), marks.Colors([row(2, 1.0), row(1, 2.0)])
    assert first["uniform"] == second["uniform"]
    assert first["trial 1"] != second["trial 1"] == marks.Colors([row(9, 0.0), row(8, 1.0)])["trial 8"]


def test_controls_that_only_some_methods_have_can_be_told_apart() -> None:
    rows = [control(0, (1.0,), "endpoint_only"), control(1, (1.0,), "teacher"), control(2, (1.0,), "scratch")]
    colors = [marks.Colors(found)[name] for found in (rows, rows[::-1]) for name in ("teacher", "scratch")]
    assert colors[:2] == colors[2:], "whatever the order"
    assert len({*colors, marks.Colors(rows)["endpoint only"], marks.OTHER}) == 4


# -- the map


def test_the_map_of_two_axes_is_a_plane_and_of_one_axis_a_line_of_scores() -> None:
    rows = [row(0, 1.5, params={"a": 1.0, "b": -2.0}), row(1, 2.0, role="control:endpoint_only")]
    (point,) = figures.points(study(), rows)
    assert (figures.map_axes(study()), point.x, point.y, point.value) == (("a", "b"), 1.0, -2.0, 1.5)
    for one in (study("space.family=slope"), study("space.b=[-2, -2]")):
        (point,) = figures.points(one, rows)
        assert (figures.map_axes(one), point.x, point.y, point.value) == (("a", one.metric), 1.0, 1.5, 1.5)


@pytest.mark.parametrize(("family", "height"), [("log_linear", -2.0), ("slope", None)])
def test_a_pruned_trial_has_a_place_but_no_value(family: str, height: float | None) -> None:
    stopped = row(4, 9.0, state="PRUNED", params={"a": 1.0, "b": -2.0})
    (point,) = marks.points(study(f"space.family={family}"), [stopped])
    assert (point.pruned, point.value, point.x, point.y) == (True, None, 1.0, height)


@given(a=st.floats(-1, 3), b=st.floats(-5, 0), moved=st.floats(-5, 0))
def test_all_shares_are_equal_along_the_flat_direction(a: float, b: float, moved: float) -> None:
    searched = study()
    flat = marks.flat_axis(searched)
    assert flat == "b"
    here, there = ({"a": a, "b": b}, {"a": a, "b": b} | {flat: moved})
    assert shares(searched.spec.space.weights(here, 4)) == pytest.approx(shares(searched.spec.space.weights(there, 4)))


def test_a_space_without_a_scale_has_no_flat_direction() -> None:
    assert marks.flat_axis(study("space.family=slope")) is None
    assert marks.flat_axis(study("space.b=[-2, -2]")) is None, "b is not searched"


# -- settings that are searched


TUNED = "tune={shift: [0, 1], flavour: [plain, bitter]}"


def test_a_setting_takes_the_place_of_a_second_axis_of_weights() -> None:
    one = study("space.family=slope", TUNED)
    rows = [row(0, 1.5, params={"a": 1.0, "shift": 0.25, "flavour": "bitter"}), control(1, (2.0,), "endpoint_only")]
    (point,) = marks.points(one, rows)
    assert (marks.map_axes(one), point.x, point.y, point.value) == (("a", "shift"), 1.0, 0.25, 1.5)
    assert marks.map_axes(study(TUNED)) == ("a", "b")


def test_a_choice_stands_at_its_place_among_the_choices() -> None:
    one = study("space={family: free}", "method.num_branches=1", "tune={flavour: [bitter, plain]}")
    rows = [row(0, 1.5, params={"flavour": "plain"}), row(1, 1.0, params={"flavour": "gone"})]
    (point,) = marks.points(one, rows)
    assert (marks.map_axes(one), point.x, point.y) == (("flavour", one.metric), 1.0, 1.5)


def test_slices_hold_values_over_each_setting_that_any_trial_has() -> None:
    rows = [
        row(0, 1.5, params={"a": 1.0, "b": -1.0, "shift": 0.25}),
        row(1, 2.5, params={"a": 1.0, "b": -1.0, "shift": 0.75}, state="PRUNED"),
        control(2, (2.0,), "endpoint_only"),
    ]
    found = marks.slices(study(TUNED), rows)
    assert {name: [(p.x, p.y) for p in drawn] for name, drawn in found.items()} == {
        "shift": [(0.25, 1.5), (0.75, None)]
    }
    assert marks.slices(study(), rows) == {}


ENDED = [
    row(0, 1.5, params={"a": 1.0, "shift": 0.25, "flavour": "bitter"}),
    row(1, 1.7, params={"a": 2.0, "shift": 0.5, "flavour": "plain"}, violated=("balance",)),
    row(2, 9.0, params={"a": 0.0, "shift": 0.75, "flavour": "plain"}, state="PRUNED"),
    row(3, 2.0, role="control:endpoint_only"),
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ("space.family=slope", TUNED),
        ("space.family=slope", "tune={flavour: [plain, bitter]}"),
        ("space={family: free}", "method.num_branches=1", "tune={flavour: [plain, bitter]}"),
        ("space={family: free}", "method.num_branches=1", TUNED),
        ("space.family=slope", "tune={noise: [0.001, 1]}"),
    ],
    ids=["two numbers", "a choice beside", "a choice alone", "no weights", "by ratio"],
)
def test_every_kind_of_axis_is_drawn_with_its_own_marks_wherever_people_look(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_ratio = {"noise": Axis(about="of the score", low=1e-4, high=1.0, log=True)}
    monkeypatch.setattr(Synthetic, "axes", lambda self, known=Synthetic.axes: known(self) | by_ratio)
    of = study(*overrides)
    rows = [replace(item, params=item.params | ({"noise": 0.01} if item.params else {})) for item in ENDED]
    text = plots.svg("one", (6, 4), lambda figure: plots.draw_map(figure.subplots(), of, rows))
    words = set(re.findall(r">([^<>]+)</text>", text))
    assert {"stopped early", "violates a constraint"} <= words
    assert ("bitter" in words) == ("flavour" in marks.map_axes(of))
    assert ("0.01" in words) == ("noise" in marks.map_axes(of)), "plain numbers, a decade apart"
    for name, drawn in marks.slices(of, rows).items():
        plots.svg(name, (6, 4), lambda figure, n=name, d=drawn: plots.draw_slice(figure.subplots(), of, rows, n, d))
    drawn = figures._map(of, rows).to_dict()
    by_name = {trace.get("name"): trace for trace in drawn["data"]}
    assert [len(by_name[name]["x"]) for name in (None, "violates a constraint")] == [1, 1]
    if "flavour" in marks.map_axes(of):
        axis = drawn["layout"]["xaxis" if marks.map_axes(of)[0] == "flavour" else "yaxis"]
        assert (list(axis["tickvals"]), list(axis["ticktext"])) == ([0, 1], ["plain", "bitter"])


def test_what_violates_a_constraint_is_never_the_best_in_a_picture() -> None:
    rows = [row(1, 1.0, params={"a": 2.0}, violated=("balance",)), row(2, 1.5, params={"a": 1.0})]
    assert [curve.name for curve in marks.curves(rows)] == ["trial 2"]
    text = plots.svg("one", (6, 4), lambda figure: plots.draw_map(figure.subplots(), study("space.family=slope"), rows))
    words = set(re.findall(r">([^<>]+)</text>", text))
    assert "trial 2" in words and "trial 1" not in words


# -- noise and scores


def test_the_band_is_the_best_controls_run_and_two_deviations_of_a_difference_on_one_seed() -> None:
    rows = [control(0, (4.0, 4.2, 4.4)), control(1, (9.0, 9.1, 9.2), "paper"), row(2, 1.0)]
    found = marks.band(rows)
    assert found is not None
    half = 2 * stdev((4.0 - 9.0, 4.2 - 9.1, 4.4 - 9.2))  # a difference on one seed has √2 of a run's noise in it
    assert (found.name, found.steps, found.scores, found.value) == ("uniform", (2,), (4.0,), rows[0].value)
    assert found.lows + found.highs == pytest.approx((4.0 - half, 4.0 + half))
    assert found.half == pytest.approx(half)
    on_four = marks.band([*rows[:2], row(2, 1.0, seeds=(0, 1, 2, 3))])
    assert on_four is not None and (on_four.half, on_four.halves) == (pytest.approx(half / 2), found.halves)
    assert marks.band([control(0, (4.0,)), row(2, 1.0)]) is None


def test_a_weighting_that_learns_is_no_part_of_the_noise_and_no_rival() -> None:
    fixed, gate = control(0, (4.0, 4.2)), replace(control(1, (1.0, 3.0), "gate"), rule="gate")
    assert [item.name for item in marks.repeats([fixed, gate])] == ["uniform"]
    found = marks.band([fixed, gate])
    assert found is not None and found.name == "uniform"


def test_what_trains_nothing_has_no_spread_over_training_seeds_no_band_and_no_curve() -> None:
    teacher = control(1, (1.0, 1.0), "teacher", is_trained=False)
    fixed = control(0, (4.0, 4.2))
    found = marks.band([fixed, teacher])
    assert found is not None and found.name == "uniform", "though the teacher is the better one"
    assert [item.name for item in marks.repeats([fixed, teacher])] == ["uniform"]
    (scored,) = marks.repeats([replace(teacher, evaluations=(1.5, 0.5))])
    assert (scored.training, scored.evaluation) == ((1.0,), (1.0, 1.5, 0.5))
    assert [curve.name for curve in marks.curves([fixed, teacher])] == ["uniform"]


@pytest.mark.parametrize(("value", "words"), [(9.0, "worse than uniform by more than two runs"), (3.9, "of studies")])
def test_luck_is_asked_for_where_there_is_a_gain_to_explain(value: float, words: str) -> None:
    found = luck(evidence_of(study(), [control(0, (4.0, 4.2)), row(1, value)]))
    assert words in found.lead
    assert f"a gain of {4.0 - value:+.2g}" in found.text[0]


def test_no_line_joins_scores_of_unlike_numbers_of_samples() -> None:
    ended, stopped = row(0, 1.0, intermediate={1: 3.0, 3: 1.0}), row(1, 2.0, state="PRUNED")
    few, many = (replace(study(), evaluation=evaluation(early_samples=early)) for early in (10, None))
    assert [trace.detached for trace in marks.traces(few, [ended, stopped])] == [True, False]
    assert [trace.detached for trace in marks.traces(many, [ended, stopped])] == [False, False]


def test_an_effect_is_the_mean_of_its_differences_by_seed() -> None:
    found = comparison({"trial-7": [1.0, 2.0, 3.0], "endpoint_only": [1.5, 2.25, 3.0]})
    (effect,) = marks.effects(found)
    assert (effect.candidate, effect.control) == ("trial 7", "endpoint only")
    assert effect.by_seed == (0.5, 0.25, 0.0)
    assert effect.interval.mean == pytest.approx(0.25)
    assert marks.gain_over(found, "endpoint_only", "endpoint_only").mean == 0
    assert marks.gain_over(found, "trial-7", "nobody") is None


# -- drawn


def drawing(metric: str = _METRIC):
    rows = [
        control(0, (4.0, 4.2, 4.4), "endpoint_only"), row(1, 1.5, params={"a": 1.0, "b": -2.0}),
        row(2, 1.7, params={"a": 2.0, "b": -3.0}), row(3, 9.0, state="PRUNED", params={"a": -1.0, "b": -3.0}),
    ]  # fmt: skip

    def draw(figure: plots.Figure) -> None:
        left, right = figure.subplots(1, 2)
        plots.draw_map(left, study(), rows)
        plots.draw_traces(right, study(), rows)
        right.set_ylabel(metric)

    return draw


def test_an_svg_is_one_element_that_loads_nothing_and_escapes_its_text() -> None:
    text = plots.svg("one", (10, 4), drawing())
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert _METRIC in ["".join(element.itertext()).strip() for element in root.iter()], "as it is, and not as TeX"
    loaded = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert loaded and all(value.startswith(("#", "data:image/png;base64,")) for value in loaded)
    assert not re.search(r"<script|@import|url\((?!#)", text)


def test_the_colours_of_ink_and_paper_are_the_pages_own() -> None:
    text = plots.svg("one", (10, 4), drawing())
    assert {"currentColor", "var(--rule)"} <= set(re.findall(r"currentColor|var\(--rule\)", text))
    assert not re.search(r"#000000|#ffffff|#1b1f25", text), "black on a dark page is not seen"


@pytest.mark.parametrize("family", ["log_linear", "slope"])
@pytest.mark.parametrize("others", [[], [row(3, 9.0, state="PRUNED", params={"a": -1.0, "b": -3.0})]])
def test_a_study_of_which_only_a_control_off_the_map_has_ended_is_drawn(family: str, others: list[Row]) -> None:
    searched, rows = study(f"space.family={family}"), [control(0, (4.0,), "endpoint_only"), *others]
    text = plots.svg("one", (6, 4), lambda figure: plots.draw_map(figure.subplots(), searched, rows))
    assert {"stopped early"} <= set(re.findall(r">([^<>]+)</text>", text)) if others else "no trial has a place" in text


def test_two_figures_on_one_page_share_no_identity() -> None:
    first, second = (set(re.findall(r'<clipPath id="([^"]+)"', plots.svg(name, (10, 4), drawing()))) for name in "ab")
    assert first and second and not first & second


def test_a_png_has_the_size_that_was_asked_for() -> None:
    with Image.open(io.BytesIO(plots.png((10, 4), drawing()))) as picture:
        assert (picture.format, picture.size) == ("PNG", (1500, 600))


def test_terms_without_numbers_stand_by_their_names_below_the_weight_curves() -> None:
    of, rows = dash(), [replace(control(0, (4.0,), "authors"), weights=(0.1, 1.0, 1.0))]
    text = plots.svg("one", (6, 4), lambda figure: plots.draw_curves(figure.subplots(), of, rows))
    assert {"an", "un", "im", "term"} <= set(re.findall(r">([^<>]+)</text>", text))
    drawn = figures._curves(of, rows).to_dict()
    assert list(drawn["data"][0]["x"]) == ["an", "un", "im"]
    assert drawn["layout"]["xaxis"]["title"]["text"] == "term"


def test_every_candidate_is_drawn_beside_every_control() -> None:
    found = comparison({"trial-7": [1.0, 2.0, 3.0], "endpoint_only": [1.5, 2.25, 3.0]})
    text = plots.svg("forest", (6, 3), lambda figure: plots.draw_forest(figure, found, marks.Colors([])))
    assert {"against endpoint only", "trial 7"} <= set(re.findall(r">([^<>]+)</text>", text))


# -- the paper's tables


def evidence_of(of: Study, rows: list[Row], confirmation: Compared | None = None) -> Evidence:
    return Evidence(study=of, rows=rows, notes=(), provenance={}, confirmation=confirmation, transfers=())


def evaluation(features: str = "inception", n_samples: int = 50_000, early_samples: int | None = None) -> Evaluation:
    file = HashedFile(path="/nowhere", sha256="0" * 64)
    return Evaluation(
        features_name=features, features=file, reference=file, n_samples=n_samples, seed=0, batch=1,
        early_samples=early_samples,
    )  # fmt: skip


def cifar10(number_of_nfe: int = 2, **measured: object) -> Study:
    file = load_study(
        studies_folder() / f"cifar10-nfe{number_of_nfe}.yaml", tolerate_missing=True, models=Path("/nowhere")
    )
    return replace(file, evaluation=evaluation(**measured))


def tables(of: Study, confirmation: Compared | None = None) -> list[Table]:
    values = {"endpoint_only": (endpoint_only(4), (4.5, 4.7)), "paper": (log_linear(1.386, -4.274, 4), (4.4, 4.6))}
    rows = [
        replace(control(i, scores, name), weights=weights, protocol=of.protocol_hash())
        for i, (name, (weights, scores)) in enumerate(values.items())
    ]
    rows.append(row(2, 4.3, protocol=of.protocol_hash()))
    return list(published.section(evidence_of(of, rows, confirmation)).tables)


def test_our_values_stand_beside_the_papers_where_they_were_measured_alike() -> None:
    two, three, four = tables(cifar10())
    assert two.rows[0][:3] == ("2", "4.53", "4.40")
    assert [cell.split(" ")[0] for cell in two.rows[0][3:6]] == ["4.6", "4.5", "4.3,"]
    assert {row[3:] for row in (*two.rows[1:], *three.rows)} == {("", "", "", "not measured")}
    by_pair = {row[0]: row for row in four.rows}
    assert by_pair["(1.386, -4.274)"][4].startswith("4.5 ") and by_pair["plain SFD"][4].startswith("4.6 ")
    assert {row[2] for row in four.rows} == {""}, "nothing was measured on ImageNet-64"


def test_weights_of_the_paper_with_other_settings_are_no_weighting_of_the_paper() -> None:
    of = cifar10()
    pair = row(5, 4.0, role="control:other", weights=log_linear(1.386, -4.274, 4), protocol=of.protocol_hash())
    for settings, text in (({"lr": of.spec.method.lr}, "4 (1 seed)"), ({"lr": 1e-3}, "")):
        *_, four = published.section(evidence_of(of, [replace(pair, settings=settings)])).tables
        assert four.rows[0][4] == text


def test_all_our_values_are_the_confirmations_and_the_best_is_none_that_learned() -> None:
    """The search beside it has a better best trial, and a value for the paper's pair, on seeds of its own."""
    of, arms = cifar10(), (*ARMS, {"name": "gate", "weights": [0.25] * 4, "rule": "gate"})
    values = {"trial-7": [4.8, 4.9, 5.0], "endpoint_only": [5.1, 5.2, 5.3], "gate": [4.0, 4.1, 4.2]}
    two, _, four = tables(of, Compared(comparison=compared(of, arms, values), rows=[]))
    plain, pair, best = two.rows[0][3:6]
    assert (plain.split(" ")[0], pair, best.split(" ")[0]) == ("5.2", "", "4.9")
    assert {row[0]: row[4].split(" ")[0] for row in four.rows if row[4]} == {"plain SFD": "5.2"}


def as_method(method: object) -> Study:
    """A study of CIFAR-10 with another method, measured as the papers do."""
    of = cifar10()
    return replace(of, spec=of.spec.model_copy(update={"method": method}))


def dash(**settings: object) -> Study:
    return as_method(DASH(**settings))


def test_progressive_distillation_stands_beside_its_own_table_and_no_other() -> None:
    of = as_method(PD(start_steps=512, nfe=256, budget_kimg=100))
    values = {"endpoint_only": (endpoint_only(2), (20.0, 22.0)), "uniform": ((1.0, 1.0), (12.0, 14.0))}
    rows = [
        replace(control(i, scores, name), weights=weights, protocol=of.protocol_hash())
        for i, (name, (weights, scores)) in enumerate(values.items())
    ]
    (table,) = published.section(evidence_of(of, rows)).tables
    assert [row[:3] for row in table.rows] == [
        ("512", "11.96", "8.92"), ("256", "21.52", "12.04"), ("128", "39.66", "20.81"),
    ]  # fmt: skip
    assert [cell.split(" ")[0] for cell in table.rows[1][3:5]] == ["21", "13"]
    assert {row[6] for row in (table.rows[0], table.rows[2])} == {"not measured"}


def test_dash_models_are_known_by_shares_and_settings() -> None:
    of = dash()
    arms = {
        "authors": ((0.1, 1.0, 1.0), {}, 8.0), "conditional_only": ((0.1, 0.0, 1.0), {}, 20.0),
        "scratch": ((0.0, 0.0, 1.0), {"objective": "scratch"}, 25.0),
    }  # fmt: skip
    rows = [
        replace(control(i, (value, value + 1), name), weights=weights, settings=settings, protocol=of.protocol_hash())
        for i, (name, (weights, settings, value)) in enumerate(arms.items())
    ]
    (table,) = published.section(evidence_of(of, rows)).tables
    ours = {row[0]: row[3].split(" ")[0] for row in table.rows}
    assert {name: value for name, value in ours.items() if value} == {
        "DASH": "8.5", "conditional only": "20.5", "scratch": "25.5",
    }  # fmt: skip
    assert next(row for row in table.rows if row[0] == "DASH")[1:3] == ("8.87", "0.91")
    other = [replace(row, settings=row.settings | {"lr": 1e-4}) for row in rows]
    (table,) = published.section(evidence_of(of, other)).tables
    assert {row[3] for row in table.rows} == {""}, "with another learning rate it is another model"
    same = [replace(row, settings=row.settings | {"lr": of.spec.method.lr}) for row in rows]
    assert published.section(evidence_of(of, same)).tables[0].rows[-1][3].startswith("8.5")


def test_a_method_of_no_paper_has_no_table() -> None:
    found = published.section(evidence_of(study(), []))
    assert (found.tables, found.missing) == ((), "No paper reports figures of this method.")


@pytest.mark.parametrize(
    "other",
    [{"n_samples": 10_000}, {"features": "resnet56"}, {"number_of_nfe": 3}],
    ids=lambda other: next(iter(other)),
)
def test_a_value_of_another_measure_fills_no_cell(other: dict[str, object]) -> None:
    two, _, four = tables(cifar10(**other))
    assert two.rows[0][3:] == ("", "", "", "not measured")
    assert {(row[2], row[4]) for row in four.rows} == {("", "")}


def test_the_papers_pairs_are_known_by_their_shares_whatever_their_scale() -> None:
    best, plain = paper.TABLE_4[0], paper.TABLE_4[-1]
    assert best.has_shares(shares(log_linear(1.386, 0.0, 4))) and not best.has_shares(
        shares(log_linear(1.4, -4.274, 4))
    )
    assert plain.has_shares((0.0, 0.0, 0.0, 1.0)) and not best.has_shares(plain.shares)
    assert 0.71 < min(pair.shares[-1] for pair in paper.TABLE_4[:-1]) < best.shares[-1] < 0.76  # spec: .71 to .75
