"""The embedded PostgreSQL: start, find again, recover, stop.

One server per home folder. It outlives the launcher, so that other commands and the dashboard find it again.
This file asks and decides; `postmaster.py` knows the folder and runs PostgreSQL's programs. Whether a server
runs is always settled by connecting to it: its `postmaster.pid` may be left from a crash.
"""

import enum
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from search import postmaster
from search.errors import ServerError
from search.postmaster import PidFile, Place, programs
from search.settings import private_folder

__all__ = ["DATABASE", "ServerStatus", "address", "ensure_running", "find", "programs", "status", "stop"]

DATABASE = "bdense"
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerStatus:
    """What `bdense-weights doctor` prints about the embedded server."""

    running: bool
    """It answers a query now."""
    url: str | None
    version: str | None
    """Of the running server, else the major version that the data folder was made by; None without one."""
    data_folder: Path
    pid: int | None
    log_path: Path
    problem: str | None
    """Why it does not answer, where that is known."""


def ensure_running(home: Path, *, timeout_s: float = 60.0) -> str:
    """The URL of a server that has just answered; starts, creates or recovers it where needed.

    Args:
        home: the state folder, made if missing.
        timeout_s: how long a start or a crash recovery may take.

    Raises:
        ServerError: it cannot be started; the message ends with the last lines of its log.
    """
    place = Place.below(home)
    with _reported(place):
        answer = _ask(place)
        if answer.kind is _Kind.READY:
            return answer.url
        with _locked(place, timeout_s):
            return _bring_up(place, time.monotonic() + timeout_s)


def find(home: Path) -> str | None:
    """The URL of the server if it runs and answers; starts nothing and creates nothing.

    Raises:
        ServerError: the folder belongs to another user.
    """
    place = Place.below(home)
    with _reported(place):
        answer = _ask(place)
    return answer.url if answer.kind is _Kind.READY else None


def address(home: Path) -> str:
    """Where pg_dump, pg_restore and psql find the database, in libpq's words; the server is started where needed.

    It holds no password: the socket needs none, and on Windows it names the file with the password.

    Raises:
        ServerError: there is no embedded server in this home, or it does not start.
    """
    place = Place.below(home)
    with _reported(place):
        if not place.folder.exists():
            raise ServerError(
                f"there is no embedded PostgreSQL in {place.home} yet; make one with `bdense-weights server start`, "
                "or set BDENSE_HOME to where it is"
            )
    return ensure_running(home).replace("+psycopg2", "", 1)


def stop(home: Path, *, timeout_s: float = 60.0) -> bool:
    """Shut the server down, disconnecting its clients, and wait for its end.

    Returns:
        True if a server was running.

    Raises:
        ServerError: it did not end in time.
    """
    place = Place.below(home)
    with _reported(place):
        if not place.data.exists():
            return False
        with _locked(place, timeout_s):
            return postmaster.shut_down(place, timeout_s)


def status(home: Path) -> ServerStatus:
    """What is known of the server, without starting it."""
    place = Place.below(home)
    with _reported(place):
        answer = _ask(place)
        running = answer.kind is _Kind.READY
        recorded = postmaster.read_pid_file(place)
        return ServerStatus(
            running=running,
            url=answer.url if running else None,
            version=_server_version(answer.url) if running else postmaster.data_version(place),
            data_folder=place.data,
            pid=recorded.pid if recorded is not None and postmaster.is_alive(place, recorded) else None,
            log_path=place.log,
            problem=answer.reason or None,
        )


@contextmanager
def _reported(place: Place) -> Iterator[None]:
    """What the operating system refuses, as one line with a way out."""
    try:
        yield
    except OSError as error:
        raise ServerError(
            f"the embedded PostgreSQL cannot use {error.filename or place.folder}: {error.strerror or error}"
            f"{postmaster.disk_hint(place)}; make it readable and writable for this user, "
            "or set BDENSE_HOME to a folder that is"
        ) from error


@contextmanager
def _locked(place: Place, timeout_s: float) -> Iterator[None]:
    from filelock import FileLock, Timeout

    private_folder(place.home)
    lock = FileLock(place.home / "postgres.lock")
    try:
        lock.acquire(timeout=timeout_s + 30.0)  # longer than one start, so that waiting for another's pays
    except Timeout as error:
        raise ServerError(
            f"another process has been starting or stopping the server in {place.folder} for "
            f"{timeout_s + 30.0:.0f} s; end it, then try again"
        ) from error
    try:
        yield
    finally:
        lock.release()


# Asking a server


class _Kind(enum.Enum):
    READY = "it answered a query"
    NO_DATABASE = "it answered, but our database is missing"
    BUSY = "it is there, but takes no connection now"
    SILENT = "nothing listens"


@dataclass(frozen=True, slots=True)
class _Answer:
    kind: _Kind
    url: str = ""
    reason: str = ""


