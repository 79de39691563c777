"""The connection to PostgreSQL: its pool, one lock for each study, and patience while it does not answer."""

import contextlib
import functools
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import psycopg2
import tenacity
from psycopg2 import extensions
from sqlalchemy import Connection, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from bdense_core.errors import BDenseError
from search.errors import StorageError, StudyNotFound
from search.quick_storage import QuickStorage
from search.settings import mask

T = TypeVar("T")
P = ParamSpec("P")

IS_GONE = "the study is gone: somebody deleted it"
_NO_SUCH_ROW = "23503"
"""PostgreSQL's name for a row that would point to one that is not there."""

# Nobody waits for ever for a study's lock, and a launcher that is frozen while it holds it loses it.
_LOCK_S = 120
_LOCK_TIMEOUT = text("SELECT set_config('lock_timeout', :lock, true)")
_IDLE_S = 60
"""How long a transaction may do nothing: a launcher that is frozen in one must not keep its rows from the others."""
_LOCK = text("SELECT pg_advisory_xact_lock(hashtext(:space), hashtext(:name))")
_CONNECT_S = 10
"""How long a connection may take to be made, unless the URL's `connect_timeout` says otherwise."""
_STATEMENT_S = 150
"""How long a statement may go without an answer: longer than waiting for a lock, which is an answer in the end."""
_WAKE_S = 0.5
_CONNECTION = {
    "connect_timeout": str(_CONNECT_S),
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "application_name": "bdense",
}
"""libpq's options, unless the URL gives them: a host that vanished is noticed within a minute or so."""


