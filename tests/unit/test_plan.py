"""What a launch would cost, worked out by hand for the digits: 4 kimg, NFE 2, K = 4, 12 trials, 3 controls, 3 seeds."""

from pathlib import Path
from typing import Any

import pytest

from bdense_core.methods import SFD
from bdense_core.methods.base import Control
from bdense_core.weights import endpoint_only
from search.plan import plan
from search.settings import Settings
from search.study_file import load_study, studies_folder

TEACHER, STUDENT = 12 * 4000, 6 * 4000
"""Network evaluations of a run: 4 steps in each of 3 intervals, and 3 passes in each of 2 trained ones."""
SCORES = 4 * 1000 * 2
"""At 1, 2, 3 and 4 kimg, each of 1000 samples with 2 network calls."""


def planned(folder: Path, *overrides: str) -> dict[str, Any]:
    return plan(load_study(studies_folder() / "digits.yaml", overrides=overrides), Settings.load(home=folder))


def test_runs_and_network_evaluations_of_the_digits_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    found = planned(tmp_path)
    assert (found["runs"], found["scored_at_kimg"]) == (12 + 3 * 3, [1, 2, 3, 4])
    assert found["network_evaluations"] == {
        "teacher_cache": TEACHER * 3,
        "student_training": STUDENT * 21,
        "student_scoring": SCORES * 21 + 3 * 1000 * 2,  # each control once more, on another evaluation seed
    }
    assert found["without_cache"] == {"teacher": TEACHER * 21}
    assert planned(tmp_path, "cache.enabled=false")["network_evaluations"]["teacher_cache"] == TEACHER * 21


def test_a_control_costs_what_its_own_settings_cost_and_one_that_trains_nothing_is_scored_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = endpoint_only(4)
    controls = {
        "plain": Control(weights=weights),
        "short": Control(weights=weights, settings={"nfe": 1}),
        "untrained": Control(weights=weights, is_trained=False),
    }
    monkeypatch.setattr(SFD, "controls", lambda _: controls)
    found = planned(tmp_path, "budget.trials=0")["network_evaluations"]
    assert found["student_training"] == (STUDENT + 3 * 4000) * 3
    assert found["student_scoring"] == (SCORES + SCORES // 2 + SCORES) * 3 + 2000 + 1000 + 2000
    assert found["teacher_cache"] == TEACHER * 3


def test_a_method_that_keeps_no_cache_asks_its_teacher_in_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFD, "cache_bytes", lambda *_: 0.0)
    assert planned(tmp_path)["network_evaluations"]["teacher_cache"] == TEACHER * 21