def _address(place: Place, recorded: PidFile) -> dict[str, str]:
    """The connection parameters, in libpq's words."""
    if recorded.socket_folder is not None:
        return {"host": str(recorded.socket_folder), "port": str(recorded.port)}
    return {"host": str(recorded.tcp_host), "port": str(recorded.port), "passfile": str(place.passfile)}


def _url(address: Mapping[str, str]) -> str:
    if "passfile" in address:
        query = f"passfile={quote(address['passfile'])}"
        return f"postgresql+psycopg2://{postmaster.ROLE}@{address['host']}:{address['port']}/{DATABASE}?{query}"
    query = f"host={quote(address['host'])}&port={address['port']}"
    return f"postgresql+psycopg2://{postmaster.ROLE}@/{DATABASE}?{query}"


def _ask(place: Place) -> _Answer:
    """Connect as recorded and run a query: the only proof that a server runs."""
    recorded = postmaster.read_pid_file(place)
    if recorded is None:
        return _Answer(_Kind.SILENT)
    if recorded.port is None or (recorded.socket_folder is None and recorded.tcp_host is None):
        return _Answer(_Kind.SILENT, reason=f"{place.data / 'postmaster.pid'} is incomplete")
    if not postmaster.is_guarded(place, recorded.socket_folder):
        return _Answer(_Kind.SILENT, reason=f"the socket's folder {recorded.socket_folder} is not this server's")
    import psycopg2

    address = _address(place, recorded)
    try:
        connection = psycopg2.connect(dbname=DATABASE, user=postmaster.ROLE, connect_timeout=5, **address)
    except psycopg2.OperationalError as error:
        return _refusal(str(error).strip())
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except psycopg2.OperationalError as error:  # stopped just now
        return _Answer(_Kind.BUSY, reason=str(error).strip())
    finally:
        connection.close()
    return _Answer(_Kind.READY, url=_url(address))


def _refusal(message: str) -> _Answer:
    # A failed connection carries no error code. The texts are English: initdb runs with --no-locale.
    if f'database "{DATABASE}" does not exist' in message:
        return _Answer(_Kind.NO_DATABASE, reason=message)
    # Whoever answers is alive, even where its process is invisible (another container): never start a second.
    if "FATAL" in message or "timeout expired" in message or "closed the connection" in message:
        return _Answer(_Kind.BUSY, reason=message)
    return _Answer(_Kind.SILENT, reason=message)


def _lost_its_socket(place: Place, recorded: PidFile) -> bool:
    """Whether a running server cannot be reached any more: its folder was renamed, or a cleaner came by."""
    folder = recorded.socket_folder
    if folder is None:
        return False
    return not postmaster.is_guarded(place, folder) or not (folder / f".s.PGSQL.{recorded.port}").exists()


def _server_version(url: str) -> str | None:
    import psycopg2

    try:
        connection = psycopg2.connect(url.replace("+psycopg2", "", 1), connect_timeout=5)
    except psycopg2.OperationalError:
        return None
    number = connection.server_version  # 180004 is 18.4
    connection.close()
    return f"{number // 10000}.{number % 10000}"


# Starting; the caller holds the lock


def _bring_up(place: Place, deadline: float) -> str:
    """Ask, do what the answer calls for, and ask again, until the server answers."""
    while True:
        answer = _ask(place)
        if answer.kind is _Kind.READY:
            return answer.url
        if time.monotonic() > deadline:
            raise ServerError(
                f"the embedded PostgreSQL in {place.data} gave no connection in time "
                f"({answer.reason or answer.kind.value}); "
                f"it may still be recovering: try again, or read {place.log}"
            )
        if answer.kind is _Kind.NO_DATABASE:
            _create_database(place)
        elif answer.kind is _Kind.SILENT:
            recorded = postmaster.read_pid_file(place)
            if recorded is None or not postmaster.is_alive(place, recorded):
                postmaster.start(place, deadline)
            elif recorded.ready and _lost_its_socket(place, recorded):
                postmaster.shut_down(place, deadline - time.monotonic())
        time.sleep(_POLL_S)


def _create_database(place: Place) -> None:
    import psycopg2
    from psycopg2 import errors, sql

    recorded = postmaster.read_pid_file(place)
    if recorded is None:
        return
    try:
        connection = psycopg2.connect(
            dbname="postgres", user=postmaster.ROLE, connect_timeout=5, **_address(place, recorded)
        )
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        finally:
            connection.close()
    except errors.DuplicateDatabase:
        pass  # there now, which is what was wanted
    except psycopg2.Error as error:
        raise ServerError(
            f"the embedded PostgreSQL in {place.data} runs, but cannot create the database {DATABASE!r} "
            f"({str(error).strip()}){postmaster.disk_hint(place)}; see {place.log}"
        ) from error
