"""What the person who watches a launch is told."""

import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from search import logs
from search.progress import Board
from search.records import Row, count
from tests.rows import claim, row


@pytest.fixture(autouse=True)
def plain_logs() -> Iterator[None]:
    handlers = list(logging.getLogger().handlers)
    logs.configure()
    yield
    logging.captureWarnings(False)
    logging.getLogger().handlers[:] = handlers


def board(*, trials: int = 6, slots: int = 2, trial_runs: int = 1, console: Console | None = None) -> Board:
    return Board(
        study="digits", metric="fd", trials=trials, controls=1, control_runs=3, slots=slots, trial_runs=trial_runs,
        console=console,
    )  # fmt: skip


def progress(kimg: float, fraction: float, **more: object) -> dict[str, object]:
    return {"event": "progress", "phase": "training", "kimg": kimg, "fraction": fraction, **more}


def score(kimg: float, value: float, **more: object) -> dict[str, object]:
    return {"event": "score", "kimg": kimg, "value": value, "fraction": kimg / 4, **more}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Without their time of day."""
    found = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d digits ", line) for line in found), found
    return [line.split(" ", 2)[2] for line in found]


def seconds_left(text: str) -> int:
    found = re.search(r"about (?:(\d+) min )?(\d+) s left", text)
    assert found, text
    return 60 * int(found[1] or 0) + int(found[2])


def shown(watched: Board, width: int = 150) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(watched._render())
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def refresh(watched: Board, rows: list[Row], **changed: int) -> None:
    watched.refresh(rows, count(rows), **changed)


def test_settings_of_a_trial_are_told_and_one_that_misses_a_constraint_is_never_the_best(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched, good = board(), replace(claim(3), settings={"lr": 0.0001236789, "kind": "plain"})
    with watched:
        watched.started(good)
        watched.ended(good, "COMPLETE", 1.25)
        watched.ended(claim(4), "COMPLETE", 0.5, violated=("rho", "cos"))
        refresh(watched, [row(3, value=1.25), replace(row(4, value=0.5), violated=("rho",))])
        assert "best fd 1.25 by trial 3 (search)" in shown(watched)
    started, _, bad = lines(capsys)
    assert started == "trial 3 search started, shares 0.25 0.25 0.50, lr=0.0001237 kind=plain"
    assert bad.startswith("trial 4 search COMPLETE fd 0.5, which misses rho, cos | 2/6 trials, 0/1 controls, best 1.25")


def test_each_event_is_one_line_with_study_trial_role_and_node(capsys: pytest.CaptureFixture[str]) -> None:
    watched, trial = board(), claim(3)
    with watched:
        watched.started(trial)
        watched.progressed(trial, progress(0.5, 0.1, node="gpu-1", pid=4711))
        watched.progressed(trial, progress(0.9, 0.2, node="gpu-1", pid=4711))
        watched.progressed(trial, score(1, 1.25, node="gpu-1", pid=4711))
        watched.ended(trial, "COMPLETE", 1.25)
    started, placed, scored, ended = lines(capsys)
    assert started == "trial 3 search started, shares 0.25 0.25 0.50"
    assert placed == "trial 3 search runs in process 4711 [gpu-1]"
    assert re.fullmatch(r"trial 3 search kimg 1 fd 1\.25 seed 0 0 s \[gpu-1\]", scored)
    assert ended.startswith(
        "trial 3 search COMPLETE fd 1.25 | 1/6 trials, 0/1 controls, best 1.25 by trial 3 (search), about "
    )
    assert ended.endswith(" left [gpu-1]")


def test_a_json_line_carries_the_events_values(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", study="digits")
    watched, trial = board(), claim(0, "control:paper", seeds=(0, 7))
    watched.started(trial)
    watched.progressed(trial, progress(2, 0.5, node="gpu-1", pid=5, resumed=2))
    watched.progressed(trial, progress(1, 0.6, node="gpu-1", pid=5, phase="seed 7"))
    watched.progressed(trial, score(4, 1.5, node="gpu-1", pid=5))
    watched.failed(trial, "the metric is nan", retry=False)
    watched.note("2 lost trial(s) put back into the queue")
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in found] == ["started", "placed", "resumed", "phase", "score", "failed", "note"]
    assert {line["study"] for line in found} == {"digits"}
    assert {(line["trial"], line["role"]) for line in found[:-1]} == {(0, "control:paper")}
    assert [line["node"] for line in found] == [logs.NODE, *["gpu-1"] * 5, logs.NODE]
    assert found[1]["pid"] == 5 and found[2]["kimg"] == 2 and found[3]["phase"] == "seed 7"
    values = {"kimg": 4, "metric": "fd", "value": 1.5, "seed": 0}
    assert found[4].items() >= values.items()
    assert (found[5]["level"], found[5]["reason"], found[5]["retry"]) == ("ERROR", "the metric is nan", False)


def test_notes_of_workers_are_warnings_and_a_resumed_trial_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    watched, trial = board(), claim(3)
    watched.progressed(trial, progress(2, 0.5, node="n", pid=1, resumed=2.0))
    watched.progressed(trial, progress(2.1, 0.5, node="n", pid=1, note="no checkpoint can be written: disk full"))
    _, resumed, warned = lines(capsys)
    assert resumed == "trial 3 search going on from 2 kimg [n]"
    assert warned == "warning: trial 3 search no checkpoint can be written: disk full [n]"


def test_a_trial_that_leaves_is_told_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    watched = board()
    watched.failed(claim(1), "its worker was lost", retry=True)
    watched.lost(claim(2), "its lease expired")
    assert lines(capsys) == [
        "trial 1 search FAILED: its worker was lost; it is queued again",
        "warning: trial 2 search LOST: its lease expired",
    ]


def test_what_other_launchers_have_done_counts(capsys: pytest.CaptureFixture[str]) -> None:
    watched = board(trials=6)
    refresh(watched, [row(0, value=9.0, role="control:paper", seeds=(0, 1, 2)), row(1, value=0.5), row(2, "PRUNED")])
    watched.ended(claim(3), "COMPLETE", 0.75)
    (line,) = lines(capsys)
    assert "3/6 trials, 1/1 controls, best 0.5 by trial 1 (search)" in line


def test_a_changed_total_changes_counts_and_time_left() -> None:
    watched = board(trials=4, slots=1)
    rows = [row(0, role="control:paper", value=9.0, duration_s=30, seeds=(0, 1, 2)), row(1, value=1.0, duration_s=10)]
    refresh(watched, rows)
    assert seconds_left(shown(watched)) == 3 * 10
    refresh(watched, rows, trials=60)
    assert "1/60 trials" in shown(watched)
    assert seconds_left(shown(watched)) == 59 * 10
    refresh(watched, rows, slots=10)
    assert seconds_left(shown(watched)) == 59
    refresh(watched, rows, trials=1)
    assert "done" in shown(watched)


def test_time_left_knows_that_others_run_trials_too_and_that_controls_run_on_several_seeds() -> None:
    ended = [row(0, value=1.0, duration_s=12)]
    alone, beside = board(trials=4, slots=1), board(trials=4, slots=1)
    refresh(alone, ended)
    refresh(beside, [*ended, row(1, "RUNNING"), row(2, "RUNNING"), row(3, "RUNNING")])
    assert seconds_left(shown(alone)) == (3 + 3) * 12
    assert seconds_left(shown(beside)) == (3 + 3) * 12 / 3
    assert "3 run by other launchers" in shown(beside)
    refresh(beside, [*ended, *(row(number, "RUNNING", fraction=0.5) for number in (1, 2, 3))])
    assert seconds_left(shown(beside)) == (3 + 3 - 1.5) * 12 / 3


def test_time_left_knows_that_trials_run_on_several_seeds_one_after_the_other() -> None:
    watched = board(trials=4, slots=1, trial_runs=3)
    rows = [row(0, value=1.0, duration_s=36, seeds=(0, 1, 2))]
    refresh(watched, rows)
    assert seconds_left(shown(watched)) == (3 * 3 + 3) * 12
    refresh(watched, rows, slots=100)
    assert seconds_left(shown(watched)) == 3 * 12


def test_in_a_comparison_runs_are_counted_and_none_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    watched = Board(
        study="digits.confirm", metric="fd", trials=0, controls=4, control_runs=1, slots=1, is_comparison=True
    )
    refresh(watched, [row(0, value=0.5, role="arm:uniform", seeds=(1000,), duration_s=10)])
    watched.ended(claim(1, "arm:trial-7", seeds=(1000,)), "COMPLETE", 0.25)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r" trial 1 arm:trial-7 COMPLETE fd 0\.25 \| 2/4 runs, about 20 s left$", line)
    assert "2/4 runs" in shown(watched) and "best" not in shown(watched)
    searched = board(trials=0)
    searched.ended(claim(0, "control:paper", seeds=(0, 1, 2)), "COMPLETE", 0.25)
    assert "| 0/0 trials, 1/1 controls, best 0.25 by trial 0 (control:paper), done" in capsys.readouterr().err


def test_the_display_shows_nodes_only_where_there_are_several_and_the_seed_of_a_repeat() -> None:
    watched = board()
    for number in (1, 2):
        watched.started(claim(number))
        watched.progressed(claim(number), progress(1, 0.2, node="gpu-1", pid=number))
    assert "gpu-1" not in shown(watched)
    watched.progressed(claim(2), progress(1, 0.2, node="gpu-2", pid=2, phase="seed 5"))
    text = shown(watched)
    assert "node" in text and "gpu-1" in text and "gpu-2" in text and "seed 5" in text


def test_on_a_narrow_terminal_names_are_cut_and_numbers_are_whole() -> None:
    watched = board()
    control = claim(123, "control:conditional_only")
    watched.started(control)
    watched.progressed(control, progress(1234.5, 0.2, node="node-1.cluster", pid=1, phase="a phase of many words"))
    (line,) = (line for line in shown(watched, width=50).splitlines() if line.startswith("123"))
    assert " 1234.5 " in line and line.count("…") == 2


def test_a_pause_and_an_outage_are_told_once_and_stay_in_sight(capsys: pytest.CaptureFixture[str]) -> None:
    watched = board()
    for state in (True, True, False, False, True):
        watched.paused(state)
    watched.outage()
    watched.outage()
    assert "PAUSED" in shown(watched) and "NO DATABASE" in shown(watched)
    watched.outage(75)
    watched.paused(False)
    assert "PAUSED" not in shown(watched) and "NO DATABASE" not in shown(watched)
    paused = "paused; `bdense-weights resume --study digits` goes on"
    assert lines(capsys) == [
        paused,
        "going on after the pause",
        paused,
        "warning: the database does not answer; waiting for it",
        "the database answers again, after 1 min 15 s",
        "going on after the pause",
    ]


def test_on_a_terminal_lines_stand_above_the_display_and_routine_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with board(console=Console(stderr=True, force_terminal=True, width=120)) as watched:
        watched.started(claim(0))
        logs.say("stopping: running trials go back into the queue")
        watched.ended(claim(0), "COMPLETE", 1.25)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    assert "0 search COMPLETE fd 1.25" in text and "stopping: running" in text
    assert "started, shares" not in text


def test_json_lines_never_share_a_terminal_with_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    logs.configure("json")
    with board(console=Console(stderr=True, force_terminal=True)) as watched:
        watched.started(claim(0))
    assert [json.loads(line)["event"] for line in screen.getvalue().splitlines()] == ["started"]
