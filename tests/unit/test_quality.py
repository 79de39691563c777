"""What a study's space hides, in every family of weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from search import quality
from search.spec import Study
from search.study_file import load_study
from search.tuning import grid
from tests.rows import row

FAMILIES = ("slope", "log_quadratic", "free", "annealed", "per_interval")


def study(family: str, *overrides: str) -> Study:
    return load_study(Path("digits.yaml"), overrides=(f"space.family={family}", *overrides))


def found(searched: Study, **best: float) -> list[str]:
    """What is said where the best trial of four has these parameters, and the middles of the other ranges."""
    middle = {name: grid(axis, 3)[1] for name, axis in searched.spec.searched.items()}
    rows = [replace(row(number, value=5.0 + number), params=middle) for number in range(3)]
    return quality.findings(searched, [*rows, replace(row(7, value=1.0), params=middle | best)])


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_a_given_sum_have_no_flat_direction(family: str) -> None:
    assert quality.notes(study(family)) == []


@pytest.mark.parametrize(
    ("family", "best", "where"),
    [
        ("slope", {"a": 3.0}, "upper edge of space.a (3, the range ends at 3)"),
        ("log_quadratic", {"c": -0.99}, "lower edge of space.c (-0.99, the range ends at -1)"),
        ("free", {"u3": 0.95}, "upper edge of space.u in u3 (0.95, the range ends at 1)"),
        ("annealed", {"a0": -0.5}, "lower edge of space.a0 (-0.5, the range ends at -0.5)"),
        ("per_interval", {"a2": 2.98}, "upper edge of space.a in a2 (2.98, the range ends at 3)"),
    ],
)
def test_a_best_trial_on_an_edge_is_told_by_the_key_that_widens_it(
    family: str, best: dict[str, float], where: str
) -> None:
    (line,) = found(study(family), **best)
    assert line.startswith(f"the best trial 7 lies on the {where}; ")
    assert found(study(family)) == [], "in the middle"


@pytest.mark.parametrize(
    ("rate", "where"),
    [(1.0e-5, "lower edge of tune.lr (1e-05, the range ends at 1e-05)"), (9.9e-4, "upper edge of tune.lr"), (1e-4, "")],
)
def test_a_best_trial_on_the_edge_of_a_tuned_range_is_told_too(rate: float, where: str) -> None:
    """1e-4 lies in the middle of 1e-5 to 1e-3: their ratio counts."""
    lines = found(study("slope", "tune={lr: [1.0e-5, 1.0e-3]}"), lr=rate)
    assert len(lines) == bool(where) and all(where in line and "better values may lie beyond" in line for line in lines)


def test_the_best_trial_is_one_that_keeps_the_constraints() -> None:
    asked = study_of_constraints("tpe")
    rows = [replace(row(number, value=float(number)), params={"a": a}) for number, a in enumerate((3.0, 1.0, 1.1, 1.2))]
    assert "upper edge of space.a" in quality.findings(asked, rows)[0]
    assert quality.findings(asked, [replace(rows[0], violated=("balance",)), *rows[1:]]) == []
    nothing = [replace(item, violated=("balance",)) for item in rows]
    assert quality.findings(asked, nothing) == [
        "none of the 4 finished trials keeps the constraints of balance; loosen them"
    ]


def study_of_constraints(kind: str) -> Study:
    overrides = ("space.family=slope", "constraints.balance.max=0.9", f"sampler.kind={kind}")
    return load_study(Path("synthetic.yaml"), overrides=("budget.trials=5", *overrides))


@pytest.mark.parametrize(("kind", "is_told"), [("tpe", 0), ("gp", 0), ("qmc", 1), ("random", 1), ("grid", 1)])
def test_a_sampler_that_is_blind_to_constraints_is_told_of(kind: str, is_told: int) -> None:
    lines = quality.notes(study_of_constraints(kind))
    assert len(lines) == is_told and all(f"sampler.kind {kind} does not know the constraints" in line for line in lines)


def test_an_edge_past_which_no_share_changes_is_no_finding() -> None:
    """At slope 6 the endpoint has 99.8 %; at u1 = -9 the first branch has at most 0.02 %. Nothing is left to gain."""
    assert found(study("slope", "space.a=[-0.5, 6]"), a=6.0) == []
    assert found(study("free", "space.u=[-9, 1]"), u1=-9.0, u2=0.0, u3=0.0) == []
    assert len(found(study("free", "space.u=[-9, 1]"), u1=1.0)) == 1


def test_an_edge_past_which_weights_are_not_finite_is_no_finding_either() -> None:
    """exp(3 * 400) is not; the endpoint had everything long before."""
    assert found(study("log_linear", "space.a=[0, 200]"), a=200.0) == []
