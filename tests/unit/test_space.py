"""The map from proposals to weights, and back for controls."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdense_core.errors import BadValue
from bdense_core.weights import endpoint_only, log_linear, uniform
from search.space import LogLinear


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
