"""The connection: outages outlasted, the study's lock, and passwords that stay where they are."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from search import database as database_module
from search import queries, server
from search.database import Database
from search.errors import LeaseLost, StorageError, StudyNotFound
from search.storage import Studies, StudyStore
from tests.patience import PATIENCE_S
from tests.studies import opened, synthetic


@pytest.fixture
def home() -> Iterator[Path]:
    """A server of the test's own, to stop and to start."""
    folder = Path(tempfile.mkdtemp(prefix="bdense-outage-"))
    yield folder
    server.stop(folder)
    shutil.rmtree(folder)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience for statements and locks that a test can wait out."""
    monkeypatch.setattr(database_module, "_STATEMENT_S", 3)
    monkeypatch.setattr(database_module, "_LOCK_S", 1)


@contextlib.contextmanager
def frozen(home: Path) -> Iterator[Callable[[], None]]:
    """The server's processes stand still; thawed by calling it, at the latest at the end."""
    postmaster = server.status(home).pid
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(postmaster)], capture_output=True, check=True)
    processes = [postmaster, *map(int, children.stdout.split())]

    def send(number: signal.Signals) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # one that served a connection and ended with it
                os.kill(process or 0, number)

    assert postmaster
    send(signal.SIGSTOP)
    try:
        yield lambda: send(signal.SIGCONT)
    finally:
        send(signal.SIGCONT)


def age_heartbeats(store: StudyStore) -> None:
    with store.database.transaction() as connection:
        connection.execute(text("UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour'"))


def test_a_launcher_outlasts_an_outage_and_sends_heartbeats_first(home: Path) -> None:
    outages: list[float | None] = []
    database = Database(server.ensure_running(home), patience_s=60, on_outage=outages.append)
    store = Studies(database).create_or_resume(synthetic("budget.trials=2"))
    claim, other = store.trials.claim(), store.trials.claim()
    assert claim is not None and other is not None
    age_heartbeats(store)
    server.stop(home)
    back = threading.Timer(3.0, server.ensure_running, [home])
    back.start()
    store.trials.report(claim.number, 4.0, 1, may_prune=False)
    store.trials.complete(claim.number, 4.0)
    back.join()
    with database.transaction() as connection:
        newest = text(
            "SELECT min(heartbeat) > timezone('utc', clock_timestamp()) - interval '30 min' FROM trial_heartbeats"
        )
        assert connection.execute(newest).scalar_one(), "the other trial's was sent too"
    assert store.rows()[claim.number].value == 4.0
    assert outages[0] is None and outages[1] is not None and outages[1] > 1
    assert [len(outages), outages.count(None)] == [2, 1], "told once when it begins and once when it is over"
    database.close()


def test_a_frozen_database_is_an_outage_like_others(home: Path, short: None) -> None:
    outages: list[float | None] = []
    url = server.ensure_running(home) + "&connect_timeout=1"
    database = Database(url, patience_s=60, on_outage=outages.append)
    store = Studies(database).create_or_resume(synthetic("budget.trials=0"))
    claim = store.trials.claim()
    assert claim is not None
    with frozen(home) as thaw:
        database.revive = thaw
        store.trials.complete(claim.number, 4.0)
    assert store.rows()[claim.number].value == 4.0
    assert [seconds is None for seconds in outages] == [True, False]
    database.close()


def test_a_database_that_stays_frozen_is_one_clear_error(home: Path, short: None) -> None:
    url = server.ensure_running(home) + "&connect_timeout=1"
    database = Database(url)
    with database.exclusive("t") as lock, frozen(home):
        with pytest.raises(OperationalError, match="silent for 3 s"):
            lock.check()
        with pytest.raises(StorageError, match=r"cannot be used.*silent for 1 s"):
            Database(url)
    database.close()


