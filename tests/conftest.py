"""Fixtures shared by all tests: a real PostgreSQL, and a fresh database on it."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from psycopg2 import sql

from search import server

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded: two test processes share the cores


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """One embedded server for the whole test run. Tests that write ask for `database_url`."""
    # Not below pytest's own folder: as root the server's user could not stay in there, since every new
    # pytest session closes it again. And a short path keeps the socket in its usual place.
    home = Path(tempfile.mkdtemp(prefix="bdense-test-"))
    try:
        yield server.ensure_running(home)
    finally:
        server.stop(home)
        shutil.rmtree(home)


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """The URL of an empty database, dropped after the test along with whoever is still connected to it."""
    name = f"test_{uuid.uuid4().hex}"
    _execute(postgres_url, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield postgres_url.replace(f"/{server.DATABASE}?", f"/{name}?")
    finally:
        _execute(postgres_url, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _execute(url: str, statement: sql.Composable) -> None:
    connection = psycopg2.connect(url.replace("+psycopg2", "", 1))
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Kolkata"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine's time: Optuna stores UTC and shows that."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()
