"""The connection to PostgreSQL: its pool, one lock for each study, and patience while it does not answer."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import tenacity
from optuna.storages import RDBStorage
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from bdense_core.errors import BDenseError
from search.errors import StorageError
from search.settings import mask

T = TypeVar("T")
P = ParamSpec("P")

# Nobody waits for ever for a study's lock, and a launcher that is frozen while it holds it loses it.
_LIMITS = text(
    "SELECT set_config('lock_timeout', '120s', true), set_config('idle_in_transaction_session_timeout', '60s', true)"
)
_CONNECTION = {
    "connect_timeout": "10",
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
        patience_s: float = 0.0,
        hurry: threading.Event | None = None,
        revive: Callable[[], object] | None = None,
        on_outage: Callable[[float | None], object] | None = None,
    ) -> None:
        self._url = url
        self.patience_s = patience_s
        self.hurry = hurry or threading.Event()
        self.revive = revive
        self.on_outage = on_outage
        given = make_url(url).query.keys()
        options = {key: value for key, value in _CONNECTION.items() if key not in given}
        try:
            with _alone(url):  # two launchers must not make the tables at once
                self.storage = RDBStorage(
                    url,
                    engine_kwargs={
                        "connect_args": options, "pool_pre_ping": not patience_s, "pool_size": 3, "max_overflow": 3,
                        "pool_timeout": 30,
                    },
                )  # fmt: skip
        except (SQLAlchemyError, RuntimeError, AssertionError, UnicodeError) as error:
            raise StorageError(f"the database {self.address} cannot be used: {first_line(error)}") from error

    def __reduce__(self) -> NoReturn:
        raise TypeError("a database handle holds the password and is never pickled")

    def __repr__(self) -> str:
        return f"Database({self.address!r})"

    @property
    def address(self) -> str:
        """For people: without the password."""
        return mask(self._url)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A connection whose statements count together or not at all."""
        with self.storage.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator["Held"]:
        """One launcher at a time, on any machine: a PostgreSQL advisory lock on a study's name."""
        connection = self.storage.engine.connect()
        try:
            with contextlib.ExitStack() as released:
                released.callback(_let_go, connection)
                connection.execute(_LIMITS)
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(hashtext('bdense'), hashtext(:name))"), {"name": name}
                )
                yield Held(connection)
        finally:
            with contextlib.suppress(SQLAlchemyError):
                connection.close()

    def outlast(self, action: Callable[[], T], *, recovered: Callable[[], object] = lambda: None) -> T:
        """The action's result; while the database does not answer it is tried again, with `recovered` before it.

        Raises:
            StorageError: there was no answer within `patience_s`.
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
                    tried = attempt.retry_state
                    if tried.attempt_number > 1:
                        self._renew()
                        recovered()
                    result = action()
                    if tried.attempt_number > 1:
                        self._say_outage(time.monotonic() - tried.start_time)
                    return result
        except Exception as error:
            if not is_outage(error):
                raise
            self.storage.remove_session()
            raise StorageError(
                f"the database {self.address} does not answer: {first_line(error)}; what has ended is kept. "
                "Run the same command again once it is back"
            ) from error
        raise AssertionError("unreachable: an attempt returns or raises")

    def _renew(self) -> None:
        self.storage.remove_session()
        if self.revive is not None:
            with contextlib.suppress(BDenseError):
                self.revive()

    def _begin_outage(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1:
            self._say_outage(None)

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
    """Whether it may go away by waiting: no connection, a restart, a full disk of the server, a standby."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (OperationalError, InterfaceError)):
            return True
        if isinstance(cause, DBAPIError) and (cause.connection_invalidated or _is_read_only(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _is_read_only(error: DBAPIError) -> bool:
    return getattr(error.orig, "pgcode", None) == "25006"


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _let_go(connection: Connection) -> None:
    """End the transaction that holds the lock. If the connection is gone, so is the lock: what was done is done."""
    with contextlib.suppress(SQLAlchemyError):
        connection.commit()


@contextlib.contextmanager
def _alone(url: str) -> Iterator[Any]:
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": "10"})
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('bdense tables'))"))
        yield
