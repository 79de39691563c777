"""The main job: launch, interrupt, resume, show, export."""

import json
import math
import os
import re
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from search.study_file import studies_folder
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

SYNTHETIC = str(studies_folder() / "synthetic.yaml")
QUICK = ("--no-dashboard", "--set", "seeds.control_repeats=1", "--set", "method.seconds=0")
SLOW = (
    "--no-dashboard",
    "--set",
    "seeds.control_repeats=1",
    "--set",
    "method.seconds=1",
    "--set",
    "pruner.kind=none",
)
TINY_DIGITS = (
    "--no-dashboard", "--set", "method.budget_kimg=1", "--set", "budget.every_kimg=1",
    "--set", "evaluation.n_samples=200", "--set", "seeds.control_repeats=1",
)  # fmt: skip


def finished(lines: list[str]) -> int:
    return sum(" search COMPLETE " in line for line in lines)


def test_the_quickstart_study_runs_and_its_export_command_works_as_printed(newcomer) -> None:
    done = newcomer.launch("--study", "tiny", "--trials", "2", *TINY_DIGITS)
    assert done.returncode == 0, done.stderr
    assert "control:endpoint_only" in done.stdout and "fd-digits" in done.stdout
    command = done.stderr.split("export the best weights: ")[1].splitlines()[0]
    exported = newcomer.run("sh", "-c", command)
    content = json.loads(exported.stdout)
    assert {"schema", "study", "method", "dataset", "nfe", "num_branches", "index_origin", "a", "b", "weights",
            "shares", "trial", "score", "candidates", "provenance"} <= content.keys()  # fmt: skip
    assert content["schema"] == "bdense-weights/1"
    assert (content["study"], content["method"], content["nfe"], content["num_branches"]) == ("tiny", "sfd", 2, 4)
    expected = [math.exp(content["a"] * (k + content["index_origin"]) + content["b"]) for k in range(4)]
    assert content["weights"] == pytest.approx(expected, rel=1e-12, abs=0)
    assert math.fsum(content["shares"]) == pytest.approx(1, abs=1e-12)
    assert content["score"]["metric"] == "fd-digits"
    assert content["score"]["n_samples"] == 200 and content["score"]["seeds"] == [0]
    assert all(content["provenance"][key] for key in ("spec_sha256", "teacher_sha256", "code_version", "created"))

    shown = newcomer.show("tiny")
    assert shown["directions"] == ["minimize"] and shown["metric"] == "fd-digits"
    roles = Counter(trial["role"] for trial in shown["trials"])
    assert roles == {"search": 2, "control:endpoint_only": 1, "control:uniform": 1, "control:paper": 1}
    best = min(t["value"] for t in shown["trials"] if t["role"] == "search" and t["state"] == "COMPLETE")
    assert content["score"]["value"] == best

    assert len(list((newcomer.home / "cache").iterdir())) == 2, "all trials share targets and endpoints"


@pytest.mark.long
def test_a_study_whose_cost_was_measured_beforehand_tells_how_far_that_was_off(user) -> None:
    command = ("--study", "previewed", "--trials", "1", *TINY_DIGITS)
    planned = user.launch(*command, "--dry-run", "--calibrate", "--price", "2", "--format", "json")
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"^calibrated in \d+ s; kept in ", planned.stderr, re.MULTILINE)
    time = json.loads(planned.stdout)["plan"]["time"]
    assert time["is_measured"] and time["cost"] == pytest.approx(2 * time["device_hours"], rel=0.01)
    done = user.launch(*command)
    assert done.returncode == 0, done.stderr
    figures = re.search(
        r"^preview: ([\d.e-]+) device hours were expected, ([\d.e-]+) were used \([+-]\d+ %\)$",
        done.stdout,
        re.MULTILINE,
    )
    assert figures, done.stdout
    shown = user.show("previewed")
    found = shown["preview"]
    assert found["trials"] == 4
    assert found["expected_device_hours"] == pytest.approx(time["device_hours"], rel=0.01), "nothing was pruned"
    assert found["used_device_hours"] == pytest.approx(sum(trial["duration_s"] for trial in shown["trials"]) / 3600)
    assert [float(figures[1]), float(figures[2])] == pytest.approx(
        [found["expected_device_hours"], found["used_device_hours"]], rel=0.01
    )


