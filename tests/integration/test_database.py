"""The connection: outages outlasted, the study's lock, and passwords that stay where they are."""

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy import text

from search import server
from search.database import Database
from search.errors import StorageError
from search.storage import Studies
from tests.studies import opened, synthetic


@pytest.fixture
def home() -> Iterator[Path]:
    """A server of the test's own, to stop and to start."""
    folder = Path(tempfile.mkdtemp(prefix="bdense-outage-"))
    yield folder
    server.stop(folder)
    shutil.rmtree(folder)


def test_a_launcher_outlasts_an_outage_and_sends_heartbeats_first(home: Path) -> None:
    outages: list[float | None] = []
    database = Database(server.ensure_running(home), patience_s=60, on_outage=outages.append)
    store = Studies(database).create_or_resume(synthetic("budget.trials=0"))
    claim = store.trials.claim()
    assert claim is not None
    with database.transaction() as connection:
        connection.execute(text("UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour'"))
    server.stop(home)
    back = threading.Timer(3.0, server.ensure_running, [home])
    back.start()
    store.trials.report(claim.number, 4.0, 1, may_prune=False)
    store.trials.complete(claim.number, 4.0)
    back.join()
    assert store.rows()[claim.number].value == 4.0
    assert outages[0] is None and outages[1] is not None and outages[1] > 1
    assert [len(outages), outages.count(None)] == [2, 1], "told once when it begins and once when it is over"
    database.close()


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
    with store.database.transaction() as connection:
        connection.execute(text("UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour'"))
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
