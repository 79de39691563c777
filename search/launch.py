"""One launch of a study, start to end: check, open, place, wait, tell."""

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bdense_core.errors import BDenseError
from search import dashboard, logs, ray_environment, server, trackers
from search.checkpoints import Checkpoints, Sweeper
from search.database import Database
from search.errors import StorageError
from search.logs import say
from search.metrics import Metrics
from search.places import check_writable
from search.preflight import files_of, preflight
from search.settings import Settings
from search.spec import Study, mutable_values
from search.storage import Studies, StudyStore

if TYPE_CHECKING:
    from search.nodes import NodeCheck
    from search.scheduling import Conductor
    from search.trackers.feed import Feed

_FIGURES_EVERY_S = 15.0
_FOR_FIGURES = 0.02
"""Share of a launcher's time: figures of thousands of trials take seconds, in which no trial starts."""

_LAST_WORDS_S = 5.0
"""What trackers get for what is left, once the cluster is gone."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended."""

    store: StudyStore
    interrupted: bool
    given_back: int = 0


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


def found_studies(settings: Settings) -> Studies:
    """The studies of the database that there is.

    Raises:
        StorageError: there is none yet, or it cannot be used.
    """
    return Studies(Database(found_storage_url(settings), called=_called(settings)))


def _called(settings: Settings) -> str | None:
    return None if settings.storage else f"the embedded PostgreSQL of {settings.home}"


def stored_study(name: str, settings: Settings) -> Study | None:
    """The study of that name if there is one; nothing is started or made for looking, but an embedded server.

    Raises:
        StorageError: the database cannot be used.
    """
    if settings.storage is None and not settings.postgres.exists():
        return None
    studies = found_studies(settings)
    try:
        return studies.open(name).study if name in studies.names() else None
    finally:
        studies.database.close()


def launch(
    study: Study,
    settings: Settings,
    *,
    with_dashboard: bool,
    dashboard_port: int,
    metrics_port: int | None = None,
    tracked_by: Sequence[str] = (),
    said: Collection[str] | None = None,
) -> Outcome:
    """Create or resume the study and run what is missing.

    Args:
        said: as for `Studies.create_or_resume`.
        tracked_by: some of `trackers.NAMES`.

    Raises:
        BDenseError: whatever stopped it; finished trials are kept.
    """
    trackers.check(tracked_by)
    preflight(study, settings)
    ray_environment.check_reachable(settings.ray_address)
    metrics = Metrics(study.name)
    with contextlib.ExitStack() as stack:
        if metrics_port is not None:
            say(f"metrics: {stack.enter_context(metrics.served(metrics_port))}")
        url = storage_url(settings)
        store = _open(study, url, settings, said)
        stop_seen = store.follow().stop
        if store.is_done():
            _sweep(store, settings)
            what = "all runs" if study.spec.comparison else f"{store.study.spec.budget.trials} trials and all controls"
            say(f"nothing left to do: {what} have ended")
            return Outcome(store=store, interrupted=False)
        if with_dashboard:
            say(f"dashboard: {stack.enter_context(dashboard.running(url, port=dashboard_port))}")
        return _run(store, settings, metrics, tracked_by, stop_seen)


def _open(study: Study, url: str, settings: Settings, said: Collection[str] | None) -> StudyStore:
    """The study in the database, with whatever an earlier launch lost back in its queue."""
    patience_s = study.spec.lease.outage_s
    database = Database(url, called=_called(settings), patience_s=patience_s, revive=_revive(settings))
    store = Studies(database).create_or_resume(study, said=said)
    database.patience_s = store.study.spec.lease.outage_s  # as it was set, perhaps
    say(f"study {study.name} in {database.address}")
    for key, value in store.kept.items():
        say(f"{key} stays {json.dumps(value)}, as it was set; `bdense-weights set` changes it")
    for key, value in store.changed.items():
        say(f"{key}: {json.dumps(value)} -> {json.dumps(mutable_values(store.study)[key])}, as this launch says")
    if lost := store.trials.reap().lost:
        say(f"{lost} lost trial(s) of an earlier launch put back into the queue")
    return store


def _sweep(store: StudyStore, settings: Settings) -> None:
    """What a launch that was killed at its very end left."""
    if (kept_at := checkpoints(store.study, settings)) is not None:
        Sweeper(kept_at, store.key, store.done_with).finish()


def _revive(settings: Settings) -> Callable[[], object] | None:
    """How to bring the database back: the embedded server by starting it; another is not ours to start."""
    return None if settings.storage else lambda: server.ensure_running(settings.home)


def checkpoints(study: Study, settings: Settings) -> Checkpoints | None:
    """Where the study's running trials keep their state."""
    section = study.spec.checkpoints
    return Checkpoints(section.url or settings.checkpoints) if section.enabled else None


