"""The life of a trial against a real PostgreSQL: claims, leases, and what happens to late results."""

import multiprocessing
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from search.errors import LeaseLost, StorageError, StudyExists, StudyNotFound
from search.spec import Study
from search.storage import Database, StudyStore
from search.study_file import load_study, studies_folder

SYNTHETIC = studies_folder() / "synthetic.yaml"


def synthetic(*overrides: str, name: str = "t") -> Study:
    return load_study(SYNTHETIC, name=name, overrides=("seeds.control_repeats=1", *overrides))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


def run_one(store: StudyStore, value: float = 4.0) -> int | None:
    claim = store.claim()
    if claim is None:
        return None
    store.report(claim.number, value, 3, may_prune=False)
    store.complete(claim.number, value)
    return claim.number


def run_all(store: StudyStore) -> None:
    while run_one(store) is not None:
        pass


def states(store: StudyStore) -> Counter[tuple[str, str]]:
    return Counter((row.role, row.state) for row in store.rows())


def claim_all(url: str, name: str) -> None:
    database = Database(url)
    run_all(database.open(name))
    database.close()


def test_four_launchers_on_one_study_run_exactly_the_asked_trials(database: Database, database_url: str) -> None:
    store = database.create_or_resume(synthetic("budget.trials=10"))
    context = multiprocessing.get_context("spawn")
    launchers = [context.Process(target=claim_all, args=(database_url, "t")) for _ in range(4)]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join(120)
    assert [launcher.exitcode for launcher in launchers] == [0] * 4
    expected = {
        ("search", "COMPLETE"): 10,
        ("control:endpoint_only", "COMPLETE"): 1,
        ("control:uniform", "COMPLETE"): 1,
    }
    assert states(store) == expected
    proposals = [(row.params["a"], row.params["b"]) for row in store.rows() if row.is_search]
    assert len(set(proposals)) == 10


def test_a_resumed_study_asks_only_for_what_is_missing(database: Database) -> None:
    run_all(database.create_or_resume(synthetic("budget.trials=3")))
    again = database.create_or_resume(synthetic("budget.trials=5"))
    run_all(again)
    assert states(again)["search", "COMPLETE"] == 5
    assert sum(states(again).values()) == 7
    values = {tuple(row.params.values()) for row in again.rows() if row.is_search}
    assert len(values) == 5, "the sampler repeated a random proposal after the restart"


def test_controls_carry_their_weights_and_parameters_only_where_the_space_holds_them(database: Database) -> None:
    store = database.create_or_resume(synthetic("budget.trials=0"))
    run_all(store)
    rows = {row.role: row for row in store.rows()}
    assert rows["control:endpoint_only"].weights == (0, 0, 0, 1)
    assert rows["control:endpoint_only"].params == {}
    assert rows["control:uniform"].weights == (0.25,) * 4
    assert rows["control:uniform"].params == pytest.approx({"a": 0, "b": -1.3862943611198906})


def test_other_settings_under_a_taken_name_change_nothing(database: Database) -> None:
    store = database.create_or_resume(synthetic())
    before = store.stored_spec
    with pytest.raises(StudyExists, match=r"method\.noise: stored 0\.05, now 0\.5.*space\.a"):
        database.create_or_resume(synthetic("method.noise=0.5", "space.a=[0, 1]"))
    assert database.open("t").stored_spec == before


def test_a_trial_given_back_goes_on_as_the_same_trial(database: Database) -> None:
    store = database.create_or_resume(synthetic("budget.trials=1"))
    for _ in range(2):
        run_one(store)
    claim = store.claim()
    assert claim is not None
    store.report(claim.number, 5.0, 1, may_prune=False)
    store.give_back(claim.number)
    assert states(store)["search", "WAITING"] == 1
    again = database.open("t").claim()
    assert again is not None
    assert (again.number, again.weights, again.reported) == (claim.number, claim.weights, (1,))
    with pytest.raises(LeaseLost):
        store.complete(claim.number, 1.0)
    assert [row.value for row in store.rows() if row.is_search] == [None]