def test_an_interrupted_study_is_resumed_to_exactly_its_total(user) -> None:
    command = ("--study", "resumed", "--trials", "6", *SLOW)
    first = user.start_launch(SYNTHETIC, *command)
    first.wait_for(lambda lines: finished(lines) >= 2)
    first.interrupt()
    assert first.wait() == 130
    assert any("Resume with: " in line for line in first.lines)
    between = Counter(trial["state"] for trial in user.show("resumed")["trials"])
    assert between["RUNNING"] == 0
    assert 2 <= between["COMPLETE"] < 8

    assert user.launch(SYNTHETIC, *command).returncode == 0
    trials = user.show("resumed")["trials"]
    assert Counter(trial["state"] for trial in trials) == {"COMPLETE": 8}
    searched = [(trial["a"], trial["b"]) for trial in trials if trial["role"] == "search"]
    assert len(searched) == len(set(searched)) == 6

    again = user.launch(SYNTHETIC, *command)
    assert again.returncode == 0
    assert "nothing left to do" in again.stderr
    assert len(user.show("resumed")["trials"]) == 8


def test_a_second_interrupt_stops_at_once_and_the_study_can_still_be_resumed(user) -> None:
    command = ("--study", "twice", "--trials", "3", *SLOW)
    first = user.start_launch(SYNTHETIC, *command)
    first.wait_for(lambda lines: any(" started" in line for line in lines))
    first.interrupt()
    first.wait_for(lambda lines: any("stopping:" in line for line in lines))
    first.interrupt()
    assert first.wait() == 130
    assert user.launch(SYNTHETIC, *command).returncode == 0
    assert Counter(trial["state"] for trial in user.show("twice")["trials"])["COMPLETE"] == 5


def test_a_killed_launcher_leaves_nothing_behind_that_a_second_launch_does_not_mend(user) -> None:
    command = ("--study", "killed", "--trials", "4", *SLOW)
    first = user.start_launch(SYNTHETIC, *command)
    first.wait_for(lambda lines: finished(lines) >= 1)
    os.killpg(first.process.pid, signal.SIGKILL)
    first.wait()
    assert user.launch(SYNTHETIC, *command).returncode == 0
    trials = user.show("killed")["trials"]
    complete = Counter(trial["role"] for trial in trials if trial["state"] == "COMPLETE")
    assert complete == {"search": 4, "control:endpoint_only": 1, "control:uniform": 1}
    assert {trial["state"] for trial in trials} <= {"COMPLETE", "FAIL"}
    assert all("its launcher ended" in trial["reason"] for trial in trials if trial["state"] == "FAIL")


def test_two_launchers_at_once_share_the_work_without_doubling_it(user) -> None:
    command = (SYNTHETIC, "--study", "shared", "--trials", "6", *SLOW)
    launchers = [user.start_launch(*command), user.start_launch(*command)]
    assert [launcher.wait(PATIENCE_S) for launcher in launchers] == [0, 0]
    trials = user.show("shared")["trials"]
    assert Counter(trial["state"] for trial in trials) == {"COMPLETE": 8}
    assert all(any(" started" in line for line in launcher.lines) for launcher in launchers)


def test_a_killed_worker_costs_one_retry_and_nothing_else(newcomer) -> None:
    run = newcomer.start_launch(SYNTHETIC, "--study", "worker", "--trials", "3", *SLOW, "--set", "method.seconds=6")
    run.wait_for(lambda lines: any(" runs in process " in line for line in lines))
    pid = next(found[1] for line in run.lines if (found := re.search(r" runs in process (\d+)", line)))
    psutil.Process(int(pid)).kill()
    assert run.wait() == 0, "\n".join(run.lines)
    trials = newcomer.show("worker")["trials"]
    assert Counter(trial["role"] for trial in trials if trial["state"] == "COMPLETE")["search"] == 3
    (lost,) = [trial for trial in trials if trial["state"] == "FAIL"]
    assert "worker was lost" in lost["reason"]
    assert [trial["retry_of"] for trial in trials if trial["retry_of"] is not None] == [lost["number"]]


def test_a_lost_cluster_ends_the_launch_and_leaves_nothing_running(newcomer) -> None:
    run = newcomer.start_launch(SYNTHETIC, "--study", "lost", "--trials", "3", *SLOW, "--set", "method.seconds=30")
    run.wait_for(lambda lines: any(" started" in line for line in lines))
    (raylet,) = [
        child for child in psutil.Process(run.process.pid).children(recursive=True) if child.name() == "raylet"
    ]
    raylet.kill()
    assert run.wait(PATIENCE_S) == 1, "\n".join(run.lines)
    assert any("cluster went away" in line for line in run.lines)
    assert not any("Traceback" in line for line in run.lines)
    assert "RUNNING" not in {trial["state"] for trial in newcomer.show("lost")["trials"]}


