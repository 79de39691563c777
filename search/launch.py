"""One launch of a study, start to end: check, open, place, wait, tell."""

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdense_core.errors import BDenseError
from search import dashboard, ray_environment, server
from search.errors import StorageError
from search.preflight import preflight
from search.settings import Settings, mask
from search.spec import Study
from search.storage import Database, StudyStore

if TYPE_CHECKING:
    from search.scheduling import Conductor

_FIGURES_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended."""

    store: StudyStore
    interrupted: bool
    given_back: int


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def storage_url(settings: Settings) -> str:
    """The given database, or the embedded one, started if need be.

    Raises:
        ServerError: the embedded server does not start.
    """
    return settings.storage or server.ensure_running(settings.home)


def found_storage_url(settings: Settings) -> str:
    """As `storage_url`, but a machine that never had an embedded server does not get one by looking.

    Raises:
        StorageError: there is no database yet.
    """
    if settings.storage is None and not settings.postgres.exists():
        raise StorageError(
            f"there is no embedded database in {settings.home} yet; launch a study first, "
            "or name a database with --storage or OPTUNA_STORAGE"
        )
    return storage_url(settings)


def launch(study: Study, settings: Settings, *, with_dashboard: bool, dashboard_port: int) -> Outcome:
    """Create or resume the study and run what is missing.

    Raises:
        BDenseError: whatever stopped it; finished trials are kept.
    """
    preflight(study, settings)
    ray_environment.check_reachable(settings.ray_address)
    url = storage_url(settings)
    lease = study.spec.lease
    database = Database(url, heartbeat_s=lease.heartbeat_s, grace_s=lease.grace_s, max_retries=lease.max_retries)
    store = database.create_or_resume(study)
    place = mask(url) if settings.storage else f"the embedded PostgreSQL of {settings.home}"
    say(f"study {study.name} in {place}")
    if lost := store.reap():
        say(f"{lost} lost trial(s) of an earlier launch put back into the queue")
    if store.is_done():
        say(f"nothing left to do: {study.spec.budget.trials} trials and all controls have ended")
        return Outcome(store=store, interrupted=False, given_back=0)
    with contextlib.ExitStack() as stack:
        if with_dashboard:
            address = stack.enter_context(dashboard.running(url, port=dashboard_port))
            say(f"dashboard: {address}")
        return _run(store, settings)


def _run(store: StudyStore, settings: Settings) -> Outcome:
    ray_environment.prepare(settings.ray_address)
    from search import placement
    from search.progress import Board
    from search.scheduling import AskOptuna, CarryDecisions, Conductor

    study = store.study
    with placement.cluster(settings.ray_address):
        slots = placement.slots(study.spec.resources)
        board = Board(
            metric=study.metric,
            trials=study.spec.budget.trials,
            controls=len(study.controls()),
            control_runs=study.spec.seeds.control_repeats,
            slots=slots,
        )
        board.resume(store.rows(), store.counts())
        conductor = Conductor(
            store, board, slots=slots, cache_root=settings.cache, max_failures=study.spec.budget.max_failures
        )
        try:
            with board, _stops_on_interrupt(conductor):
                placement.run_all(
                    AskOptuna(conductor),
                    CarryDecisions(conductor),
                    study.spec.resources,
                    folder=settings.create(settings.ray),
                    stop_asked=conductor.stopping,
                    on_loss=lambda: _leave(conductor),
                    tick=_both(conductor.tick, _every(_FIGURES_EVERY_S, lambda: _save_figures(store))),
                )
        except KeyboardInterrupt:
            conductor.stop_requested = True
        finally:
            given_back = conductor.give_back_all()
        _save_figures(store)
        if conductor.fatal:
            raise BDenseError(f"{conductor.fatal}. Stopped; finished trials are kept")
        return Outcome(store=store, interrupted=conductor.stop_requested, given_back=given_back)


def _leave(conductor: "Conductor") -> None:
    """The cluster is gone and Ray Tune hangs on it: give everything back and end the process."""
    given_back = conductor.give_back_all()
    say(
        f"error: the Ray cluster went away; {given_back} running trial(s) went back into the queue. "
        "Run the same command again"
    )
    os._exit(1)


@contextlib.contextmanager
def _stops_on_interrupt(conductor: "Conductor") -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for a clean end, the second one ends at once."""

    def ask(_signal: int, _frame: object) -> None:
        if conductor.stop_requested:
            raise KeyboardInterrupt
        conductor.stop_requested = True
        say("stopping: running trials go back into the queue (once more to stop at once)")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _save_figures(store: StudyStore) -> None:
    from search import figures

    figures.save_to_dashboard(store)


def _every(seconds: float, action: Any) -> Any:
    """A callable that runs `action` at most once in so many seconds."""
    last = time.monotonic()

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            action()
            last = time.monotonic()

    return tick


def _both(first: Callable[[set[str]], None], second: Callable[[], None]) -> Callable[[set[str]], None]:
    def tick(pending: set[str]) -> None:
        first(pending)
        second()

    return tick


def export_command(study: str, storage: str | None) -> str:
    """The command that exports a study, as this user can type it; `storage` is the option that was given."""
    program = "bdense-weights"
    if shutil.which(program) is None:
        program = shlex.quote(str(Path(sys.executable).parent / program))
    command = f"{program} export --study {shlex.quote(study)}"
    if storage is None:
        return command
    if mask(storage) != storage:
        return f"{command}  # with OPTUNA_STORAGE set to the database you gave"
    return f"{command} --storage {shlex.quote(storage)}"
