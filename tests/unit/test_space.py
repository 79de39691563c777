"""The map from proposals to weights, and back for controls."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from scipy.special import softmax

from bdense_core.errors import BadValue, UnknownKey
from bdense_core.weights import endpoint_only, log_linear, shares, uniform, weights_at
from search.space import (
    Annealed,
    Family,
    Free,
    LogLinear,
    LogQuadratic,
    PerInterval,
    Slope,
    free_axes,
    key_of,
    log_linear_of,
)
from search.spec import Study
from search.study_file import load_study

slopes = st.floats(-3, 5)
NORMALISED = (Slope, LogQuadratic, Free, Annealed, PerInterval)
Normalised = type[Slope | LogQuadratic | Free | Annealed | PerInterval]


@given(a=st.floats(-1, 3), b=st.floats(-5, 0), origin=st.integers(0, 1), k=st.integers(2, 8))
def test_a_proposal_is_found_again_from_its_weights(a: float, b: float, origin: int, k: int) -> None:
    space = LogLinear(index_origin=origin, a=(-1.01, 3.01), b=(-5, 0.01))
    found = space.params_of(space.weights({"a": a, "b": b}, k), 2)
    if found is not None:  # rounding may push b just below its end
        assert math.isclose(found["a"], a, abs_tol=1e-9)
        assert math.isclose(found["b"], b, abs_tol=1e-8)
    else:
        assert b < -5 + 1e-8


def test_controls_inside_the_space_have_parameters_and_those_outside_have_none() -> None:
    space = LogLinear()
    assert space.params_of(uniform(4), 2) == pytest.approx({"a": 0.0, "b": -math.log(4)})
    assert space.params_of(log_linear(1.386, -4.274, 4), 2) == pytest.approx({"a": 1.386, "b": -4.274})
    assert space.params_of(endpoint_only(4), 2) is None
    assert space.params_of((0.1, 0.5, 0.1, 0.3), 2) is None
    assert LogLinear(a=(0.5, 3)).params_of(uniform(4), 2) is None


def test_the_index_origin_moves_a_into_b() -> None:
    from_one = LogLinear(index_origin=1).weights({"a": 0.7, "b": -2.0}, 4)
    assert from_one == pytest.approx(LogLinear().weights({"a": 0.7, "b": -1.3}, 4))


def test_b_below_minus_five_is_refused() -> None:
    with pytest.raises(BadValue, match="must not go below -5"):
        LogLinear(b=(-5.0001, 0))


def test_slope_ln4_gives_powers_of_four_that_sum_to_one() -> None:
    """By hand: 1 + 4 + 16 + 64 = 85."""
    assert Slope().weights({"a": math.log(4)}, 4) == pytest.approx([1 / 85, 4 / 85, 16 / 85, 64 / 85])
    assert Slope(loss_scale=85).weights({"a": math.log(4)}, 4) == pytest.approx([1, 4, 16, 64])


@given(a=st.floats(-40, 300), scale=st.floats(1e-3, 1e3), k=st.integers(2, 8))
def test_slope_has_the_shares_of_the_log_linear_family_and_its_own_sum(a: float, scale: float, k: int) -> None:
    weights = Slope(loss_scale=scale).weights({"a": a}, k)
    assert math.fsum(weights) == pytest.approx(scale)
    if abs(a) < 50:
        assert shares(weights) == pytest.approx(shares(log_linear(a, 0.0, k)))


@given(a=st.floats(-3, 3), scale=st.floats(1e-3, 1e3), k=st.integers(2, 8))
def test_the_curve_of_a_slope_gives_its_weights_and_finds_its_parameter(a: float, scale: float, k: int) -> None:
    space = Slope(a=(-3.01, 3.01), loss_scale=scale)
    slope, intercept = space.curve({"a": a}, k)
    assert slope == a
    assert log_linear(slope, intercept, k) == pytest.approx(space.weights({"a": a}, k))
    assert space.params_of(space.weights({"a": a}, k), 2) == pytest.approx({"a": a}, abs=1e-9)


def test_a_slope_knows_controls_by_their_shares_and_not_by_their_scale() -> None:
    space = Slope()
    assert space.params_of(log_linear(1.386, -4.274, 4), 2) == pytest.approx({"a": 1.386})
    assert space.params_of(uniform(4), 2) == pytest.approx({"a": 0.0})
    assert space.params_of(endpoint_only(4), 2) is None
    assert Slope(a=(0.5, 3)).params_of(uniform(4), 2) is None
    assert Slope(a=(0.5, 3)).params_of(uniform(4), 2, within_ranges=False) == pytest.approx({"a": 0.0})


def test_weights_off_a_log_linear_curve_have_no_curve() -> None:
    assert log_linear_of((0.1, 0.5, 0.1, 0.3)) is None
    assert log_linear_of((1.0,)) is None
    assert log_linear_of(()) is None


def line(a: float, num_branches: int) -> Sequence[float]:
    """The shares of a slope, by scipy."""
    shown: list[float] = softmax(a * np.arange(num_branches)).tolist()
    return shown


@given(data=st.data(), scale=st.floats(1e-3, 1e3), k=st.integers(3, 8), num_intervals=st.integers(1, 4))
@pytest.mark.parametrize("family", NORMALISED)
def test_the_weights_of_a_proposal_are_positive_and_have_the_given_sum(
    family: Normalised, data: st.DataObject, scale: float, k: int, num_intervals: int
) -> None:
    """At each time and in each interval too, and `weights` lie between the least and the greatest of the schedule."""
    space = family(loss_scale=scale)
    params = {name: data.draw(st.floats(*bounds)) for name, bounds in space.axes(k, num_intervals).items()}
    weights, schedule = space.weights(params, k), space.schedule(params, k, num_intervals)
    rows = [row for rows in schedule for row in rows]
    for row in (weights, *rows):
        assert min(row) > 0
        assert math.fsum(row) == pytest.approx(scale)
    for weight, column in zip(weights, zip(*rows, strict=True), strict=bool(rows)):
        assert min(column) * (1 - 1e-9) <= weight <= max(column) * (1 + 1e-9)


@pytest.mark.parametrize("family", NORMALISED)
def test_every_family_knows_uniform_and_the_papers_weights_and_none_knows_endpoint_only(family: Normalised) -> None:
    space = family()
    for a, control in ((0.0, uniform(4)), (1.386, log_linear(1.386, -4.274, 4))):
        params = space.params_of(control, 2)
        assert params is not None
        assert params.keys() == space.axes(4, 2).keys()
        assert space.weights(params, 4) == pytest.approx(line(a, 4))
        assert {row for rows in space.schedule(params, 4, 2) for row in rows} <= {
            Slope().weights({"a": slope}, 4) for slope in params.values()
        }
        assert space.curve(params, 4) in (None, pytest.approx(Slope().curve({"a": a}, 4)))
    assert space.params_of(endpoint_only(4), 2, within_ranges=False) is None
    assert space.params_of(log_linear(9.0, 0.0, 4), 2) is None


@given(a=slopes, c=st.floats(-2, 2), k=st.integers(3, 8))
def test_a_polynomial_through_the_logarithms_of_log_quadratic_weights_has_its_slope_and_curvature(
    a: float, c: float, k: int
) -> None:
    """And a straight line through them has its slope too: the curvature is orthogonal to it."""
    logs = np.log(LogQuadratic().weights({"a": a, "c": c}, k))
    centred = np.arange(k) - (k - 1) / 2
    assert np.polyfit(centred, logs, 2)[:2] == pytest.approx([c, a], abs=1e-9)
    assert np.polyfit(centred, logs, 1)[0] == pytest.approx(a, abs=1e-9)


@given(a=st.floats(-0.49, 2.99), c=st.floats(-0.99, 0.99), factor=st.floats(0.01, 100), k=st.integers(3, 8))
def test_log_quadratic_parameters_are_found_again_whatever_the_scale(a: float, c: float, factor: float, k: int) -> None:
    space = LogQuadratic()
    scaled = tuple(factor * weight for weight in space.weights({"a": a, "c": c}, k))
    assert space.params_of(scaled, 1) == pytest.approx({"a": a, "c": c}, abs=1e-7)


def test_two_branches_have_no_curvature(tmp_path: Path) -> None:
    method = {"kind": "synthetic", "num_branches": 2}
    with pytest.raises(BadValue, match=r"three branches or more, and method.num_branches is 2; use .*slope"):
        resolved(tmp_path, {"method": method}, {"space": {"family": "log_quadratic"}})
    assert LogQuadratic().params_of((0.1, 0.2, 0.6, 0.1), 1) is None, "a cubic"


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8))
def test_free_shares_are_any_shares(weights: list[float]) -> None:
    space = Free(u=(-20, 20))
    params = space.params_of(tuple(weights), 1)
    assert params is not None
    assert list(params) == [f"u{k}" for k in range(1, len(weights))]
    assert space.weights(params, len(weights)) == pytest.approx(shares(weights))


def test_free_parameters_are_logarithms_of_ratios_to_the_endpoint() -> None:
    """By hand: 1 : 2 : 4 : 8 has 15 parts."""
    params = {"u1": -math.log(8), "u2": -math.log(4), "u3": -math.log(2)}
    assert Free().weights(params, 4) == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    assert Free().curve(params, 4) == pytest.approx((math.log(2), -math.log(15)))
    assert Free().curve({**params, "u2": 0.0}, 4) is None


@given(a0=slopes, a1=slopes, t=st.floats(0, 1), k=st.integers(2, 8))
def test_an_annealed_slope_is_that_of_the_time_though_few_knots_are_stored(
    a0: float, a1: float, t: float, k: int
) -> None:
    """Between two knots training interpolates the logarithms."""
    space, params = Annealed(), {"a0": a0, "a1": a1}
    for weights in weights_at(space.schedule(params, k, 2), space.weights(params, k), t, 2):
        assert shares(weights) == pytest.approx(line(a0 + (a1 - a0) * t, k))
        assert 0.99 <= math.fsum(weights) <= 1 + 1e-9


@given(a0=slopes, a1=slopes, k=st.integers(2, 8))
def test_the_weights_shown_of_an_annealed_slope_are_their_mean_over_time(a0: float, a1: float, k: int) -> None:
    mean, _ = integrate.quad_vec(lambda t: np.array(line(a0 + (a1 - a0) * t, k)), 0, 1)
    assert Annealed().weights({"a0": a0, "a1": a1}, k) == pytest.approx(mean, abs=0.005)


def test_an_annealed_slope_begins_and_ends_as_told_and_a_constant_one_is_a_slope() -> None:
    schedule = Annealed().schedule({"a0": 0.0, "a1": math.log(4)}, 4, 2)
    assert {len(rows) for rows in schedule} == {1}, "all intervals alike"
    assert schedule[0][0] == pytest.approx(uniform(4))
    assert schedule[-1][0] == pytest.approx([1 / 85, 4 / 85, 16 / 85, 64 / 85])
    constant = {"a0": 1.2, "a1": 1.2}
    assert Annealed().weights(constant, 4) == pytest.approx(Slope().weights({"a": 1.2}, 4))
    assert Annealed().curve(constant, 4) == Slope().curve({"a": 1.2}, 4)
    assert Annealed().curve({"a0": 1.2, "a1": 1.3}, 4) is None


def test_a_slope_per_interval_gives_each_interval_its_own_weights() -> None:
    space, params = PerInterval(loss_scale=85), {"a1": 0.0, "a2": math.log(4)}
    first, second = weights_at(space.schedule(params, 4, 2), space.weights(params, 4), 0.3, 2)
    assert first == pytest.approx([21.25] * 4)
    assert second == pytest.approx([1, 4, 16, 64])
    assert space.weights(params, 4) == pytest.approx([11.125, 12.625, 18.625, 42.625])
    assert list(space.axes(4, 3)) == ["a1", "a2", "a3"]
    assert space.curve(params, 4) is None
    assert space.curve({"a1": 0.7, "a2": 0.7}, 4) == Slope(loss_scale=85).curve({"a": 0.7}, 4)


@pytest.mark.parametrize(
    ("space", "keys"),
    [
        (LogLinear(), {"a": "space.a", "b": "space.b"}),
        (Annealed(), {"a0": "space.a0", "a1": "space.a1"}),
        (PerInterval(), {"a1": "space.a", "a2": "space.a"}),
        (Free(), {"u1": "space.u", "u2": "space.u", "u3": "space.u"}),
    ],
)
def test_every_axis_has_a_key_in_the_study_file(space: Family, keys: dict[str, str]) -> None:
    assert {axis: key_of(space, axis) for axis in space.axes(4, 2)} == keys


def test_the_intervals_of_a_study_are_those_that_its_method_trains() -> None:
    study = load_study(Path("digits.yaml"), overrides=("space.family=per_interval", "method.nfe=3"))
    assert study.spec.axes == {f"a{j}": (-0.5, 3.0) for j in (1, 2, 3)}
    annealed = load_study(Path("digits-annealed.yaml"))
    assert annealed.spec.space == Annealed(a0=(-1, 3), a1=(0, 5))


def test_each_free_axis_may_have_a_range_of_its_own() -> None:
    """Of three terms: log(w1 / w3) and log(w2 / w3)."""
    space = Free(u=((-4.6, 0), (-2.3, 2.3)))
    assert space.axes(3, 1) == {"u1": (-4.6, 0), "u2": (-2.3, 2.3)}
    assert space.weights({"u1": math.log(0.1), "u2": math.log(2)}, 3) == pytest.approx([0.1 / 3.1, 2 / 3.1, 1 / 3.1])
    assert space.params_of((0.1, 2, 1), 1) == pytest.approx({"u1": math.log(0.1), "u2": math.log(2)})
    assert space.params_of((2, 2, 1), 1) is None, "u1 is above its own range"
    assert [key_of(space, axis) for axis in ("u1", "u2")] == ["space.u"] * 2
    with pytest.raises(BadValue, match="u has 2 ranges, and 4 weights of a given sum have 3 axes"):
        space.axes(4, 1)


def test_ranges_of_single_axes_are_stored_and_read_again(tmp_path: Path) -> None:
    each = {"family": "free", "u": [[-4.6, 0], [-2.3, 2.3], [0, 1]]}
    study = resolved(tmp_path, {}, {"space": each})
    assert study.to_dict()["space"]["u"] == [[-4.6, 0.0], [-2.3, 2.3], [0.0, 1.0]]
    assert Study.from_dict(study.to_dict()) == study


@pytest.mark.parametrize("space", [LogLinear(), Slope(), LogQuadratic(), Free(), Annealed(), PerInterval()])
def test_a_family_takes_its_own_parameters_out_of_a_proposal(space: Family) -> None:
    params = {name: 0.5 * number for number, name in enumerate(space.axes(4, 2))}
    whole = {"zeal": "high", **params, "lr": 1e-4}
    assert space.weights(whole, 4) == space.weights(params, 4)
    assert space.schedule(whole, 4, 2) == space.schedule(params, 4, 2)
    assert space.curve(whole, 4) == space.curve(params, 4)


def test_only_an_axis_with_a_width_is_searched() -> None:
    assert free_axes(LogLinear(b=(-2, -2)).axes(4, 2)) == {"a": (-1.0, 3.0)}


def resolved(folder: Path, below: dict[str, object], above: dict[str, object], *overrides: str) -> Study:
    method = {"kind": "synthetic"}
    (folder / "below.yaml").write_text(yaml.safe_dump({"name": "below", "method": method} | below))
    (folder / "above.yaml").write_text(yaml.safe_dump({"base": "below.yaml", "name": "above"} | above))
    return load_study(folder / "above.yaml", overrides=overrides)


def test_another_family_replaces_the_space_below_it_and_the_same_one_extends_it(tmp_path: Path) -> None:
    below = {"space": {"a": [0, 1], "b": [-2, 0]}}
    assert resolved(tmp_path, below, {"space": {"family": "slope"}}).spec.space == Slope()
    assert resolved(tmp_path, below, {}, "space.family=slope", "space.a=[0, 2]").spec.space == Slope(a=(0, 2))
    same = resolved(tmp_path, below, {"space": {"family": "log_linear", "a": [0, 2]}})
    assert same.spec.space == LogLinear(a=(0, 2), b=(-2, 0))
    back = resolved(tmp_path, {"space": {"family": "slope", "loss_scale": 2}}, {"space": {"family": "log_linear"}})
    assert back.spec.space == LogLinear()


def test_another_method_replaces_the_settings_of_the_one_below_it(tmp_path: Path) -> None:
    below = {"method": {"kind": "sfd", "lr": 1e-3}, "teacher": "digits"}
    study = resolved(tmp_path, below, {"method": {"kind": "synthetic", "noise": 0.5}})
    assert (study.spec.method.kind, study.spec.method.noise) == ("synthetic", 0.5)


def test_with_a_method_goes_what_is_said_of_its_settings_and_figures(tmp_path: Path) -> None:
    below = {"tune": {"shift": [0, 0.5]}, "constraints": {"balance": {"max": 0.5}}}
    same = resolved(tmp_path, below, {"tune": {"flavour": None}}, "method.noise=0.5").spec
    assert list(same.tuned) == ["shift", "flavour"] and list(same.constraints) == ["balance"]
    other = {"method": {"kind": "sfd"}, "teacher": "digits", "tune": {"lr": None}}
    assert list(resolved(tmp_path, below, other).spec.tuned) == ["lr"]
    assert resolved(tmp_path, below, other).spec.constraints == {}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"family": "slop"}, r"unknown space.family 'slop'; known: 'log_linear', 'slope', 'log_quadratic', 'free'"),
        ({"family": 3}, "unknown space.family '3'"),
        ({"family": ["slope"]}, "unknown space.family"),
        ({"family": "slope", "a": [3, 1]}, "must rise"),
        ({"family": "slope", "loss_scale": 0}, "space.loss_scale in .* greater than 0"),
        ({"family": "slope", "loss_scale": float("inf")}, "space.loss_scale must be finite"),
        ({"a": "wide"}, "space.a"),
        ({"family": "free", "u": "wide"}, "space.u in .*; got 'wide'"),
        ({"family": "free", "u": [[0, "wide"], [0, 1], [0, 1]]}, r"space\.u\.0\.1 in .*; got 'wide'"),
        ({"family": "free", "u": [[1, 0], [0, 1], [0, 1]]}, "must rise"),
        ({"family": "free", "u": [[0, 1], [0, 1]]}, "space.u has 2 ranges"),
        ({"family": "free", "u": [[0, 1], [0, float("inf")], [0, 1]]}, "space.u must be finite"),
        ("slope", "space in "),
    ],
)
def test_a_space_that_is_none_is_refused_with_its_key(tmp_path: Path, space: object, message: str) -> None:
    with pytest.raises(BadValue, match=message):
        resolved(tmp_path, {}, {"space": space})


@pytest.mark.parametrize(
    ("space", "wrong", "nearest"),
    [
        ({"family": "slope", "b": [-5, 0]}, "space.b", "space.a"),
        ({"family": "slope", "loss_scal": 2}, "space.loss_scal", "space.loss_scale"),
        ({"index_orign": 1}, "space.index_orign", "space.index_origin"),
    ],
)
def test_an_unknown_key_of_a_space_is_named_with_the_nearest_of_its_family(
    tmp_path: Path, space: dict[str, object], wrong: str, nearest: str
) -> None:
    with pytest.raises(UnknownKey, match=rf"unknown key {wrong} in .*; did you mean {nearest}\?"):
        resolved(tmp_path, {}, {"space": space})


def test_a_study_that_was_stored_before_there_were_families_is_log_linear() -> None:
    stored = load_study(Path("synthetic.yaml")).to_dict()
    del stored["space"]["family"]
    assert Study.from_dict(stored).spec.space == LogLinear()
