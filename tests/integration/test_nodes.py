"""What a launch makes of nodes that answer, that answer otherwise, and that die meanwhile; with a real Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from search.version import versions
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
SILENT = "does not answer (WorkerCrashedError); look at it with `ray status`"


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TUNE_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.node_runs"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_a_launch_does_not_begin_with_a_node_that_is_not_as_this_machine(told: dict[str, Any]) -> None:
    first = told["first"]
    assert first["fine"] == []
    (error,) = first["no such file"]
    assert error.startswith("ClusterError: ") and "has no /nowhere/teacher" in error
    (error,) = first["other torch"]
    assert f"has torch {versions()['torch']} (here 0.0). Trials there would not be comparable" in error


def test_a_launch_does_not_begin_with_a_node_that_gives_no_answer(told: dict[str, Any]) -> None:
    (error,) = told["first"]["dies"]
    assert error.startswith("ClusterError: ") and f"{SILENT}, or take it out of the cluster" in error
    (error,) = told["first"]["fails"]
    assert "cannot run Python tasks (ValueError: not on this node)" in error
    answers, silent = told["first"]["no such node"]
    assert answers == [] and silent == ["does not answer (TaskUnschedulableError)"]


def test_a_node_that_joins_and_gives_no_answer_is_warned_of_once_and_asked_again_later(told: dict[str, Any]) -> None:
    joined = told["joined"]
    assert joined["before"] == []
    (warning,) = joined["dies"]
    assert warning.startswith("node ") and warning.endswith(SILENT)
    assert joined["not asked again yet"] == joined["dies again"] == joined["answers"] == []
    assert joined["all asked"] == [2]


def test_a_node_that_dies_while_it_is_asked_ends_no_launch(told: dict[str, Any]) -> None:
    joined = told["joined"]
    assert not [text for text in joined["takes its node along"] if "ClusterError" in text]
    assert joined["gone"] == []
