"""What `status`, `set` and `trials` work out of rows and leases."""

import csv
import io
import json
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from search.lifecycle import Lease
from search.listing import trial_record, trials_csv, trials_table
from search.operations import finished_per_hour, is_alive, launchers, settings_table, takes_effect, time_left
from search.owner import this_process
from search.records import Row
from search.spec import mutable_values
from search.study_file import load_study, studies_folder
from tests.rows import row
from tests.studies import synthetic

NOON = datetime(2026, 1, 1, 12)


def ended(number: int, minutes_ago: float, state: str = "COMPLETE") -> Row:
    end = NOON - timedelta(minutes=minutes_ago)
    return replace(row(number, state, duration_s=60), started=end - timedelta(minutes=1), ended=end)


def lease(owner: str | None = "host|elsewhere|7|1", silent_s: float | None = 1.0) -> Lease:
    return Lease(number=0, owner=owner, silent_s=silent_s)


def test_every_key_that_may_change_says_when_it_takes_effect() -> None:
    said = {key: takes_effect(key) for key in mutable_values(synthetic()) if key != "comparison"}
    assert [str(key) for key in settings_table(synthetic()).columns[0].cells] == list(said)
    assert said["budget.trials"] == said["lease.grace_s"] == said["description"] == "at once"
    assert said["cache.enabled"] == said["checkpoints.every_s"] == "with the next trial"
    assert {said[key] for key in said if key.startswith("resources.")} == {"with the next launch"}
    assert said["lease.outage_s"] == said["checkpoints.url"] == "with the next launch"


def test_a_lease_is_alive_while_it_was_heard_of_within_the_grace_period_and_its_owner_may_live() -> None:
    host, system, _, started = this_process().split("|")
    gone = "|".join([host, system, str(2**22 + 1), started])  # above the largest process number of Linux
    assert is_alive(lease(), 10) and is_alive(lease(this_process()), 10)
    assert not is_alive(lease(silent_s=10), 10)
    assert not any(is_alive(dead, 10) for dead in (lease(None), lease(silent_s=None), lease(gone)))


def test_launchers_are_the_distinct_owners_of_live_leases() -> None:
    other, silent = lease("other|elsewhere|8|1"), lease("silent|elsewhere|9|1", silent_s=99)
    found = launchers([lease(), other, lease(), silent], 10)
    assert [(launcher.host, launcher.pid, launcher.trials) for launcher in found] == [("host", 7, 2), ("other", 8, 1)]


def test_trials_per_hour_are_those_of_the_last_hour_or_of_a_young_study_scaled_to_one() -> None:
    assert finished_per_hour([row(0, "RUNNING")], NOON) is None
    old = [ended(0, 300), ended(1, 59), ended(2, 1, "PRUNED"), ended(3, 1, "FAIL")]
    assert finished_per_hour(old, NOON) == 2
    assert finished_per_hour([ended(0, 9), ended(1, 5)], NOON) == pytest.approx(12), "two in ten minutes"
    assert finished_per_hour([ended(0, 300)], NOON) == 0


def test_time_left_counts_training_runs_and_the_trials_that_run_at_once() -> None:
    study = synthetic("budget.trials=4")
    done = [row(0, duration_s=10), row(1, role="control:uniform", duration_s=20, seeds=(0, 1))]  # 10 s a run
    running = [row(2, "RUNNING", fraction=0.5), row(3, "RUNNING", "control:paper", seeds=(0, 1), fraction=0.5)]
    # 3 searched and 2 control runs are to end, of which 0.5 and 1 are done, two at a time
    assert time_left(study, done + running) == pytest.approx((3 + 2 - 1.5) * 10 / 2)
    by_people = [replace(row(4 + i, "WAITING"), is_enqueued=True) for i in range(9)]
    assert time_left(study, done + running + by_people) == pytest.approx((10 + 2 - 1.5) * 10 / 2)


def test_time_left_counts_all_runs_of_trials_on_several_seeds() -> None:
    study = synthetic("budget.trials=4", "seeds.per_trial=3")
    done = [row(0, duration_s=30, seeds=(0, 1, 2))]
    running = [row(1, "RUNNING", seeds=(0, 1, 2), fraction=0.5), row(2, "RUNNING", seeds=(0, 1, 2))]
    assert time_left(study, done + running) == pytest.approx((3 * 3 - 1.5) * 10 / 2)