def test_a_signal_reaches_whoever_waits_for_a_frozen_database(home: Path) -> None:
    url = server.ensure_running(home)
    code = (
        "import sys; from search.database import Database\n"
        "with Database(sys.argv[1]).exclusive('t') as lock:\n"
        "    print('held', flush=True); input(); print('asks', flush=True); lock.check()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as waiting:  # fmt: skip
        assert waiting.stdout is not None and waiting.stdin is not None
        assert waiting.stdout.readline() == "held\n"
        with frozen(home):
            waiting.stdin.write("\n")
            waiting.stdin.flush()
            assert waiting.stdout.readline() == "asks\n"
            time.sleep(0.5)
            waiting.send_signal(signal.SIGINT)
            _, said = waiting.communicate(timeout=PATIENCE_S)
    assert said.strip().endswith("KeyboardInterrupt")


def test_patience_within_patience_is_had_once(home: Path) -> None:
    outages: list[float | None] = []
    database = Database(server.ensure_running(home), patience_s=0.5, on_outage=outages.append)
    store = Studies(database).create_or_resume(synthetic("budget.trials=0"))
    server.stop(home)
    with pytest.raises(StorageError) as caught:
        database.outlast(store.rows)
    assert str(caught.value).count("does not answer") == 1
    assert outages == [None]
    database.close()


def test_an_outage_that_ends_with_a_lost_lease_is_told_to_be_over(home: Path) -> None:
    outages: list[float | None] = []
    database = Database(server.ensure_running(home), patience_s=60, on_outage=outages.append)
    store = Studies(database).create_or_resume(synthetic("budget.trials=0"))
    claim = store.trials.claim()
    assert claim is not None
    with database.transaction() as connection:
        trial = {"trial": store.trials._live[claim.number]._trial_id}
        connection.execute(queries.WAIT, trial)
    server.stop(home)
    database.revive = lambda: server.ensure_running(home)
    with pytest.raises(LeaseLost):
        store.trials.beat(claim.number)
    assert [seconds is None for seconds in outages] == [True, False]
    database.close()


def test_a_lock_that_somebody_keeps_is_no_outage(database_url: str, short: None) -> None:
    outages: list[float | None] = []
    holder, database = Database(database_url), Database(database_url, patience_s=60, on_outage=outages.append)

    def ask() -> None:
        with database.exclusive("t"):
            raise AssertionError("two launchers hold it")

    with holder.exclusive("t"), pytest.raises(StorageError, match="another launcher holds the lock of study 't'"):
        database.outlast(ask)
    assert outages == []
    with holder.transaction() as connection:
        connection.execute(database_module._LOCK, {"space": "bdense tables", "name": ""})
        with pytest.raises(StorageError, match="another launcher holds the lock of the database's tables"):
            Database(database_url)
    for one in (holder, database):
        one.close()


def test_a_study_that_was_deleted_meanwhile_is_said_to_be_gone(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=0"))
    Studies(store.database).delete(store.name)
    with pytest.raises(StudyNotFound, match="the study is gone: somebody deleted it"):
        store.database.outlast(lambda: store.database.storage.get_study_user_attrs(store.optuna_study._study_id))
    with pytest.raises(KeyError, match="SOMETHING_ELSE"):
        store.database.outlast(lambda: os.environ["SOMETHING_ELSE"])
    store.database.close()


def test_what_runs_in_a_study_that_was_deleted_says_so(database_url: str) -> None:
    """As optuna-dashboard deletes: whatever runs."""
    store = opened(database_url, synthetic("budget.trials=0"))
    claim = store.trials.claim()
    assert claim is not None
    with store.database.transaction() as connection:
        connection.exec_driver_sql("TRUNCATE studies CASCADE")
    trials = store.trials
    for does in (
        lambda: trials.beat(claim.number),
        lambda: trials.report(claim.number, 1.0, 1, may_prune=False),
        lambda: trials.complete(claim.number, 1.0),
        lambda: store.database.outlast(trials.recovered),
    ):
        with pytest.raises(StudyNotFound, match="the study is gone: somebody deleted it"):
            does()
    store.database.close()


def test_a_database_that_stays_away_is_one_clear_error(home: Path) -> None:
    database = Database(server.ensure_running(home), patience_s=0.5)
    store = Studies(database).create_or_resume(synthetic("budget.trials=0"))
    server.stop(home)
    with pytest.raises(StorageError, match=r"does not answer.*what has ended is kept"):
        store.trials.claim()
    database.close()


def test_whoever_is_in_a_hurry_does_not_wait_for_a_database(home: Path) -> None:
    hurry = threading.Event()
    database = Database(server.ensure_running(home), patience_s=3600, hurry=hurry)
    store = Studies(database).create_or_resume(synthetic("budget.trials=0"))
    server.stop(home)
    threading.Timer(0.5, hurry.set).start()
    with pytest.raises(StorageError, match="does not answer"):
        store.trials.claim()
    database.close()


def test_the_embedded_server_is_brought_back_by_whoever_needs_it(home: Path) -> None:
    database = Database(server.ensure_running(home), patience_s=60, revive=lambda: server.ensure_running(home))
    store = Studies(database).create_or_resume(synthetic("budget.trials=0"))
    server.stop(home)
    assert store.trials.claim() is not None
    database.close()


def test_a_result_whose_answer_was_lost_is_stored_once(home: Path) -> None:
    """The server stored it and died before it could say so."""
    database = Database(server.ensure_running(home), patience_s=60)
    store = Studies(database).create_or_resume(synthetic("budget.trials=0"))
    claim = store.trials.claim()
    assert claim is not None
    believed = store.trials._live[claim.number]
    for _ in range(2):
        store.trials._live[claim.number] = believed
        store.trials.complete(claim.number, 4.0)
    assert store.rows()[claim.number].value == 4.0
    other = store.trials.claim()
    assert other is not None
    believed = store.trials._live[other.number]
    for _ in range(2):
        store.trials._live[other.number] = believed
        assert store.trials.fail(other.number, "its worker was lost", retry=True)
    assert len([row for row in store.rows() if row.retry_of == other.number]) == 1
    database.close()


def test_silence_is_counted_from_the_servers_start_on(home: Path) -> None:
    """While the server was down nobody could send a heartbeat: after a long outage no trial is lost by that alone."""
    url = server.ensure_running(home)
    study = synthetic("budget.trials=0", "lease.heartbeat_s=20", "lease.grace_s=60")
    elsewhere, store = opened(url, study, owner="a"), opened(url, study, owner="b")
    claim = elsewhere.trials.claim()
    assert claim is not None
    age_heartbeats(store)
    assert store.trials.reap().lost == 0
    assert store.rows()[claim.number].state == "RUNNING"
    for one in (elsewhere, store):
        one.database.close()


def test_a_lock_whose_holder_is_lost_is_free_again(database_url: str) -> None:
    code = (
        "import sys, time; from search.database import Database\n"
        "with Database(sys.argv[1]).exclusive('t'): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, database_url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with holder.stdout:
        holder.kill()
        holder.wait()
    database = Database(database_url)
    with database.exclusive("t") as lock:
        lock.check()
    database.close()


def test_whoever_lost_the_lock_notices_before_it_claims(database_url: str) -> None:
    database = Database(database_url)
    with database.exclusive("t") as lock:
        with database.transaction() as other:
            other.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks "
                    "WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
                )
            )
        time.sleep(0.2)
        with pytest.raises(Exception, match=r"terminating connection|closed the connection"):
            lock.check()
    database.close()


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
