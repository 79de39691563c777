"""Ray Tune as the service needs it, with a real Ray: each run is a process of its own, see placement_runs.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_S

RUNS = Path(__file__).with_name("placement_runs.py")


def run(name: str, folder: Path) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TUNE_"))}
    done = subprocess.run(
        [sys.executable, str(RUNS), name, str(folder)],
        env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def pids(answer: dict[str, Any], number: int) -> set[int]:
    return {result["pid"] for result in answer["results"] if result["number"] == number}


def steps(answer: dict[str, Any], number: int) -> list[int]:
    return [result["n"] for result in answer["results"] if result["number"] == number]


def test_a_frozen_worker_is_killed_and_its_place_goes_to_the_next_trial(tmp_path: Path) -> None:
    answer = run("a_frozen_worker", tmp_path)
    assert answer["lost"] == [0]
    assert answer["gone"]
    assert steps(answer, 0) == [1, 2]
    assert steps(answer, 1) == steps(answer, 2) == [1, 2, 3]
    assert answer["frozen"] not in pids(answer, 1) | pids(answer, 2)


def test_a_trial_whose_process_hangs_while_it_starts_is_ended_and_its_place_goes_to_the_next(tmp_path: Path) -> None:
    answer = run("a_hanging_start", tmp_path)
    assert answer["was_starting"] == [True] and answer["gone"]
    assert answer["lost"] == [0]
    assert steps(answer, 1) == [1, 2]


@pytest.mark.parametrize("name", ["a_disk_that_takes_nothing", "a_disk_that_takes_no_report"])
def test_a_disk_that_ray_tune_cannot_write_to_ends_the_run_with_words_for_it(name: str, tmp_path: Path) -> None:
    answer = run(name, tmp_path)
    assert answer["error"].startswith("Ray Tune cannot go on: ") and "/driver_artifacts" in answer["error"]
    assert f"Ray's temporary folder /tmp/ray and in {tmp_path}" in answer["error"]
    assert answer["error"].endswith("then run the command again") and "\n" not in answer["error"]
    assert answer["left"] == []


def test_a_stopped_trials_worker_runs_the_next_whatever_went_wrong_as_it_was_closed(tmp_path: Path) -> None:
    answer = run("stopped_trials", tmp_path)
    assert [steps(answer, number) for number in range(5)] == [[1]] * 5
    assert steps(answer, 5) == [1, 2, 3, 4, 5]
    assert answer["lost"] == []
    assert len({result["pid"] for result in answer["results"]}) == 1
    assert answer["most_waiting"] <= 1


def test_an_interrupt_waits_for_a_long_step_and_a_slow_checkpoint_but_not_for_a_frozen_worker(tmp_path: Path) -> None:
    assert run("an_interrupt", tmp_path)["written"] == [True, True]


@pytest.mark.long
def test_all_places_of_a_node_are_filled_at_the_start(tmp_path: Path) -> None:
    answer = run("many_at_once", tmp_path)
    assert answer["total"] == 8
    assert sorted(result["number"] for result in answer["results"]) == list(range(6))


def test_a_place_that_no_trial_of_ours_needs_is_given_back(tmp_path: Path) -> None:
    answer = run("idle_places", tmp_path)
    assert answer["before"] == 0 and answer["after"] == 1


@pytest.mark.long
def test_short_trials_share_the_processes_that_there_are(tmp_path: Path) -> None:
    answer = run("short_trials", tmp_path)
    assert sorted(result["number"] for result in answer["results"]) == list(range(100))
    assert answer["lost"] == []
    assert len({result["pid"] for result in answer["results"]}) <= 2 * 8
    assert answer["most_kept"] <= 20 + 8
    assert answer["alive"] <= 20 + 3 * 8, "nothing else keeps the others"


@pytest.mark.long
def test_a_process_starts_one_local_ray_after_the_other(tmp_path: Path) -> None:
    assert run("one_after_the_other", tmp_path)["numbers"] == [0, 0]
