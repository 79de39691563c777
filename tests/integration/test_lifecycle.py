"""Every transition of a trial's life against a real PostgreSQL, and then all of them in random orders."""

import multiprocessing
import signal
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from sqlalchemy import text

from search.database import Database
from search.errors import LeaseLost
from search.records import Claim
from search.storage import Studies, StudyStore
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
    trial_id = store.trials._live[claim.number]._trial_id
    store.optuna_study._storage.set_trial_user_attr(trial_id, "retry", True)
    execute(store, f"UPDATE trials SET state = 'FAIL' WHERE trial_id = {trial_id}")  # and then it died
    store.trials.reap()
    store.trials.reap()
    assert [row.retry_of for row in store.rows() if row.state == "WAITING"].count(claim.number) == 1
    run_all(store)
    assert states(store)[claim.role, "COMPLETE"] == 1


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
        process.join(120)
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
        self.told: dict[int, float] = {}

    def launch(self) -> StudyStore:
        study = synthetic(f"budget.trials={self.total}", *patient(), name=self.name)
        store = Studies(self.database).create_or_resume(study)
        self.launches += 1
        store.trials.owner = f"launcher-{self.launches}|elsewhere|1|1"
        return store

    @rule(target=claims, who=st.integers(0, 2))
    def claim(self, who: int) -> tuple[int, int]:
        claim = self.stores[who].trials.claim()
        return who, -1 if claim is None else claim.number

    @rule(claim=claims, step=st.integers(1, 3))
    def report(self, claim: tuple[int, int], step: int) -> None:
        who, number = claim
        ours = self.owns(who, number)
        try:
            self.stores[who].trials.report(number, float(number), step, may_prune=False)
            assert ours
        except LeaseLost:
            assert not ours

    @rule(claim=consumes(claims), value=st.floats(0, 9))
    def complete(self, claim: tuple[int, int], value: float) -> None:
        who, number = claim
        ours = self.owns(who, number)
        try:
            self.stores[who].trials.complete(number, value)
            assert ours and number not in self.told
            self.told[number] = value
        except LeaseLost:
            assert not ours

    @rule(claim=consumes(claims), retry=st.booleans())
    def fail(self, claim: tuple[int, int], retry: bool) -> None:
        who, number = claim
        ours = self.owns(who, number)
        try:
            self.stores[who].trials.fail(number, "said the test", retry=retry)
            assert ours
        except LeaseLost:
            assert not ours

    @rule(claim=consumes(claims))
    def give_back(self, claim: tuple[int, int]) -> None:
        who, number = claim
        self.stores[who].trials.give_back(number)

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

    @rule(total=st.integers(1, 6))
    def change_the_total(self, total: int) -> None:
        self.total = total
        for store in self.stores:
            store.edit({"budget.trials": total})

    def owns(self, who: int, number: int) -> bool:
        store = self.stores[who]
        row = store.rows()[number] if number >= 0 else None
        return (
            row is not None
            and row.state == "RUNNING"
            and row.owner == store.trials.owner
            and number in store.trials.live
        )

    @invariant()
    def no_result_is_lost_or_changed(self) -> None:
        rows = self.stores[0].rows()
        complete = {row.number: row.value for row in rows if row.state == "COMPLETE"}
        assert complete == self.told

    @invariant()
    def no_failure_has_two_retries(self) -> None:
        rows = self.stores[0].rows()
        open_rows = [row for row in rows if row.state in ("WAITING", "RUNNING")]
        history = Counter(row.retry_of for row in open_rows if row.retry_of is not None)
        assert all(count == 1 for count in history.values())

    def teardown(self) -> None:
        """Monday: somebody launches once more, and every trial is accounted for."""
        last = self.launch()
        aged(last)
        last.trials.reap()
        run_all(last)
        rows = last.rows()
        searched = [row for row in rows if row.is_search and row.state == "COMPLETE"]
        before = sum(row.is_search for row in rows if row.number in self.told)
        assert len(searched) == max(self.total, before)
        assert not [row for row in rows if row.state in ("RUNNING", "WAITING")]
        for role in ("control:endpoint_only", "control:uniform"):
            ended = [row for row in rows if row.role == role and (row.state == "COMPLETE" or row.is_final)]
            assert len(ended) <= 1
        self.database.close()


def test_no_order_of_events_loses_or_doubles_a_trial(database_url: str) -> None:
    Weekend.url = database_url
    Weekend.TestCase.settings = settings(
        max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck),
        derandomize=True,
    )  # fmt: skip
    Weekend.TestCase("runTest").runTest()
