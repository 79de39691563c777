"""What a study searches beside the weights: what its section `tune` means, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bdense_core.errors import BadValue, ConfigError, UnknownKey
from bdense_core.methods.base import Axis
from search.spec import Study, differences
from search.study_file import load_study
from search.tuning import grid, holds, value_of

RATE = Axis(about="a rate", low=1e-5, high=1e-3, log=True)
WIDTH = Axis(about="a width", low=16, high=64, integer=True)
KINDS = Axis(about="a kind", choices=("plain", "bitter"))
LIMITS = Axis(about="a limit", choices=(1.0, 5.0, 10.0))
SWITCH = Axis(about="a switch", choices=(True, False))


def study(tune: object, *overrides: str, kind: str = "synthetic", folder: Path) -> Study:
    path = folder / "study.yaml"
    values = {"name": "t", "method": {"kind": kind}, "teacher": "digits", "tune": tune}
    path.write_text(yaml.safe_dump(values))
    return load_study(path, overrides=overrides)


@pytest.mark.parametrize(("nothing"), [None, {}, []])
def test_an_axis_without_more_is_all_that_the_method_allows_and_is_stored_so(nothing: object, tmp_path: Path) -> None:
    found = study({"lr": nothing}, kind="sfd", folder=tmp_path)
    axis = found.spec.method.axes()["lr"]
    assert axis.log and found.spec.tuned == {"lr": axis}
    assert found.to_dict()["tune"] == {"lr": [axis.low, axis.high]}
    assert Study.from_dict(found.to_dict()) == found


def test_a_range_and_choices_are_narrowed_and_whatever_else_an_axis_is_stays(tmp_path: Path) -> None:
    found = study({"flavour": ["bitter", "plain"], "shift": [0.25, 0.5]}, folder=tmp_path)
    own = found.spec.method.axes()
    assert found.spec.tuned["shift"] == replace(own["shift"], low=0.25, high=0.5)
    assert found.spec.tuned["flavour"] == replace(own["flavour"], choices=("bitter", "plain"))
    assert list(found.spec.searched) == ["a", "b", "shift", "flavour"], "in the method's order, whoever writes the file"


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text: it wants 1.0e-4."""
    path = tmp_path / "s.yaml"
    path.write_text("{name: t, method: {kind: sfd}, teacher: digits, tune: {lr: [1e-4, 1e-3]}}")
    axis = load_study(path).spec.tuned["lr"]
    assert (axis.low, axis.high) == (1e-4, 1e-3)


