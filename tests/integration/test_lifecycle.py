"""Every transition of a trial's life against a real PostgreSQL, and then all of them in random orders."""

import contextlib
import multiprocessing
import platform
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)
from optuna.storages import RetryHeartbeatStaleTrialCallback
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from bdense_core.errors import BadValue
from bdense_core.methods import Synthetic
from bdense_core.weights import log_linear
from search import database as database_module
from search.database import Database
from search.errors import LeaseLost
from search.records import Claim, Row, last_of_chains
from search.samplers import suggest
from search.storage import Studies, StudyStore
from search.version import PACKAGES, package_version
from tests.patience import PATIENCE_S
from tests.studies import opened, run_all, run_one, states, synthetic

STALE = "UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour'"


def claimed(store: StudyStore) -> Claim:
    claim = store.trials.claim()
    assert claim is not None
    return claim


def state(store: StudyStore, number: int) -> str:
    return store.rows()[number].state


def execute(store: StudyStore, statement: str) -> None:
    with store.database.transaction() as connection:
        connection.execute(text(statement))


def trial_id(store: StudyStore, number: int) -> int:
    return store.optuna_study._storage.get_trial_id_from_study_id_trial_number(store.optuna_study._study_id, number)


def mark_for_retry(store: StudyStore, number: int) -> None:
    """What a reaper does first, if it dies right after it."""
    store.database.storage.set_trial_user_attr(trial_id(store, number), "retry", True)


def fail_without_retry(store: StudyStore, number: int) -> None:
    """What a reaper does if it dies before it queues the retry."""
    mark_for_retry(store, number)
    execute(
        store, f"UPDATE trials SET state = 'FAIL', datetime_complete = now() WHERE trial_id = {trial_id(store, number)}"
    )


def retries(store: StudyStore) -> dict[int, int]:
    """How many rows, in whatever state, are the direct retry of a row."""
    histories = (RetryHeartbeatStaleTrialCallback.retry_history(trial) for trial in store.optuna_study.get_trials())
    return Counter(history[-1] for history in histories if history)


def patient(*overrides: str) -> tuple[str, ...]:
    """A grace that the tests' server, which has just started, has outlived."""
    return ("lease.heartbeat_s=1", "lease.grace_s=3", *overrides)


# -- one test for each arrow of the diagram