def test_time_left_is_none_where_nothing_is_known_and_zero_where_nothing_is_left() -> None:
    study = synthetic("budget.trials=1")
    assert time_left(study, [row(0, "RUNNING")]) is None, "no trial has ended"
    assert time_left(study, [row(0, role="control:uniform", duration_s=1)]) is None, "no trial runs"
    assert time_left(study, [row(0, duration_s=1)]) == 0


def test_csv_has_the_same_columns_for_every_trial_and_reads_back() -> None:
    study = synthetic()
    waiting = replace(row(0, "WAITING"), weights=(), seeds=())
    noted = replace(row(1, "FAIL", seeds=(3, 4)), reason='a "b",\nc', notes=("one", "two"), weights=(0.1, 0.2, 1 / 3))
    first, second = csv.DictReader(io.StringIO(trials_csv(study, [waiting, noted])))
    assert list(first) == list(second) and None not in second
    assert (first["value"], first["weight_0"], first["seeds"], first["enqueued"]) == ("", "", "", "false")
    assert (second["seeds"], second["reason"], second["notes"]) == ("3 4", 'a "b",\nc', "one; two")
    assert float(second["weight_2"]) == 1 / 3


def test_trials_tell_their_parameters_schedule_and_rule() -> None:
    study, schedule = synthetic("space.family=annealed"), (((0.5, 0.5),), ((0.25, 0.75),))
    proposed = replace(row(0), params={"a0": 0.5, "a1": 2.0}, schedule=schedule)
    learned = replace(row(1, role="control:gate"), rule="gate")
    records = [trial_record(study, item) for item in (proposed, learned)]
    assert [record["params"] for record in records] == [{"a0": 0.5, "a1": 2.0}, {}]
    assert [record["schedule"] for record in records] == [[[[0.5, 0.5]], [[0.25, 0.75]]], []]
    assert [record["rule"] for record in records] == ["fixed", "gate"]
    first, second = csv.DictReader(io.StringIO(trials_csv(study, [proposed, learned])))
    assert [json.loads(first[key]) for key in ("params", "schedule")] == [records[0]["params"], records[0]["schedule"]]
    assert (second["params"], second["schedule"], second["rule"]) == ("", "", "gate")


def test_trials_tell_their_settings_further_figures_and_what_they_miss() -> None:
    study = synthetic("tune={shift: , flavour: }", "constraints.balance.max=0.5")
    item = replace(
        row(0, value=1.0), params={"a": 1.0, "b": -1.0, "shift": 0.25, "flavour": "plain"},
        settings={"shift": 0.25, "flavour": "plain"}, metrics={"balance": 0.75}, violated=("balance",),
    )  # fmt: skip
    record = trial_record(study, item)
    assert (record["settings"], record["metrics"], record["violated"]) == (item.settings, item.metrics, ["balance"])
    (line,) = csv.DictReader(io.StringIO(trials_csv(study, [item])))
    assert [json.loads(line[key]) for key in ("settings", "metrics")] == [item.settings, item.metrics]
    assert line["violated"] == "balance"
    cells = {str(column.header): list(column.cells) for column in trials_table(study, [item]).columns}
    assert cells["settings"] == ["shift=0.25 flavour=plain"] and str(cells["reason"][0]) == "misses balance"
    assert "settings" not in [column.header for column in trials_table(study, [row(1)]).columns]


@pytest.mark.parametrize(("early", "is_other"), [(200, True), (1000, False)])
def test_an_early_score_of_other_samples_is_no_value_of_a_listed_trial(early: int, is_other: bool) -> None:
    study = load_study(studies_folder() / "digits.yaml", overrides=(f"evaluation.early_samples={early}",))
    assert study.evaluation is not None and study.evaluation.n_samples == 1000
    pruned = replace(row(0, "PRUNED", value=3.217), intermediate={1: 4.0, 2: 3.217})
    complete = replace(row(1, value=2.5), intermediate={1: 4.0, 4: 2.5})
    first, second = (trial_record(study, item) for item in (pruned, complete))
    assert (first["value"], first["last_step"]) == (None if is_other else 3.217, 2)
    assert (second["value"], second["last_step"]) == (2.5, 4)
    lines = list(csv.DictReader(io.StringIO(trials_csv(study, [pruned, complete]))))
    assert [line["value"] for line in lines] == ["" if is_other else "3.217", "2.5"]
    (values,) = [
        list(column.cells) for column in trials_table(study, [pruned, complete]).columns if column.header == "value"
    ]
    assert values == ["" if is_other else "3.217", "2.5"]