def test_a_second_owner_fences_the_first(database: Database, database_url: str) -> None:
    first = database.create_or_resume(synthetic("budget.trials=1"))
    claim = first.claim()
    assert claim is not None
    other = Database(database_url).open("t")
    other.owner = "elsewhere|x|1|1"
    first._database.storage.set_trial_user_attr(first._live[claim.number]._trial_id, "owner", other.owner)
    with pytest.raises(LeaseLost, match="no longer owned"):
        first.report(claim.number, 1.0, 1, may_prune=False)
    assert first.rows()[claim.number].intermediate == {}


def test_a_trial_of_a_dead_launcher_is_queued_again_with_a_link_to_the_first(
    database: Database, database_url: str
) -> None:
    store = database.create_or_resume(synthetic("budget.trials=2"))
    code = (
        "import sys, time; from search.storage import Database\n"
        "claim = Database(sys.argv[1]).open('t').claim(); print(claim.number, flush=True); time.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, database_url], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    number = int(launcher.stdout.readline())
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    launcher.stdout.close()
    assert store.reap() == 1
    rows = store.rows()
    assert rows[number].state == "FAIL"
    assert rows[number].reason is not None and "launcher ended" in rows[number].reason
    (retry,) = [row for row in rows if row.retry_of == number]
    assert (retry.state, retry.role) == ("WAITING", rows[number].role)
    assert store.reap() == 0
    run_all(store)
    assert states(store)["search", "COMPLETE"] == 2
    assert states(store)["control:endpoint_only", "COMPLETE"] == 1


def test_a_silent_trial_expires_and_its_late_result_is_dropped(database_url: str) -> None:
    database = Database(database_url, heartbeat_s=1, grace_s=2)
    store = database.create_or_resume(synthetic("budget.trials=0"))
    claim = store.claim()
    assert claim is not None
    deadline = time.monotonic() + 60
    while store.reap() == 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(LeaseLost):
        store.complete(claim.number, 0.1)
    assert store.rows()[claim.number].state == "FAIL"
    assert all(row.value != 0.1 for row in store.rows())
    database.close()


def test_a_row_that_never_had_a_heartbeat_is_swept_by_age(database_url: str) -> None:
    database = Database(database_url, heartbeat_s=1, grace_s=2)
    store = database.create_or_resume(synthetic("budget.trials=0"))
    orphan = store.optuna_study.ask()  # a launcher that died between asking and its first heartbeat
    with database.storage.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM trial_heartbeats")
    deadline = time.monotonic() + 60
    while store.rows()[orphan.number].state == "RUNNING":
        assert time.monotonic() < deadline
        store.reap()
        time.sleep(0.2)
    assert store.rows()[orphan.number].state == "FAIL"
    database.close()


def test_lost_trials_are_retried_only_so_often(database_url: str) -> None:
    database = Database(database_url, max_retries=2)
    store = database.create_or_resume(synthetic("budget.trials=0"))
    numbers = []
    while (claim := store.claim()) is not None:
        if claim.role != "control:uniform":
            store.complete(claim.number, 1.0)
            continue
        numbers.append(claim.number)
        store.fail(claim.number, "its worker was lost", retry=True)
    assert len(numbers) == 3
    assert {row.retry_of for row in store.rows() if row.number in numbers[1:]} == {numbers[0]}
    database.close()


def test_a_control_that_failed_for_good_is_not_run_again_and_a_lost_one_is(database: Database) -> None:
    store = database.create_or_resume(synthetic("budget.trials=0", "lease.max_retries=0"))
    for _ in range(2):
        claim = store.claim()
        assert claim is not None
        store.fail(claim.number, "said the test", retry=claim.role == "control:uniform")
    assert store.claim() is not None, "a lost control waits again"
    again = database.create_or_resume(synthetic("budget.trials=0"))
    assert states(again)["control:endpoint_only", "FAIL"] == 1
    assert sum(count for (role, _), count in states(again).items() if role == "control:endpoint_only") == 1


def test_a_hopeless_trial_is_stored_as_pruned_with_its_last_value(database: Database) -> None:
    store = database.create_or_resume(synthetic("budget.trials=7", "pruner.startup_trials=3"))
    for _ in range(6):
        claim = store.claim()
        assert claim is not None
        assert not store.report(claim.number, 4.0, 1, may_prune=True)
        store.complete(claim.number, 4.0)
    claim = store.claim()
    assert claim is not None
    assert store.report(claim.number, 9.0, 1, may_prune=True)
    store.prune(claim.number)
    row = store.rows()[claim.number]
    assert (row.state, row.value, row.last_step) == ("PRUNED", 9.0, 1)
    assert store.counts().counted == 5


def test_an_unknown_study_lists_the_known_ones(database: Database) -> None:
    database.create_or_resume(synthetic(name="alpha"))
    with pytest.raises(StudyNotFound, match=r"no study 'beta'.*known studies: alpha"):
        database.open("beta")


def test_an_unreachable_database_is_one_clear_error_without_the_password() -> None:
    with pytest.raises(StorageError) as caught:
        Database("postgresql+psycopg2://me:hunter2@127.0.0.1:1/none")
    assert "cannot be used" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_database_of_something_else_is_refused_and_left_alone(database_url: str) -> None:
    connection = psycopg2.connect(database_url.replace("+psycopg2", "", 1))
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE version_info (version_info_id int primary key, schema_version int, "
            "library_version varchar(256)); INSERT INTO version_info VALUES (1, 999, '9.9')"
        )
    connection.close()
    with pytest.raises(StorageError, match="cannot be used"):
        Database(database_url)


def test_nothing_that_ray_pickles_holds_the_database(database: Database, tmp_path: Path) -> None:
    import cloudpickle

    from search.progress import Board
    from search.scheduling import AskOptuna, CarryDecisions, Conductor

    store = database.create_or_resume(synthetic())
    board = Board(metric="m", trials=1, controls=1, control_runs=1, slots=1)
    conductor = Conductor(store, board, slots=1, cache_root=tmp_path, max_failures=1)
    for thing in (AskOptuna(conductor), CarryDecisions(conductor)):
        assert b"postgres" not in cloudpickle.dumps(thing)
    for thing in (database, store, conductor):
        with pytest.raises(TypeError, match="never pickled"):
            cloudpickle.dumps(thing)


def test_a_lowered_total_leaves_surplus_proposals_unrun(database: Database) -> None:
    store = database.create_or_resume(synthetic("budget.trials=4"))
    for _ in range(4):
        run_one(store)
    claims = [store.claim(), store.claim()]
    for claim in claims:
        assert claim is not None
        store.give_back(claim.number)
    lowered = database.create_or_resume(synthetic("budget.trials=2"))
    run_all(lowered)
    assert lowered.counts().counted == 2
    assert lowered.is_done()


@pytest.mark.filterwarnings("ignore:Fixed parameter a")
def test_a_proposal_without_weights_fails_and_the_next_one_runs(database: Database) -> None:
    store = database.create_or_resume(synthetic("budget.trials=2"))
    store.optuna_study.enqueue_trial({"a": 1e6, "b": 0.0})
    run_all(store)
    (failed,) = [row for row in store.rows() if row.state == "FAIL"]
    assert failed.reason is not None and "finite" in failed.reason
    assert store.counts().counted == 2


def test_after_an_outage_a_launchers_own_trials_get_a_fresh_grace(database_url: str) -> None:
    database = Database(database_url, heartbeat_s=10, grace_s=30)
    store = database.create_or_resume(synthetic("budget.trials=1"))
    claim = store.claim()
    assert claim is not None
    with database.storage.engine.begin() as connection:  # as after a night with the lid closed
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '9 hours'")
    store._reaped_at -= 9 * 3600
    assert store.reap() == 0
    store.complete(claim.number, 1.0)
    database.close()


def test_a_half_created_study_is_taken_up(database: Database) -> None:
    import optuna

    optuna.create_study(storage=database.storage, study_name="t")
    run_all(database.create_or_resume(synthetic("budget.trials=1")))
    assert database.open("t").is_done()
