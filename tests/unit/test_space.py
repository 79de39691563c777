"""The map from proposals to weights, and back for controls."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bdense_core.errors import BadValue, UnknownKey
from bdense_core.weights import endpoint_only, log_linear, shares, uniform
from search.space import LogLinear, Slope, free_axes, log_linear_of
from search.spec import Study
from search.study_file import load_study


@given(a=st.floats(-1, 3), b=st.floats(-5, 0), origin=st.integers(0, 1), k=st.integers(2, 8))
def test_a_proposal_is_found_again_from_its_weights(a: float, b: float, origin: int, k: int) -> None:
    space = LogLinear(index_origin=origin, a=(-1.01, 3.01), b=(-5, 0.01))
    found = space.params_of(space.weights({"a": a, "b": b}, k))
    if found is not None:  # rounding may push b just below its end
        assert math.isclose(found["a"], a, abs_tol=1e-9)
        assert math.isclose(found["b"], b, abs_tol=1e-8)
    else:
        assert b < -5 + 1e-8


def test_controls_inside_the_space_have_parameters_and_those_outside_have_none() -> None:
    space = LogLinear()
    assert space.params_of(uniform(4)) == pytest.approx({"a": 0.0, "b": -math.log(4)})
    assert space.params_of(log_linear(1.386, -4.274, 4)) == pytest.approx({"a": 1.386, "b": -4.274})
    assert space.params_of(endpoint_only(4)) is None
    assert space.params_of((0.1, 0.5, 0.1, 0.3)) is None
    assert LogLinear(a=(0.5, 3)).params_of(uniform(4)) is None


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
    assert space.params_of(space.weights({"a": a}, k)) == pytest.approx({"a": a}, abs=1e-9)


def test_a_slope_knows_controls_by_their_shares_and_not_by_their_scale() -> None:
    space = Slope()
    assert space.params_of(log_linear(1.386, -4.274, 4)) == pytest.approx({"a": 1.386})
    assert space.params_of(uniform(4)) == pytest.approx({"a": 0.0})
    assert space.params_of(endpoint_only(4)) is None
    assert Slope(a=(0.5, 3)).params_of(uniform(4)) is None
    assert Slope(a=(0.5, 3)).params_of(uniform(4), within_ranges=False) == pytest.approx({"a": 0.0})


def test_weights_off_a_log_linear_curve_have_no_curve() -> None:
    assert log_linear_of((0.1, 0.5, 0.1, 0.3)) is None
    assert log_linear_of((1.0,)) is None
    assert log_linear_of(()) is None


def test_only_an_axis_with_a_width_is_searched() -> None:
    assert free_axes(LogLinear(b=(-2, -2))) == {"a": (-1.0, 3.0)}


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


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"family": "slop"}, r"unknown space.family 'slop'; known: 'log_linear', 'slope'"),
        ({"family": 3}, "unknown space.family '3'"),
        ({"family": ["slope"]}, "unknown space.family"),
        ({"family": "slope", "a": [3, 1]}, "must rise"),
        ({"family": "slope", "loss_scale": 0}, "space.loss_scale in .* greater than 0"),
        ({"family": "slope", "loss_scale": float("inf")}, "space.loss_scale must be finite"),
        ({"a": "wide"}, "space.a"),
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