def test_pruned_trials_are_stored_as_pruned_with_their_last_value(user) -> None:
    run = user.launch(SYNTHETIC, "--study", "pruned", "--trials", "12", *QUICK, "--set", "pruner.startup_trials=3")
    assert run.returncode == 0
    pruned = [trial for trial in user.show("pruned")["trials"] if trial["state"] == "PRUNED"]
    assert pruned
    for trial in pruned:
        assert trial["role"] == "search"
        assert trial["last_step"] < 3
        assert trial["value"] == trial["intermediate"][str(trial["last_step"])]


def test_a_diverging_trial_fails_with_its_reason_and_the_study_goes_on(user) -> None:
    run = user.launch(
        SYNTHETIC, "--study", "diverging", "--trials", "4", *QUICK, "--set", "method.fail_above_share=0.9",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    trials = user.show("diverging")["trials"]
    assert sum(trial["state"] in ("COMPLETE", "PRUNED") for trial in trials if trial["role"] == "search") == 4
    failed = [trial for trial in trials if trial["state"] == "FAIL"]
    assert "control:endpoint_only" in [trial["role"] for trial in failed]
    assert all("the metric is nan" in trial["reason"] and trial["value"] is None for trial in failed)


def test_a_study_in_which_everything_fails_ends_with_an_error(user) -> None:
    run = user.launch(SYNTHETIC, "--study", "hopeless", *QUICK, "--set", "method.fail_above_share=0", "--set",
                      "budget.max_failures=3")  # fmt: skip
    assert run.returncode == 1
    assert "3 trials in a row failed in this launch, the last one: the metric is nan" in run.stderr
    assert "Traceback" not in run.stderr


def test_plain_output_is_one_line_an_event_and_results_alone_go_to_stdout(finished) -> None:
    assert json.loads(finished.stdout)["study"] == "finished"
    assert "\x1b[" not in finished.stderr
    assert re.search(
        r"^\d\d:\d\d:\d\d finished trial \d+ search kimg 3 synthetic-score [\d.]+ seed 0 \d+ s \[.+\]$",
        finished.stderr,
        re.MULTILINE,
    )


def test_list_shows_every_study(user, finished) -> None:
    listed = json.loads(user.weights("list", "--format", "json").stdout)
    (mine,) = [study for study in listed if study["name"] == "finished"]
    assert mine["counts"]["counted"] == 2 and mine["counts"]["controls_done"] == 2
    assert "finished" in user.weights("list").stdout


def test_show_states_the_noise_floor_of_the_controls_repeats(user, finished) -> None:
    shown = user.show("finished")
    repeats = [list(t["by_seed"].values()) for t in shown["trials"] if t["role"].startswith("control:")]
    assert [len(values) for values in repeats] == [2, 2]
    pooled = math.sqrt(sum((x - y) ** 2 / 2 for x, y in repeats) / 2)
    assert shown["noise_floor"]["sd"] == pytest.approx(pooled)
    assert "weightings against noise" in user.weights("show", "--study", "finished").stdout


def test_export_writes_a_file_whole_or_not_at_all(user, finished, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "weights.yaml"
    absent = user.weights("export", "--study", "finished", "--output", str(target))
    assert absent.returncode == 1 and "there is no folder" in absent.stderr
    target.parent.mkdir()
    assert user.weights("export", "--study", "finished", "--format", "yaml", "--output", str(target)).returncode == 0
    assert "schema: bdense-weights/1" in target.read_text()
    blocked = user.weights("export", "--study", "finished", "--output", str(target / "below-a-file"))
    assert blocked.returncode == 1
    assert "cannot write" in blocked.stderr and "Traceback" not in blocked.stderr
    assert list(target.parent.iterdir()) == [target]


def test_show_draws_a_picture(user, finished, tmp_path: Path) -> None:
    picture = tmp_path / "study.png"
    assert user.weights("show", "--study", "finished", "--plot", str(picture)).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert user.weights("show", "--study", "finished", "--plot", str(tmp_path / "study.gif")).returncode == 2