@pytest.mark.parametrize(
    ("tune", "error", "message"),
    [
        ({"shft": None}, UnknownKey, r"unknown key tune\.shft for the method synthetic; did you mean tune\.shift\?"),
        ({"optimum": [1, 2]}, BadValue, r"method\.optimum is not searched by training again; .* shift, flavour"),
        ({"shift": [1, 0]}, BadValue, r"tune\.shift is \[1, 0\]; give two numbers that rise, such as \[0, 1\]"),
        ({"shift": [0.5, 0.5]}, BadValue, r"two numbers that rise"),
        ({"shift": [0.5]}, BadValue, r"two numbers that rise"),
        ({"shift": 0.5}, BadValue, r"tune\.shift is 0\.5; give two numbers"),
        ({"shift": ["low", 1]}, BadValue, r"tune\.shift is 'low'; give a finite number"),
        ({"shift": [0, float("inf")]}, BadValue, r"tune\.shift is inf; give a finite number"),
        ({"flavour": ["plain", "sweet"]}, BadValue, r"tune\.flavour is 'sweet'; choose one of plain, bitter"),
        ({"flavour": ["plain"]}, BadValue, r"tune\.flavour is \['plain'\]; give some of plain, bitter, at least two"),
        ({"flavour": ["plain", "plain"]}, BadValue, r"at least two, each once"),
        (["shift"], BadValue, r"tune in .*dictionary"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_its_key(
    tune: object, error: type[ConfigError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        study(tune, folder=tmp_path)


@pytest.mark.parametrize(
    ("ends", "message"),
    [([0, 1], r"rise from above 0"), ([-1, 1], r"rise from above 0")],
)
def test_a_logarithmic_range_begins_above_zero(ends: list[float], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=message):
        study({"lr": ends}, kind="sfd", folder=tmp_path)


def test_a_range_that_the_method_refuses_is_refused_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"tune\.lr_drop_at reaches 2\.0, .*must lie in \(0, 1\], got 2\.0"):
        study({"lr_drop_at": [0.5, 2]}, kind="sfd", folder=tmp_path)


def test_a_setting_called_as_an_axis_of_the_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bdense_core.methods import Synthetic

    monkeypatch.setattr(Synthetic, "axes", lambda _: {"a": Axis(about="another a")})
    with pytest.raises(BadValue, match=r"tune\.a is called as an axis of the weights; choose another space\.family"):
        study({"a": None}, folder=tmp_path)
    study({}, "space.family=annealed", folder=tmp_path)


def test_what_is_tuned_is_part_of_a_study_and_cannot_be_edited_away(tmp_path: Path) -> None:
    plain, tuned = study(None, folder=tmp_path), study({"shift": None}, folder=tmp_path)
    assert differences(plain.to_dict(), tuned.to_dict()) == ["tune.shift: stored None, now [0.0, 1.0]"]
    stored = plain.to_dict()
    del stored["tune"], stored["constraints"]  # as it was stored before there were such sections
    assert Study.from_dict(stored).sha256() == plain.sha256()


def test_settings_alone_are_searched_where_there_is_one_loss_term_or_the_weights_are_given(tmp_path: Path) -> None:
    given = study({"shift": None}, "space={family: slope, a: [1, 1]}", folder=tmp_path)
    assert list(given.spec.searched) == ["shift"]
    single = ("method.num_branches=1", "space.family=free")
    assert list(study({"shift": None}, *single, folder=tmp_path).spec.searched) == ["shift"]
    for tune, overrides in (({}, single), ({"shift": None}, ("method.num_branches=1",))):
        with pytest.raises(BadValue, match="a single loss term has no weights to search"):
            study(tune, *overrides, folder=tmp_path)


@pytest.mark.parametrize(
    ("axis", "given", "value"),
    [
        (RATE, "1e-4", 1e-4),
        (RATE, 1e-3, 1e-3),
        (WIDTH, "32", 32),
        (WIDTH, 32.0, 32),
        (KINDS, "bitter", "bitter"),
        (LIMITS, "5", 5.0),
        (LIMITS, 10, 10.0),
        (SWITCH, "false", False),
        (SWITCH, True, True),
    ],
)
def test_a_value_is_read_as_its_axis_has_it(axis: Axis, given: Any, value: object) -> None:
    found = value_of("x", axis, given)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("axis", "given", "message"),
    [
        (RATE, "1", r"x = 1 lies outside the study's range \[1e-05, 0\.001\]"),
        (RATE, "fast", "x is 'fast'; give a finite number"),
        (RATE, True, "x is True; give a finite number"),
        (RATE, None, "x is None; give a finite number"),
        (WIDTH, "32.5", r"x is '32\.5'; give a whole number"),
        (KINDS, "sour", "x is 'sour'; choose one of plain, bitter"),
        (LIMITS, 2, r"x is 2; choose one of 1\.0, 5\.0, 10\.0"),
        (SWITCH, 1, "x is 1; choose one of True, False"),
        (LIMITS, True, "x is True; choose one of"),
    ],
)
def test_a_value_that_its_axis_does_not_have_is_refused(axis: Axis, given: Any, message: str) -> None:
    with pytest.raises(BadValue, match=message):
        value_of("x", axis, given)
    assert not holds(axis, given)


def test_a_grid_is_even_on_each_kind_of_axis_with_both_ends_in_it() -> None:
    assert grid(Axis(about="", low=0, high=1), 5) == [0, 0.25, 0.5, 0.75, 1]
    assert grid(RATE, 3) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert (grid(RATE, 3)[0], grid(RATE, 3)[-1]) == (1e-5, 1e-3), "the ends exactly, or they would lie outside"
    assert grid(WIDTH, 4) == [16, 32, 48, 64]
    assert grid(Axis(about="", low=1, high=3, integer=True), 9) == [1, 2, 3], "no point twice"
    assert grid(Axis(about="", low=1, high=64, log=True, integer=True), 4) == [1, 4, 16, 64]
    assert grid(KINDS, 9) == ["plain", "bitter"]
