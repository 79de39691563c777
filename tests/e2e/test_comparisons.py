"""Confirming and transferring as a user does: interrupted, killed, and run again until all is there once."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from search.study_file import studies_folder
from tests.e2e.conftest import WEIGHTS, Running, User

pytestmark = pytest.mark.e2e

SYNTHETIC = str(studies_folder() / "synthetic.yaml")
ENDED = " runs, "


@pytest.fixture(scope="module")
def searched(user: User) -> str:
    """A search that has ended, whose runs take a while."""
    done = user.launch(
        SYNTHETIC, "--study", "believed", "--trials", "3", "--no-dashboard", "--set", "seeds.control_repeats=2",
        "--set", "method.seconds=0.8", "--set", "pruner.kind=none", "--set", "checkpoints.every_s=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return "believed"


def ended(running: Running) -> int:
    return sum(ENDED in line for line in running.lines)


def runs_of(user: User, study: str) -> Counter[tuple[str, tuple[int, ...]]]:
    """How often each run of a study is COMPLETE."""
    trials = user.show(study)["trials"]
    assert not [trial for trial in trials if trial["state"] in ("RUNNING", "WAITING")]
    return Counter((t["role"], tuple(t["seeds"])) for t in trials if t["state"] == "COMPLETE")


def interrupted_and_killed(user: User, command: tuple[str, ...]) -> None:
    """Run it, interrupt it; run it again, kill it; run it to its end."""
    first = user.start(str(WEIGHTS), *command)
    first.wait_for(lambda lines: ended(first) >= 2)
    first.interrupt()
    assert first.wait() == 130, "\n".join(first.lines)
    assert any("Resume with: bdense-weights " + command[0] in line for line in first.lines)
    second = user.start(str(WEIGHTS), *command)
    second.wait_for(lambda lines: ended(second) >= 2)
    os.killpg(second.process.pid, signal.SIGKILL)
    second.wait()
    third = user.weights(*command)
    assert third.returncode == 0, third.stderr


def test_a_confirmation_that_is_interrupted_and_killed_loses_and_doubles_nothing(user: User, searched: str) -> None:
    command = ("confirm", "--study", searched, "--top", "2", "--seeds", "3", "--format", "json")
    interrupted_and_killed(user, command)
    runs = runs_of(user, f"{searched}.confirm")
    assert len(runs) == 4 * 3
    assert set(runs.values()) == {1}
    again = user.weights(*command)
    assert again.returncode == 0
    assert "nothing left to do: all runs have ended" in again.stderr
    found = json.loads(again.stdout)
    assert [len(arm["by_seed"]) for arm in found["arms"]] == [3] * 4


@pytest.mark.long
def test_a_transfer_that_is_interrupted_and_killed_loses_and_doubles_nothing(
    user: User, searched: str, tmp_path: Path
) -> None:
    file, target = tmp_path / "weights.json", tmp_path / "target.yaml"
    assert user.weights("export", "--study", searched, "--top", "3", "--output", str(file)).returncode == 0
    target.write_text(f"base: {SYNTHETIC}\nname: target\nmethod: {{seconds: 0.8, best_share: 0.6}}\n")
    command = ("transfer", "--weights", str(file), "--to", str(target), "--top", "2", "--seeds", "3")
    interrupted_and_killed(user, command)
    runs = runs_of(user, f"target.{searched}.nfe0")
    assert len(runs) == 4 * 3
    assert set(runs.values()) == {1}
    assert "nothing left to do" in user.weights(*command).stderr


def test_a_confirmation_goes_on_by_its_name_as_any_study(user: User, searched: str) -> None:
    done = user.weights("confirm", "--study", searched, "--top", "1", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    again = user.launch("--study", f"{searched}.confirm", "--no-dashboard")
    assert again.returncode == 0, again.stderr
    assert "nothing left to do" in again.stderr