def _run(store: StudyStore, settings: Settings, metrics: Metrics, tracked_by: Sequence[str], stop_seen: str) -> Outcome:
    ray_environment.prepare(settings.ray_address)
    from search import placement
    from search.progress import Board
    from search.scheduling import AskOptuna, CarryDecisions, Conductor, every

    study = store.study
    kept_at = checkpoints(study, settings)
    if kept_at is not None:
        settings.create(settings.checkpoints)
        kept_at.prepare()
    if study.spec.cache.enabled and (url := study.spec.cache.url) is not None:
        check_writable(url, "cache.url")
    with trackers.opened(tracked_by, store, settings) as tracked, _cluster(settings.ray_address):
        logs.gather()
        nodes = _node_check(study, settings, kept_at)
        places = placement.Places(study.spec.resources)
        board = Board(
            study=study.name,
            metric=study.metric,
            trials=study.spec.budget.trials,
            controls=len(study.fixed_runs()),
            trial_runs=len(study.trial_seeds()),
            control_runs=1 if study.spec.comparison else len(study.control_seeds()),
            slots=places.total(),
            is_comparison=study.spec.comparison is not None,
            listeners=[metrics, *tracked],
        )
        board.refresh(store.rows(), store.counts())
        store.database.on_outage = board.outage
        conductor = Conductor(
            store, board, places, nodes, cache_root=settings.cache, checkpoints=kept_at, stop_seen=stop_seen
        )
        figures = every(_FIGURES_EVERY_S, lambda: _save_figures(store), at_most=_FOR_FIGURES)

        def tick() -> None:
            conductor.tick()
            if not conductor.stopping():
                figures()

        try:
            with board, _stops_on_interrupt(conductor, store.database.hurry):
                placement.run_all(
                    AskOptuna(conductor),
                    CarryDecisions(conductor, places),
                    study.spec.resources,
                    folder=settings.create(settings.ray),
                    stop_asked=conductor.stopping,
                    on_loss=lambda: _leave(conductor, tracked),
                    tick=tick,
                )
        except KeyboardInterrupt:
            conductor.stop_requested = True
        finally:
            given_back = conductor.give_back_all()
        if conductor.fatal:
            raise BDenseError(f"{conductor.fatal}. Stopped; finished trials are kept")
        _save_figures(store)
        return Outcome(
            store=store,
            interrupted=conductor.stop_requested and not store.is_done(),
            given_back=given_back,
        )


def _node_check(study: Study, settings: Settings, kept_at: Checkpoints | None) -> "NodeCheck | None":
    """Whether all nodes of a cluster run this code, and see what trials need; asked for the first time."""
    from search.nodes import NodeCheck

    if settings.ray_address is None:
        return None
    keeps_cache_here = study.spec.method.needs_teacher and study.spec.cache.url is None
    folders = [settings.create(settings.cache)] if keeps_cache_here else []
    if kept_at is not None and "://" not in kept_at.root:
        folders.append(Path(kept_at.root))
    check = NodeCheck(study.spec.resources, files=files_of(study), folders=folders)
    for warning in check.run():
        say(f"warning: {warning}", level=logging.WARNING)
    return check


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    from search import placement

    with contextlib.ExitStack() as stack:
        with ray_environment.without_password():
            stack.enter_context(placement.cluster(address))
        stack.enter_context(contextlib.redirect_stdout(logs.Printed()))  # Ray tells of nodes that died, in print
        yield


def _leave(conductor: "Conductor", tracked: Sequence["Feed"]) -> None:
    """The cluster is gone and Ray Tune hangs on it: give everything back and end the process, whatever happens."""
    try:
        conductor.hurry()
        given_back = conductor.give_back_all()
        say(
            f"error: the Ray cluster went away; {given_back} running trial(s) went back into the queue. "
            "Run the same command again",
            level=logging.ERROR,
        )
        trackers.finish(tracked, within_s=_LAST_WORDS_S)
    finally:
        os._exit(1)


@contextlib.contextmanager
def _stops_on_interrupt(conductor: "Conductor", hurry: threading.Event) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for a clean end, the second one ends at once. No database is waited for then."""

    def ask(_signal: int, _frame: object) -> None:
        if conductor.stop_requested:
            raise KeyboardInterrupt
        conductor.stop_requested = True
        hurry.set()
        say("stopping: running trials keep their state and go back into the queue (once more to stop at once)")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _save_figures(store: StudyStore) -> None:
    from search import figures

    try:
        store.database.outlast(lambda: figures.save_to_dashboard(store))
    except StorageError as error:  # the conductor meets the same trouble, and decides
        log.warning("the dashboard's figures were not renewed: %s", error)
