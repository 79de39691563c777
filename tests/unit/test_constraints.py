"""Bounds of further figures: which trials keep them, and by how much others miss them."""

from pathlib import Path

import pytest
import yaml

from bdense_core.errors import BadValue, ConfigError, UnknownKey
from search.constraints import Constraint, excesses, violated
from search.spec import Study, differences
from search.study_file import load_study


def study(folder: Path, constraints: object) -> Study:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "method": {"kind": "synthetic"}, "constraints": constraints}))
    return load_study(path)


def test_a_bound_itself_is_kept_and_what_lies_beyond_misses_it_by_the_distance() -> None:
    asked = {"rho": Constraint(min=0.8, max=1.2), "cos": Constraint(min=0.5)}
    assert excesses(asked, {"rho": 0.8, "cos": 0.75}) == pytest.approx([-0.25, 0.0, -0.4])
    assert violated(asked, {"rho": 0.8, "cos": 0.75}) == ()
    assert excesses(asked, {"rho": 1.5, "cos": 0.25}) == pytest.approx([0.25, -0.7, 0.3])
    assert violated(asked, {"rho": 1.5, "cos": 0.25}) == ("cos", "rho")
    assert excesses({}, {"rho": 9.0}) == []


@pytest.mark.parametrize("metrics", [{}, {"rho": float("nan")}, {"rho": float("inf")}])
def test_a_figure_that_is_missing_keeps_no_bound(metrics: dict[str, float]) -> None:
    """By 1 at least, and by a bound's own size where that is more: no infinity, which samplers cannot average."""
    asked = {"rho": Constraint(min=0.8, max=20)}
    assert violated(asked, metrics) == ("rho",)
    assert excesses(asked, metrics) == [1.0, 20.0]


def test_a_study_knows_which_trials_keep_its_constraints(tmp_path: Path) -> None:
    asked = study(tmp_path, {"balance": {"max": 0.5}})
    assert asked.violations({"balance": 0.5}) == ()
    assert asked.violations({"balance": 0.75}) == ("balance",)
    assert asked.excesses({"balance": 0.75}) == [0.25]
    assert Study.from_dict(asked.to_dict()) == asked


def test_a_constraint_makes_another_study(tmp_path: Path) -> None:
    plain, asked = study(tmp_path, None), study(tmp_path, {"balance": {"max": 0.5}})
    assert differences(plain.to_dict(), asked.to_dict()) == ["constraints.balance.max: stored None, now 0.5"]


@pytest.mark.parametrize(
    ("constraints", "error", "message"),
    [
        ({"balanc": {"max": 1}}, UnknownKey, r"unknown figure constraints\.balanc; did you mean balance\?"),
        ({"balance": {}}, BadValue, "no bound; give it min, max or both"),
        ({"balance": {"min": 2, "max": 1}}, BadValue, "at least 2 and at most 1; no trial can keep it"),
        ({"balance": {"min": float("nan")}}, BadValue, r"constraints\.balance\.min must be finite"),
        ({"balance": {"minn": 1}}, UnknownKey, r"unknown key constraints\.balance\.minn .*constraints\.NAME\.min\?"),
        ({"balance": 0.5}, BadValue, r"constraints\.balance in "),
    ],
)
def test_a_constraint_that_means_nothing_is_refused(
    constraints: object, error: type[ConfigError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        study(tmp_path, constraints)