class Database:
    """A PostgreSQL that holds Optuna's tables; they are made where they are missing.

    Args:
        url: `postgresql+psycopg2://...`; what it leaves out comes from libpq's environment and password file.
        called: how people know it; None: by its URL, without the password.
        patience_s: how long the operations that are `outlasting` wait for a database that does not answer.
        hurry: ends that wait.
        revive: tried before each new attempt, to bring the database back; it may fail with a `BDenseError`.
        on_outage: told None when the database stops answering, and how many seconds that took once it is back.

    Raises:
        StorageError: it cannot be reached, or holds something else.
    """

    def __init__(
        self,
        url: str,
        *,
        called: str | None = None,
        patience_s: float = 0.0,
        hurry: threading.Event | None = None,
        revive: Callable[[], object] | None = None,
        on_outage: Callable[[float | None], object] | None = None,
    ) -> None:
        self.address = called or f"the database {mask(url)}"
        """For people: without the password."""
        self.patience_s = patience_s
        self.hurry = hurry or threading.Event()
        self.revive = revive
        self.on_outage = on_outage
        extensions.set_wait_callback(_wait)
        given = make_url(url).query.keys()
        options = {key: value for key, value in _CONNECTION.items() if key not in given}
        try:
            with _alone(url, options):  # two launchers must not make the tables at once
                self.storage = QuickStorage(
                    url,
                    engine_kwargs={
                        "connect_args": options, "pool_pre_ping": not patience_s, "pool_size": 3, "max_overflow": 3,
                        "pool_timeout": 30,
                    },
                )  # fmt: skip
                event.listen(self.storage.engine, "connect", _limit_idleness)
                self.storage.engine.dispose()  # what it has opened so far has no such limit
        except (SQLAlchemyError, RuntimeError, AssertionError, UnicodeError) as error:
            raise StorageError(f"{self.address} cannot be used: {first_line(error)}") from error

    def __reduce__(self) -> NoReturn:
        raise TypeError("a database handle holds the password and is never pickled")

    def __repr__(self) -> str:
        return f"Database({self.address!r})"

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A connection whose statements count together or not at all."""
        with self.storage.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator["Held"]:
        """One launcher at a time, on any machine: a PostgreSQL advisory lock on a study's name.

        Raises:
            StorageError: somebody else holds it for too long.
        """
        connection = self.storage.engine.connect()
        try:
            _lock(connection, "bdense", name, f"study {name!r}")
            yield Held(connection)
        except BaseException as error:
            if is_outage(error) or not isinstance(error, Exception):  # no more words with a server that may be frozen
                connection.invalidate()
            raise
        finally:
            _let_go(connection)

    def outlast(self, action: Callable[[], T], *, recovered: Callable[[], object] = lambda: None) -> T:
        """The action's result; while the database does not answer it is tried again, with `recovered` before it.

        Raises:
            StorageError: there was no answer within `patience_s`.
            StudyNotFound: somebody deleted the study meanwhile.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_outage),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
            stop=tenacity.stop_after_delay(self.patience_s) | tenacity.stop_when_event_set(self.hurry),
            sleep=tenacity.sleep_using_event(self.hurry),
            before_sleep=self._begin_outage,
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        self._renew()
                        recovered()
                    result = action()
                    self._end_outage(attempt.retry_state)
                    return result
        except Exception as error:
            if is_outage(error):
                self.storage.remove_session()
                raise StorageError(
                    f"{self.address} does not answer: {first_line(error)}; what has ended is kept. "
                    "Run the same command again once it is back"
                ) from error
            self._end_outage(attempt.retry_state)
            if _is_gone(error):
                raise StudyNotFound(IS_GONE) from error
            raise
        raise AssertionError("unreachable: an attempt returns or raises")

    def _renew(self) -> None:
        self.storage.remove_session()
        if self.revive is not None:
            with contextlib.suppress(BDenseError):
                self.revive()

    def _begin_outage(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1:
            self._say_outage(None)

    def _end_outage(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number > 1:
            self._say_outage(time.monotonic() - state.start_time)

    def _say_outage(self, seconds: float | None) -> None:
        if self.on_outage is not None:
            self.on_outage(seconds)

    def close(self) -> None:
        self.storage.remove_session()
        self.storage.engine.dispose()


class Held:
    """A study's lock while it is held."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def check(self) -> None:
        """Fails as a lost connection does if the lock is gone: whoever was frozen for long must not go on."""
        self._connection.execute(text("SELECT 1"))


class _Patient(Protocol):
    @property
    def database(self) -> Database: ...

    def recovered(self) -> None: ...


S = TypeVar("S", bound=_Patient)


def outlasting(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method that may be repeated, and is, while its `database` does not answer; `recovered` comes first then."""

    @functools.wraps(method)
    def patient(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.database.outlast(lambda: method(self, *args, **kwargs), recovered=self.recovered)

    return patient


def is_outage(error: BaseException) -> bool:
    """Whether it may go away by waiting: no connection, a restart, a full disk of the server, a standby.

    An interrupt is none, nor is what we have made of an outage ourselves: that has been waited for.
    """
    cause: BaseException | None = error if isinstance(error, Exception) else None
    while cause is not None and not isinstance(cause, StorageError):
        if isinstance(cause, (OperationalError, InterfaceError)):
            return True
        if isinstance(cause, DBAPIError) and (cause.connection_invalidated or _sqlstate(cause) == "25006"):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "pgcode", None)


def _is_gone(error: Exception) -> bool:
    """Whether it is what Optuna or PostgreSQL says of a study, or of a trial of it, that was deleted."""
    if isinstance(error, IntegrityError):
        return _sqlstate(error) == _NO_SUCH_ROW
    return isinstance(error, KeyError) and error.args == ("Record does not exist.",)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _let_go(connection: Connection) -> None:
    """End the transaction that holds the lock. If the connection is gone, so is the lock: what was done is done."""
    with contextlib.suppress(SQLAlchemyError):
        connection.commit()
    with contextlib.suppress(SQLAlchemyError):
        connection.close()


def _limit_idleness(connection: Any, _record: object) -> None:
    """For each new connection. By a statement: poolers refuse the startup parameter."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_S}s'")
    connection.commit()


def _lock(connection: Connection, space: str, name: str, what: str) -> None:
    """Take a lock until the transaction's end."""
    try:
        connection.execute(_LOCK_TIMEOUT, {"lock": f"{_LOCK_S}s"})
        connection.execute(_LOCK, {"space": space, "name": name})
    except OperationalError as error:
        if _sqlstate(error) != "55P03":
            raise
        raise StorageError(
            f"another launcher holds the lock of {what} for more than {_LOCK_S} s; "
            "run the same command again once it is done, or end it"
        ) from error


@contextlib.contextmanager
def _alone(url: str, options: dict[str, str]) -> Iterator[None]:
    engine = create_engine(url, poolclass=NullPool, connect_args=options)
    event.listen(engine, "connect", _limit_idleness)
    with engine.begin() as connection:
        _lock(connection, "bdense tables", "", "the database's tables")
        yield


def _wait(connection: extensions.connection) -> None:
    """Wait for the server as psycopg2 would, but let signals in and give up on a server that is frozen.

    It is asked for every connection of the process; psycopg2 closes the connection when it raises.
    """
    settled = (extensions.STATUS_READY, extensions.STATUS_BEGIN, extensions.STATUS_PREPARED)
    limit = _STATEMENT_S if connection.status in settled else _connect_limit(connection)
    deadline = time.monotonic() + limit
    while (state := connection.poll()) != extensions.POLL_OK:
        with selectors.DefaultSelector() as selector:
            selector.register(connection, _EVENTS[state])
            is_ready = selector.select(min(_WAKE_S, limit))
        if not is_ready and time.monotonic() > deadline:
            raise psycopg2.OperationalError(f"timeout expired: the server is silent for {limit:g} s")


_EVENTS = {extensions.POLL_READ: selectors.EVENT_READ, extensions.POLL_WRITE: selectors.EVENT_WRITE}


def _connect_limit(connection: extensions.connection) -> float:
    """The connection's own, since libpq heeds it in connections that block only."""
    return float(extensions.parse_dsn(connection.dsn).get("connect_timeout", _CONNECT_S)) or _CONNECT_S