def test_claim_takes_a_waiting_trial_before_it_asks_for_a_new_one(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    assert [claimed(store).role for _ in range(3)] == ["control:endpoint_only", "control:uniform", "search"]
    assert store.trials.claim() is None
    assert all(row.owner == store.trials.owner and row.weights and row.code for row in store.rows())
    assert {lease.silent_s is not None for lease in store.trials.leases()} == {True}, "a claim sends a heartbeat"


def test_claim_gives_a_proposal_without_weights_up_and_takes_the_next(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=2"))
    store.optuna_study.enqueue_trial({"a": 1e6, "b": 0.0})
    with pytest.warns(UserWarning, match="Fixed parameter a"):
        run_all(store)
    (failed,) = [row for row in store.rows() if row.state == "FAIL"]
    assert failed.reason is not None and "finite" in failed.reason
    assert store.counts().counted == 2


def test_report_and_beat_leave_it_running_and_store_what_they_bring(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    claim = claimed(store)
    execute(store, STALE)
    store.trials.beat(claim.number, progress={"node": "n1", "kimg": 0.5})
    (lease,) = store.trials.leases()
    assert lease.silent_s is not None and lease.silent_s < 60
    assert store.rows()[claim.number].progress == {"node": "n1", "kimg": 0.5}
    assert not store.trials.report(claim.number, 5.0, 1, may_prune=False, progress={"node": "n2"})
    row = store.rows()[claim.number]
    assert (row.state, row.intermediate, row.progress) == ("RUNNING", {1: 5.0}, {"node": "n2"})
    store.trials.report(claim.number, 5.0, 1, may_prune=False)
    assert store.rows()[claim.number].intermediate == {1: 5.0}, "a report may be repeated"


def test_complete_stores_the_value(database_url: str) -> None:
    store = opened(database_url, synthetic())
    claim = claimed(store)
    store.trials.complete(claim.number, 3.5, repeats=[[1, 3, 3.6]])
    row = store.rows()[claim.number]
    assert (row.state, row.value, row.repeats) == ("COMPLETE", 3.5, ((1, 3, 3.6),))
    with pytest.raises(LeaseLost):
        store.trials.complete(claim.number, 1.0)
    assert store.rows()[claim.number].value == 3.5


TUNED = ("tune={shift: , flavour: }", "sampler.kind=random", "pruner.kind=none")
CONSTRAINED = ("constraints.balance={min: 0.1, max: 0.5}", "budget.trials=3")


def test_a_claim_splits_a_proposal_into_weights_and_settings(database_url: str) -> None:
    store = opened(database_url, synthetic(*TUNED, "budget.trials=8"))
    run_one(store), run_one(store)
    claims = []
    while (claim := store.trials.claim()) is not None:
        claims.append(claim)
        store.trials.complete(claim.number, 1.0)
    rows = {row.number: row for row in store.rows()}
    for claim in claims:
        params = rows[claim.number].params
        assert list(params) == ["a", "b", "shift", "flavour"]
        assert claim.settings == {"shift": params["shift"], "flavour": params["flavour"]}
        assert claim.weights == pytest.approx(log_linear(params["a"], params["b"], 4))
        assert rows[claim.number].settings == claim.settings and 0 <= claim.settings["shift"] <= 1
    assert {claim.settings["flavour"] for claim in claims} == {"plain", "bitter"}
    assert len({claim.settings["shift"] for claim in claims}) == 8


def test_a_retry_and_a_trial_that_was_given_back_keep_their_settings(database_url: str) -> None:
    store = opened(database_url, synthetic(*TUNED, "budget.trials=1"))
    run_one(store), run_one(store)
    claim = claimed(store)
    store.trials.give_back(claim.number)
    other = opened(database_url, synthetic(*TUNED, "budget.trials=1"))
    again = claimed(other)
    assert (again.number, again.settings, again.weights) == (claim.number, claim.settings, claim.weights)
    other.trials.fail(again.number, "its worker was lost", retry=True)
    retry = claimed(store)
    assert (retry.origin, retry.settings, retry.weights) == (claim.number, claim.settings, claim.weights)
    assert store.rows()[retry.number].params == store.rows()[claim.number].params


def test_settings_that_the_method_refuses_together_end_their_own_trial_alone(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The axes are fine one by one: here bitter wants a shift above a half, which is not known before."""
    store = opened(database_url, synthetic(*TUNED, "sampler.kind=grid", "sampler.grid_points=2", "budget.trials=4",
                                           "space={family: slope, a: [1, 1]}"))  # fmt: skip
    run_one(store), run_one(store)

    def check(self: Synthetic) -> None:
        if self.flavour == "bitter" and self.shift < 0.5:
            raise BadValue("too bitter")

    monkeypatch.setattr(Synthetic, "__post_init__", check)
    claims = [claimed(store) for _ in range(3)]
    failed = [row for row in store.rows() if row.state == "FAIL"]
    assert {row.reason for row in failed} == {"too bitter"} and all(row.is_final for row in failed)
    assert ("bitter", 0.0) not in {(claim.settings["flavour"], claim.settings["shift"]) for claim in claims}


def test_complete_stores_further_figures_and_what_they_make_of_the_constraints(database_url: str) -> None:
    store = opened(database_url, synthetic(*CONSTRAINED))
    for balance in (0.25, 0.75):
        store.trials.complete(claimed(store).number, 1.0, metrics={"balance": balance})
    store.trials.complete(claimed(store).number, 1.0)
    rows, trials = store.rows(), store.optuna_study.get_trials()
    assert [row.metrics for row in rows] == [{"balance": 0.25}, {"balance": 0.75}, {}]
    assert [row.violated for row in rows] == [(), ("balance",), ("balance",)]
    found = [list(trial.constraints.values()) for trial in trials]
    assert found == [pytest.approx([-0.15, -0.25]), pytest.approx([-0.65, 0.25]), [1.0, 1.0]]
    assert store.optuna_study.best_trial.number == rows[0].number


def test_a_pruned_trial_has_no_constraints(database_url: str) -> None:
    store = opened(database_url, synthetic(*CONSTRAINED))
    claim = claimed(store)
    store.trials.report(claim.number, 9.0, 1, may_prune=False)
    store.trials.prune(claim.number, 9.0)
    assert store.rows()[claim.number].violated == ()
    assert store.optuna_study.get_trials()[claim.number].constraints == {}


def test_a_trial_lost_just_before_its_end_brings_no_constraints_into_its_retry(database_url: str) -> None:
    """As where a launcher dies between the two, and the retry is pruned."""
    store = opened(database_url, synthetic(*CONSTRAINED))
    claim = claimed(store)
    store.database.storage.set_trial_system_attr(trial_id(store, claim.number), "constraints", [5.0, 5.0])
    store.trials.beat(claim.number, metrics={"balance": 5.0}, violated=["balance"])
    store.trials.fail(claim.number, "its worker was lost", retry=True)
    again = next(row for row in store.rows() if row.retry_of == claim.number)
    assert (again.metrics, again.violated) == ({}, ())
    assert store.optuna_study.get_trials()[again.number].constraints == {}


def test_prune_stores_the_last_report(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=7", "pruner.startup_trials=3"))
    for _ in range(6):
        claim = claimed(store)
        assert not store.trials.report(claim.number, 4.0, 1, may_prune=True)
        store.trials.complete(claim.number, 4.0)
    claim = claimed(store)
    assert store.trials.report(claim.number, 9.0, 1, may_prune=True)
    store.trials.prune(claim.number, 9.0)
    row = store.rows()[claim.number]
    assert (row.state, row.value, row.last_step) == ("PRUNED", 9.0, 1)
    assert store.counts().counted == 5


def test_fail_without_retry_is_the_end_and_another_proposal_takes_its_place(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    run_one(store), run_one(store)
    claim = claimed(store)
    assert not store.trials.fail(claim.number, "the loss is not finite", retry=False, detail="line 1")
    row = store.rows()[claim.number]
    assert (row.state, row.reason, row.is_final) == ("FAIL", "the loss is not finite", True)
    again = claimed(store)
    assert again.number == claim.number + 1 and again.weights != claim.weights


def test_fail_with_retry_queues_the_same_proposal_with_what_it_had_reported(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    run_one(store), run_one(store)
    claim = claimed(store)
    store.trials.report(claim.number, 5.0, 1, may_prune=False)
    assert store.trials.fail(claim.number, "its worker was lost", retry=True)
    again = claimed(store)
    assert (again.weights, again.reported, again.origin) == (claim.weights, (1,), claim.number)
    assert store.rows()[again.number].retry_of == claim.number
    assert store.rows()[again.number].reason is None


HALVING = ("pruner={kind: successive_halving, min_resource_kimg: 1, reduction_factor: 2}", "budget.trials=3")


def rungs(store: StudyStore) -> dict[int, dict[str, float]]:
    """What the pruner has noted, by trial."""
    trials = store.optuna_study.get_trials()
    noted = {t.number: {k: v for k, v in t.system_attrs.items() if k.startswith("completed_rung_")} for t in trials}
    return {number: values for number, values in noted.items() if values}


def test_what_a_pruner_noted_of_a_lost_trial_moves_to_its_retry_and_counts_once(database_url: str) -> None:
    store = opened(database_url, synthetic(*HALVING))
    run_one(store), run_one(store)
    lost = claimed(store)
    assert not store.trials.report(lost.number, 9.0, 1, may_prune=True)
    for _ in range(2):
        store.trials.fail(lost.number, "its worker was lost", retry=True)
        lost = claimed(store)
    assert rungs(store) == {lost.number: {"completed_rung_0": 9.0}}
    good, fair = claimed(store), claimed(store)
    assert not store.trials.report(good.number, 1.0, 1, may_prune=True)
    assert store.trials.report(fair.number, 2.0, 1, may_prune=True), "it is not among the better half of three"
    store.trials.report(lost.number, 8.0, 2, may_prune=True)
    assert rungs(store)[lost.number] == {"completed_rung_0": 9.0, "completed_rung_1": 8.0}, "it goes on where it was"


def test_the_last_attempt_of_a_lost_trial_keeps_what_the_pruner_noted(database_url: str) -> None:
    store = opened(database_url, synthetic(*HALVING, "lease.max_retries=1"))
    run_one(store), run_one(store)
    lost = claimed(store)
    store.trials.report(lost.number, 9.0, 1, may_prune=True)
    assert store.trials.fail(lost.number, "its worker was lost", retry=True)
    lost = claimed(store)
    assert not store.trials.fail(lost.number, "its worker was lost", retry=True)
    assert rungs(store) == {lost.number: {"completed_rung_0": 9.0}}


def test_a_claim_keeps_the_versions_of_the_packages_that_run_it(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    here = {"python": platform.python_version()} | {
        name: package_version(name) for name in (*PACKAGES, "bdense-search")
    }
    claim = claimed(store)
    assert store.rows()[claim.number].packages == here
    store.trials.beat(claim.number, packages={"torch": "1.0"})  # as if an older installation had run it
    store.trials.fail(claim.number, "its worker was lost", retry=True)
    again = next(row for row in store.rows() if row.retry_of == claim.number)
    while again.number not in store.trials.live:
        claimed(store)
    assert store.rows()[claim.number].packages == {"torch": "1.0"}
    assert store.rows()[again.number].packages == here, "those of the process that ran it last"


def test_a_trial_from_before_versions_were_kept_has_none(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    number = claimed(store).number
    execute(store, "DELETE FROM trial_user_attributes WHERE key = 'packages'")
    assert store.rows()[number].packages == {}


def test_retries_are_bounded_and_name_the_first(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=0", "lease.max_retries=2"))
    numbers = []
    while (claim := store.trials.claim()) is not None:
        if claim.role != "control:uniform":
            store.trials.complete(claim.number, 1.0)
            continue
        numbers.append(claim.number)
        store.trials.fail(claim.number, "its worker was lost", retry=True)
    assert len(numbers) == 3
    assert {row.retry_of for row in store.rows() if row.number in numbers[1:]} == {numbers[0]}


def test_give_back_lets_the_same_row_wait(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    run_one(store), run_one(store)
    claim = claimed(store)
    store.trials.report(claim.number, 5.0, 1, may_prune=False)
    store.trials.give_back(claim.number)
    assert state(store, claim.number) == "WAITING"
    again = claimed(opened(database_url, synthetic("budget.trials=1")))
    assert (again.number, again.weights, again.reported) == (claim.number, claim.weights, (1,))
    with pytest.raises(LeaseLost):
        store.trials.complete(claim.number, 1.0)
    assert [row.value for row in store.rows() if row.is_search] == [None]


def test_lose_a_trial_whose_launcher_died(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=2"))
    code = (
        "import sys, time; from tests.studies import *\n"
        "claim = opened(sys.argv[1], synthetic('budget.trials=2')).trials.claim()\n"
        "print(claim.number, flush=True); time.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, database_url], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    number = int(launcher.stdout.readline())
    assert store.trials.reap().lost == 0, "a living launcher's trial is its own"
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    launcher.stdout.close()
    assert store.trials.reap().lost == 1
    rows = store.rows()
    assert rows[number].state == "FAIL"
    assert rows[number].reason is not None and "launcher ended" in rows[number].reason
    (retry,) = [row for row in rows if row.retry_of == number]
    assert (retry.state, retry.role) == ("WAITING", rows[number].role)
    assert store.trials.reap().lost == 0
    run_all(store)
    assert states(store)["search", "COMPLETE"] == 2
    assert states(store)["control:endpoint_only", "COMPLETE"] == 1


def aged(store: StudyStore) -> None:
    """Wait until the server has run for longer than the grace, then let every heartbeat be an hour old."""
    execute(
        store, "SELECT pg_sleep(GREATEST(0, 3.5 - EXTRACT(EPOCH FROM clock_timestamp() - pg_postmaster_start_time())))"
    )
    execute(store, STALE)


def test_lose_a_silent_trial_and_drop_its_late_result(database_url: str) -> None:
    study = synthetic(*patient("budget.trials=1"))
    frozen, other = opened(database_url, study, owner="a"), opened(database_url, study, owner="b")
    claim = claimed(frozen)
    aged(other)
    assert other.trials.reap().lost == 1
    believed = frozen.trials._live[claim.number]
    for late in (
        lambda: frozen.trials.beat(claim.number),
        lambda: frozen.trials.report(claim.number, 0.1, 1, may_prune=False),
        lambda: frozen.trials.complete(claim.number, 0.1),
    ):
        frozen.trials._live[claim.number] = believed
        with pytest.raises(LeaseLost):
            late()
    assert frozen.trials.live == ()
    row = frozen.rows()[claim.number]
    assert (row.state, row.intermediate) == ("FAIL", {}) and "no progress" in str(row.reason)


def test_a_launcher_learns_which_of_its_trials_it_has_lost(database_url: str) -> None:
    study = synthetic(*patient("budget.trials=1"))
    frozen, other = opened(database_url, study, owner="a"), opened(database_url, study, owner="b")
    claim = claimed(frozen)
    aged(other)
    other.trials.reap()
    assert frozen.trials.reap().ours == (claim.number,)
    assert frozen.trials.live == ()


LOCKS = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
"""Ends whatever connection holds a study's lock."""


def before_first(store: StudyStore, statement: str, action: Callable[[], object]) -> None:
    """Something happens just before the store's first statement that begins so."""
    actions = [action]

    def act(_connection: object, _cursor: object, this: str, *_: object) -> None:
        if this.startswith(statement) and actions:
            actions.pop()()

    event.listen(store.database.storage.engine, "before_cursor_execute", act)


RANDOM = ("budget.trials=2", "sampler.kind=random")


def two_launchers(url: str) -> tuple[StudyStore, StudyStore]:
    """Of one study whose controls have run."""
    first, second = (opened(url, synthetic(*RANDOM), owner=name) for name in "ab")
    run_one(first), run_one(first)
    return first, second


@pytest.mark.parametrize("moment", ["INSERT INTO trial_params", "INSERT INTO trial_user_attributes"])
def test_a_row_that_is_taken_from_a_launcher_while_it_claims_stays_its_takers(database_url: str, moment: str) -> None:
    """It has lost the lock while it proposed, and another one has released the row and claimed it."""
    slow, other = two_launchers(database_url)
    slow.database.patience_s = PATIENCE_S
    taken: list[Claim] = []

    def take() -> None:
        execute(other, LOCKS)
        other.trials.reap()
        taken.append(claimed(other))

    before_first(slow, moment, take)
    late = claimed(slow)
    (theirs,) = taken
    assert late.number == theirs.number + 1, "it claims anew"
    for store, claim in ((other, theirs), (slow, late)):
        row = store.rows()[claim.number]
        assert (row.owner, row.params, row.weights) == (store.trials.owner, claim.params, claim.weights)
        assert row.weights == pytest.approx(log_linear(row.params["a"], row.params["b"], 4))
        assert store.trials.live == (claim.number,)
        store.trials.complete(claim.number, 1.0)
    assert slow.trials.claim() is None and states(slow)["search", "COMPLETE"] == 2


def test_a_launcher_whose_row_was_run_by_another_while_it_proposed_claims_anew(database_url: str) -> None:
    slow, other = two_launchers(database_url)
    slow.database.patience_s = PATIENCE_S

    def run() -> None:
        execute(other, LOCKS)
        other.trials.reap()
        run_one(other, 1.5)

    before_first(slow, "INSERT INTO trial_params", run)
    late = claimed(slow)
    row = slow.rows()[late.number - 1]
    assert (row.state, row.value, row.owner) == ("COMPLETE", 1.5, other.trials.owner)


def test_where_two_launchers_propose_for_one_row_its_weights_are_those_of_its_parameters(database_url: str) -> None:
    slow, other = two_launchers(database_url)
    begun = slow.trials._start()  # the lock is lost from here on
    assert begun is not None
    other.trials.reap()
    before_first(other, "INSERT INTO trial_params", lambda: suggest(begun, slow.study))
    claim = claimed(other)
    row = other.rows()[claim.number]
    assert row.params == claim.params == begun.params, "what was written first"
    assert row.weights == claim.weights == pytest.approx(log_linear(row.params["a"], row.params["b"], 4))
    with pytest.raises(LeaseLost):
        slow.trials._take(begun)
    assert other.rows()[claim.number].owner == other.trials.owner


def test_release_a_claim_that_nobody_finished(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=0"))
    half_claimed = store.optuna_study.ask()  # a launcher that died between asking and naming itself
    assert store.trials.reap().lost == 0
    assert state(store, half_claimed.number) == "WAITING"
    run_all(store)
    assert states(store) == {("control:endpoint_only", "COMPLETE"): 1, ("control:uniform", "COMPLETE"): 1}


def test_a_row_without_any_heartbeat_is_swept_by_age(database_url: str) -> None:
    study = synthetic(*patient("budget.trials=0"))
    elsewhere, store = opened(database_url, study, owner="a"), opened(database_url, study, owner="b")
    claim = claimed(elsewhere)
    execute(store, "DELETE FROM trial_heartbeats")
    assert store.trials.reap().lost == 0, "it gets a grace of its own"
    aged(store)
    assert store.trials.reap().lost == 1
    assert state(store, claim.number) == "FAIL"


def test_drop_what_a_lowered_total_leaves_over(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=4"))
    for _ in range(4):
        run_one(store)
    for claim in [claimed(store), claimed(store)]:
        store.trials.give_back(claim.number)
    lowered = opened(database_url, synthetic("budget.trials=2"))
    run_all(lowered)
    assert lowered.counts().counted == 2
    assert lowered.is_done()
    assert states(lowered)["search", "FAIL"] == 2


def test_a_retry_that_was_not_written_any_more_is_written_by_the_next_reaping(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=0"))
    claim = claimed(store)
    fail_without_retry(store, claim.number)
    store.trials.reap()
    store.trials.reap()
    assert retries(store) == {claim.number: 1}
    run_all(store)
    assert states(store)[claim.role, "COMPLETE"] == 1


def test_a_control_whose_retry_was_not_written_any_more_is_queued_once_by_a_launch(database_url: str) -> None:
    study = synthetic("budget.trials=0")
    store = opened(database_url, study)
    claim = claimed(store)
    fail_without_retry(store, claim.number)
    again = opened(database_url, study)
    again.trials.reap()
    run_all(again)
    assert retries(again) == {claim.number: 1}
    assert states(again)[claim.role, "COMPLETE"] == 1


def test_a_complete_trial_gets_no_retry_although_a_reaper_had_marked_it(database_url: str) -> None:
    study = synthetic("budget.trials=0")
    store, other = opened(database_url, study), opened(database_url, study)
    claim = claimed(store)
    mark_for_retry(other, claim.number)
    store.trials.complete(claim.number, 1.0)
    assert other.trials.reap().lost == 0
    run_all(opened(database_url, study))
    assert retries(store) == {}
    assert states(store)[claim.role, "COMPLETE"] == 1


def test_a_trial_that_completes_while_it_is_reaped_gets_no_retry(database_url: str) -> None:
    study = synthetic(*patient("budget.trials=0"))
    store, other = opened(database_url, study, owner="a"), opened(database_url, study, owner="b")
    claim = claimed(store)
    aged(other)

    def complete_first(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE trials SET state = 'FAIL'") and store.trials.live:
            store.trials.complete(claim.number, 1.0)

    event.listen(other.database.storage.engine, "before_cursor_execute", complete_first)
    assert other.trials.reap().lost == 0
    assert state(store, claim.number) == "COMPLETE" and store.trials.live == ()
    assert retries(store) == {}


def test_a_queued_retry_stays_when_another_launcher_completes_while_the_total_is_counted(database_url: str) -> None:
    study = synthetic("budget.trials=2")
    store, other = opened(database_url, study), opened(database_url, study)
    run_one(store), run_one(store)
    theirs, ours = claimed(other), claimed(store)
    store.trials.fail(ours.number, "its worker was lost", retry=True)

    def complete_first(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "count(*)" in statement and other.trials.live:
            other.trials.complete(theirs.number, 1.0)

    event.listen(store.database.storage.engine, "before_cursor_execute", complete_first)
    assert claimed(store).origin == ours.number
    assert state(store, theirs.number) == "COMPLETE"


def test_heartbeats_do_not_depend_on_a_sessions_time_zone(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = synthetic("budget.trials=0")
    stores = {}
    for zone in ("America/New_York", "Asia/Tokyo"):
        monkeypatch.setenv("PGTZ", zone)  # libpq reads it whenever it connects
        stores[zone] = opened(database_url, study, owner=zone)
        with stores[zone].database.transaction() as connection:
            assert connection.execute(text("SHOW TimeZone")).scalar_one() == zone
        claimed(stores[zone])
    for store in stores.values():
        silent = [lease.silent_s for lease in store.trials.leases()]
        assert len(silent) == 2 and all(seconds is not None and abs(seconds) < 600 for seconds in silent), silent


def test_a_launcher_that_is_frozen_in_the_middle_of_a_report_keeps_no_row_from_the_others(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_IDLE_S", 1)
    frozen, other = (opened(database_url, synthetic(*patient("budget.trials=0")), owner=name) for name in "ab")
    number = claimed(frozen).number
    trial_id = frozen.trials._live[number]._trial_id
    aged(other)
    with pytest.raises(DBAPIError), frozen.database.transaction() as connection:
        assert frozen.trials._lease(connection, trial_id)[0] == "RUNNING"  # the row is locked from here on
        assert other.trials.reap().lost == 1
        connection.execute(text("SELECT 1"))  # continued
    with pytest.raises(LeaseLost):
        frozen.trials.complete(number, 1.0)
    assert number in [claimed(other).origin for _ in range(2)]


def test_whatever_ends_a_trial_it_ended_now_by_this_machines_clock(database_url: str, zone: None) -> None:
    store = opened(database_url, synthetic("budget.trials=3"))
    completed, pruned, failed = (claimed(store).number for _ in range(3))
    store.trials.complete(completed, 1.0)
    store.trials.report(pruned, 2.0, 1, may_prune=False)
    store.trials.prune(pruned, 2.0)
    store.trials.fail(failed, "it went wrong", retry=False)
    for number in (completed, pruned, failed):
        row = store.rows()[number]
        assert row.started and row.ended and row.started <= row.ended
        assert abs((datetime.now() - row.ended).total_seconds()) < 600


def test_after_a_night_with_the_lid_closed_a_launchers_own_trials_get_a_fresh_grace(database_url: str) -> None:
    store = opened(database_url, synthetic(*patient("budget.trials=1")))
    claim = claimed(store)
    aged(store)
    store.trials._reaped_at -= 9 * 3600
    assert store.trials.reap().lost == 0
    store.trials.complete(claim.number, 1.0)


def test_a_launcher_counts_right_after_a_total_was_reached_and_raised(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=2"))
    for total in (2, 4, 7):
        store.edit({"budget.trials": total})
        run_all(store)
        assert states(store)["search", "COMPLETE"] == total


def test_a_persons_own_proposal_runs_in_any_case_and_counts(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    run_all(store)
    assert store.is_done()
    number = store.enqueue({"a": 1.0, "b": -1.0})
    assert not store.is_done()
    assert run_one(store) == number
    assert store.is_done() and store.counts().counted == 2
    assert store.trials.claim() is None


def launcher(url: str) -> None:
    run_all(opened(url, synthetic("budget.trials=10")))


@pytest.mark.parametrize("launchers", [2, 4])
def test_launchers_at_once_on_one_new_study_run_exactly_the_asked_trials(database_url: str, launchers: int) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=launcher, args=(database_url,)) for _ in range(launchers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * launchers
    store = opened(database_url, synthetic("budget.trials=10"))
    assert states(store) == {
        ("search", "COMPLETE"): 10,
        ("control:endpoint_only", "COMPLETE"): 1,
        ("control:uniform", "COMPLETE"): 1,
    }
    proposals = [(row.params["a"], row.params["b"]) for row in store.rows() if row.is_search]
    assert len(set(proposals)) == 10


# -- all of them in random orders


class Weekend(RuleBasedStateMachine):
    """Three launchers on one study, of which any may freeze or die at any time, and people who change the total."""

    url = ""
    runs = 0
    claims: Bundle[tuple[int, int]] = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        type(self).runs += 1
        self.name = f"weekend-{type(self).runs}"
        self.total = 4
        self.launches = 0
        self.database = Database(self.url)
        self.stores = [self.launch() for _ in range(3)]
        self.told: dict[int, tuple[str, float]] = {}

    def launch(self) -> StudyStore:
        study = synthetic(f"budget.trials={self.total}", *patient(), name=self.name)
        store = Studies(self.database).create_or_resume(study)
        self.launches += 1
        store.trials.owner = f"launcher-{self.launches}|elsewhere|1|1"
        return store

    # -- what a launcher does with its trials

    @rule(target=claims, who=st.integers(0, 2))
    def claim(self, who: int) -> MultipleResults[tuple[int, int]] | tuple[int, int]:
        claim = self.stores[who].trials.claim()
        return multiple() if claim is None else (who, claim.number)

    @rule(claim=claims)
    def beat(self, claim: tuple[int, int]) -> None:
        """A trial that beats lives on, whatever happened before."""
        who, number = claim
        with self.only_if_owned(who, number):
            aged(self.stores[who])
            self.stores[who].trials.beat(number, progress={"kimg": 1})
            self.stores[who - 1].trials.reap()
            assert self.owns(who, number)

    @rule(claim=claims, step=st.integers(1, 3))
    def report(self, claim: tuple[int, int], step: int) -> None:
        who, number = claim
        with self.only_if_owned(who, number):
            self.stores[who].trials.report(number, float(number), step, may_prune=False)

    @rule(claim=consumes(claims), value=st.floats(0, 9))
    def complete(self, claim: tuple[int, int], value: float) -> None:
        who, number = claim
        with self.only_if_owned(who, number):
            self.stores[who].trials.complete(number, value)
            self.tell(number, "COMPLETE", value)

    @rule(claim=consumes(claims))
    def prune(self, claim: tuple[int, int]) -> None:
        who, number = claim
        if not self.row(number).is_search:
            return
        with self.only_if_owned(who, number):
            self.stores[who].trials.report(number, float(number), 3, may_prune=True)
            self.stores[who].trials.prune(number, float(number))
            self.tell(number, "PRUNED", float(number))

    @rule(claim=consumes(claims), retry=st.booleans())
    def fail(self, claim: tuple[int, int], retry: bool) -> None:
        who, number = claim
        with self.only_if_owned(who, number):
            self.stores[who].trials.fail(number, "said the test", retry=retry)

    @rule(claim=consumes(claims))
    def give_back(self, claim: tuple[int, int]) -> None:
        who, number = claim
        self.stores[who].trials.give_back(number)

    # -- what goes wrong, and what people do

    @rule(who=st.integers(0, 2))
    def freeze_and_reap(self, who: int) -> None:
        """Nothing was heard of anybody for an hour; then one launcher looks."""
        aged(self.stores[who])
        self.stores[who].trials.reap()

    @rule(who=st.integers(0, 2))
    def die_and_start_again(self, who: int) -> None:
        self.stores[who] = self.launch()

    @rule(who=st.integers(0, 2))
    def die_in_a_claim(self, who: int) -> None:
        with self.stores[who].database.exclusive(self.name):
            self.stores[who].optuna_study.ask()

    @rule(claim=consumes(claims), value=st.floats(0, 9))
    def complete_what_a_reaper_had_marked_before_it_died(self, claim: tuple[int, int], value: float) -> None:
        who, number = claim
        if self.row(number).state == "RUNNING":
            mark_for_retry(self.stores[who - 1], number)
        self.complete(claim, value)
        self.stores[who - 1].trials.reap()

    @rule(claim=consumes(claims), reaps=st.booleans())
    def die_between_a_failure_and_its_retry(self, claim: tuple[int, int], reaps: bool) -> None:
        """Of a trial's owner; it is launched again, and looks for lost trials at once or dies before."""
        who, number = claim
        if self.row(number).state == "RUNNING":
            fail_without_retry(self.stores[who], number)
        self.stores[who] = self.launch()
        if reaps:
            self.stores[who].trials.reap()

    @rule(total=st.integers(1, 6))
    def change_the_total(self, total: int) -> None:
        self.total = total
        for store in self.stores:
            store.edit({"budget.trials": total})

    # -- what must hold

    @contextlib.contextmanager
    def only_if_owned(self, who: int, number: int) -> Iterator[None]:
        ours = self.owns(who, number)
        try:
            yield
            assert ours
        except LeaseLost:
            assert not ours

    def owns(self, who: int, number: int) -> bool:
        store, row = self.stores[who], self.row(number)
        return row.state == "RUNNING" and row.owner == store.trials.owner and number in store.trials.live

    def row(self, number: int) -> Row:
        return self.stores[0].rows()[number]

    def tell(self, number: int, state: str, value: float) -> None:
        assert number not in self.told
        self.told[number] = (state, value)

    @invariant()
    def no_result_is_lost_or_changed_or_came_twice(self) -> None:
        ended = [row for row in self.stores[0].rows() if row.state in ("COMPLETE", "PRUNED")]
        assert {row.number: (row.state, row.value) for row in ended} == self.told
        assert len({row.origin for row in ended}) == len(ended)

    @invariant()
    def only_failures_have_a_retry_and_none_has_two(self) -> None:
        rows = self.stores[0].rows()
        for number, count in retries(self.stores[0]).items():
            assert count == 1 and rows[number].is_retried

    def teardown(self) -> None:
        """Monday: somebody launches once more, and every trial is accounted for."""
        try:
            self.finish(self.launch())
        finally:
            self.database.close()

    def finish(self, last: StudyStore) -> None:
        aged(last)
        last.trials.reap()
        run_all(last)
        rows = last.rows()
        before = sum(rows[number].is_search for number in self.told)
        ended = [row for row in rows if row.state in ("COMPLETE", "PRUNED")]
        assert sum(row.is_search for row in ended) == max(self.total, before)
        assert not [row for row in rows if row.state in ("RUNNING", "WAITING")]
        assert retries(last) == {row.number: 1 for row in rows if row.is_retried}
        for role in ("control:endpoint_only", "control:uniform"):
            *earlier, newest = [row for row in last_of_chains(rows) if row.role == role]
            # A launch queues a control again whose retries were exhausted, and no other.
            assert all(self.is_exhausted(last, row) for row in earlier)
            assert newest.state == "COMPLETE" or newest.is_final or self.is_exhausted(last, newest)

    def is_exhausted(self, store: StudyStore, row: Row) -> bool:
        history = RetryHeartbeatStaleTrialCallback.retry_history(store.optuna_study.trials[row.number])
        return row.state == "FAIL" and not row.is_final and len(history) >= store.study.spec.lease.max_retries


def test_no_order_of_events_loses_or_doubles_a_trial(database_url: str) -> None:
    """Other stories each time; one that fails is told again by the blob that Hypothesis prints."""
    Weekend.url = database_url
    Weekend.TestCase.settings = settings(
        max_examples=6, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    Weekend.TestCase("runTest").runTest()
