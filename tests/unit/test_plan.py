"""What a launch would cost, worked out by hand for the digits: 4 kimg, NFE 2, K = 4, 12 trials, 3 controls, 3 seeds."""

from pathlib import Path
from typing import Any

import pytest

from bdense_core.methods import SFD
from bdense_core.methods.base import Control
from bdense_core.weights import endpoint_only
from search.plan import PAPER_TFLOPS, plan
from search.settings import Settings
from search.study_file import load_study, studies_folder
from search.throughput import Throughput, device_name, keep

TEACHER, STUDENT = 12 * 4000, 6 * 4000
"""Network evaluations of a run: 4 steps in each of 3 intervals, and 3 passes in each of 2 trained ones."""
SCORES = 4 * 1000 * 2
"""At 1, 2, 3 and 4 kimg, each of 1000 samples with 2 network calls."""


SECONDS = {"teacher_cache": 0.003, "student_training": 0.002, "student_scoring": 0.001}
"""Of a network evaluation, on a device that is made up."""


def planned(folder: Path, *overrides: str, price: float | None = None, **settings: str) -> dict[str, Any]:
    study = load_study(studies_folder() / "digits.yaml", overrides=overrides)
    return plan(study, Settings.load(home=folder, environ={}, **settings), price=price)


def measured(folder: Path, *overrides: str) -> None:
    study = load_study(studies_folder() / "digits.yaml", overrides=overrides)
    device = device_name(study)
    assert device
    keep(
        study,
        Throughput(seconds=SECONDS, device=device, measured="2026-11-22T05:00:00+00:00"),
        Settings.load(home=folder),
    )


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


def test_hours_and_money_are_the_evaluations_times_what_was_measured(tmp_path: Path) -> None:
    measured(tmp_path, "resources.cpus=2")
    time = planned(tmp_path, "resources.cpus=2", "resources.max_parallel=1", price=0.5)["time"]
    hours = {
        "teacher_cache": 0.003 * TEACHER * 3 / 3600,
        "student_training": 0.002 * STUDENT * 21 / 3600,
        "student_scoring": 0.001 * (SCORES * 21 + 3 * 1000 * 2) / 3600,
    }
    assert time["hours"] == pytest.approx(hours, rel=0.005)  # told in three digits
    assert time["minutes_per_run_with_cache"] == pytest.approx((0.002 * STUDENT + 0.001 * SCORES) / 60, rel=0.005)
    assert time["device_hours"] == pytest.approx(2 * sum(hours.values()), rel=0.005)
    assert time["cost"] == pytest.approx(0.5 * 2 * sum(hours.values()), rel=0.005)
    assert time["hours_at"]["trials_at_once"] == 1
    assert time["hours_at"]["hours"] == pytest.approx(sum(hours.values()), rel=0.005)
    assert time["is_measured"] and time["source"].startswith("measured here on ")
    assert time["source"].endswith(" at 2026-11-22T05:00:00+00:00")


def test_twice_the_runs_take_twice_the_training(tmp_path: Path) -> None:
    measured(tmp_path)
    few, many = (planned(tmp_path, f"budget.trials={trials}")["time"]["hours"] for trials in (12, 33))
    assert many["student_training"] == pytest.approx(2 * few["student_training"], rel=0.005)
    assert many["teacher_cache"] == few["teacher_cache"]


def test_a_cluster_runs_as_many_trials_at_once_as_the_study_says_and_is_unknown_otherwise(tmp_path: Path) -> None:
    measured(tmp_path)
    alone, four = (
        planned(tmp_path, f"resources.max_parallel={count}", ray_address="a:1")["time"] for count in ("null", 4)
    )
    assert alone["hours_at"] is None
    assert four["hours_at"]["trials_at_once"] == 4
    assert four["hours_at"]["hours"] == pytest.approx(four["device_hours"] / 4, rel=0.01)


def test_what_was_not_measured_is_not_told_of_a_cpu_and_assumed_of_a_gpu(tmp_path: Path) -> None:
    on_cpu = planned(tmp_path, price=3)["time"]
    assert (on_cpu["device_hours"], on_cpu["hours_at"], on_cpu["cost"]) == (None, None, None)
    assert "--calibrate" in on_cpu["source"]
    many = "budget.trials=5000"  # so that petaFLOPs, told in three decimals, are not rounded away
    found = planned(tmp_path, "resources.gpus=1", many, price=3)
    time, work = found["time"], sum(found["compute"]["pflop"].values())
    assert time["device_hours"] == pytest.approx(work * 1000 / PAPER_TFLOPS / 3600, rel=0.01)
    assert time["cost"] == pytest.approx(3 * time["device_hours"], rel=0.01)
    assert not time["is_measured"] and time["source"].startswith("assumed: 59 TFLOP/s")
    half = planned(tmp_path, "resources.gpus=0.5", many)["time"]
    assert half["device_hours"] == pytest.approx(time["device_hours"] / 2, rel=0.01)
    assert half["hours"] == time["hours"]
