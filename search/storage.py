"""The only file that speaks to the database: studies, trials, and the leases of running trials.

A trial's states are Optuna's own:

    WAITING --claim--> RUNNING --complete--> COMPLETE
       ^                  |-----prune------> PRUNED
       |                  |-----fail-------> FAIL
       +----give back-----+-----expire-----> FAIL, and a new WAITING row that links to the first

A RUNNING trial has a lease: an owner, and a heartbeat that follows its progress. Whoever lost it gets
`LeaseLost`, and the result is dropped.
"""

import contextlib
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from bdense_core.files import sha256_of
from bdense_core.weights import shares
from search.errors import LeaseLost, StorageError, StudyExists, StudyNotFound
from search.records import CONTROL, SEARCH, Claim, Counts, Row, StudySummary, count
from search.samplers import make_pruner, make_sampler
from search.settings import mask
from search.spec import Study, differences
from search.version import code_version

_SPEC, _SPEC_HASH, _CODE, _CREATED = "bdense:spec", "bdense:spec_sha256", "bdense:code_version", "bdense:created"
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)

warnings.filterwarnings("ignore", category=ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")
logging.getLogger("optuna").setLevel(logging.WARNING)


@dataclass
class Database:
    """A PostgreSQL that holds studies.

    Raises:
        StorageError: it cannot be reached, or holds something else.
    """

    url: str = field(repr=False)
    heartbeat_s: int = 15
    grace_s: int = 180
    max_retries: int = 2

    def __post_init__(self) -> None:
        self._retry = RetryHeartbeatStaleTrialCallback(max_retry=self.max_retries)
        try:
            self.storage = RDBStorage(
                self.url,
                engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}},
                heartbeat_interval=self.heartbeat_s,
                grace_period=self.grace_s,
                heartbeat_stale_trial_callback=self._retry,
            )
        except (SQLAlchemyError, RuntimeError, AssertionError, UnicodeError) as error:
            raise StorageError(f"the database {mask(self.url)} cannot be used: {_first_line(error)}") from error

    def names(self) -> list[str]:
        """All studies' names."""
        return sorted(study.study_name for study in self.storage.get_all_studies())

    def create_or_resume(self, study: Study) -> "StudyStore":
        """The study of that name: new, or the stored one when its settings agree.

        Raises:
            StudyExists: the name is taken with other settings; nothing was changed.
        """
        with self.exclusive(study.name):
            if study.name in self.names():
                store = self.open(study.name)
                if different := differences(store.stored_spec, study.to_dict()):
                    raise StudyExists(
                        f"study {study.name!r} exists with other settings ({'; '.join(different)}); nothing was "
                        "changed. Use another --study NAME, or the stored settings"
                    )
                store.study = study
            else:
                optuna_study = optuna.create_study(storage=self.storage, study_name=study.name, direction="minimize")
                optuna_study.set_metric_names([study.metric])
                optuna_study.set_user_attr(_CODE, code_version())
                optuna_study.set_user_attr(_CREATED, datetime.now().astimezone().isoformat(timespec="seconds"))
                optuna_study.set_user_attr(_SPEC_HASH, study.sha256())
                store = StudyStore(self, optuna_study, study)
            store.save_spec()
            store.enqueue_missing_controls()
            return store

    def open(self, name: str) -> "StudyStore":
        """A stored study.

        Raises:
            StudyNotFound: no study of that name of ours; the message lists those there are.
        """
        try:
            optuna_study = optuna.load_study(study_name=name, storage=self.storage)
        except KeyError as error:
            known = ", ".join(self.names()) or "none yet"
            raise StudyNotFound(f"there is no study {name!r} in {mask(self.url)}; known studies: {known}") from error
        stored = optuna_study.user_attrs.get(_SPEC)
        if stored is None:
            raise StudyNotFound(f"study {name!r} was not made by this service; it has no specification")
        return StudyStore(self, optuna_study, Study.from_dict(stored))

    def ours(self) -> list["StudyStore"]:
        """All studies that this service made; a database may hold others' too."""
        stored = self.storage.get_all_studies()
        return [self.open(study.study_name) for study in stored if _SPEC in study.user_attrs]

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """One launcher at a time, on any machine: a PostgreSQL advisory lock on the study's name."""
        with self.storage.engine.begin() as connection:
            connection.execute(
                text("SELECT pg_advisory_xact_lock(hashtext('bdense'), hashtext(:name))"), {"name": name}
            )
            yield

    def close(self) -> None:
        self.storage.remove_session()
        self.storage.engine.dispose()


class StudyStore:
    """One study in the database."""

    def __init__(self, database: Database, optuna_study: optuna.Study, study: Study) -> None:
        self.study = study
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{int(psutil.Process().create_time())}"
        self._database = database
        self._optuna = optuna_study
        self._optuna.pruner = make_pruner(study)
        self._live: dict[int, optuna.trial.Trial] = {}

    # -- the study

    @property
    def name(self) -> str:
        return self._optuna.study_name

    @property
    def optuna_study(self) -> optuna.Study:
        """For the dashboard's figures."""
        return self._optuna

    @property
    def stored_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self._optuna.user_attrs[_SPEC]
        return spec

    def save_spec(self) -> None:
        """Store the resolved study, with whatever a new launch may change in it."""
        if self._optuna.user_attrs.get(_SPEC) != self.study.to_dict():
            self._optuna.set_user_attr(_SPEC, self.study.to_dict())

    def provenance(self) -> dict[str, str | None]:
        attributes = self._optuna.user_attrs
        return {
            "spec_sha256": attributes.get(_SPEC_HASH),
            "teacher_sha256": self.study.teacher.sha256 if self.study.teacher else None,
            "code_version": attributes.get(_CODE),
            "created": attributes.get(_CREATED),
        }

    def summary(self) -> StudySummary:
        rows = self.rows()
        finished = [row.value for row in rows if row.is_search and row.state == "COMPLETE" and row.value is not None]
        return StudySummary(
            name=self.name,
            metric=self.study.metric,
            counts=count(rows),
            best=min(finished, default=None),
            created=str(self.provenance()["created"]),
        )

    def enqueue_missing_controls(self) -> None:
        """Put every control that neither ran nor waits into the queue."""
        present = {row.role for row in self.rows() if row.state != "FAIL" or row.is_final}
        for name, weights in self.study.controls().items():
            role = CONTROL + name
            if role not in present:
                attributes: dict[str, Any] = {
                    "role": role,
                    "weights": list(weights),
                    "seeds": list(self.study.control_seeds()),
                }
                space = self.study.spec.space
                if shown := space.params_of(weights, within_ranges=False):
                    attributes["params"] = shown
                self._optuna.enqueue_trial(space.params_of(weights) or {}, user_attrs=attributes)

    # -- a trial's life

    def claim(self) -> Claim | None:
        """The next trial to run, now RUNNING and ours; None when nothing is left to start.

        Under the study's lock, so that N asked trials are N run trials from any number of launchers.
        """
        with self._database.exclusive(self.name):
            rows = self.rows()
            taken = [row for row in rows if row.is_search and row.state in ("COMPLETE", "PRUNED", "RUNNING", "WAITING")]
            waiting = any(row.state == "WAITING" for row in rows)
            if not waiting and len(taken) >= self.study.spec.budget.trials:
                return None
            self._optuna.sampler = make_sampler(self.study, len(rows))
            trial = self._optuna.ask()
            self._beat(trial)
            trial.set_user_attr("owner", self.owner)
            return self._take(trial)

    def _take(self, trial: optuna.trial.Trial) -> Claim:
        role = trial.user_attrs.get("role", SEARCH)
        stored = self._database.storage.get_trial(trial._trial_id)
        params = self._suggest(trial) if role == SEARCH or _has_params(stored) else {}
        weights = trial.user_attrs.get("weights") or self.study.spec.space.weights(params, self.study.num_branches)
        attributes = {
            "role": role,
            "weights": list(weights),
            "shares": [round(share, 6) for share in shares(weights)],
            "seeds": trial.user_attrs.get("seeds") or [self.study.spec.seeds.training],
            "protocol": protocol_hash(self.study),
        }
        for key, value in attributes.items():
            if trial.user_attrs.get(key) != value:
                trial.set_user_attr(key, value)
        self._live[trial.number] = trial
        return Claim(
            number=trial.number,
            role=role,
            weights=tuple(weights),
            seeds=tuple(attributes["seeds"]),
            reported=tuple(sorted(stored.intermediate_values)),
        )

    def _suggest(self, trial: optuna.trial.Trial) -> dict[str, float]:
        axes = self.study.spec.space.axes()
        return {name: trial.suggest_float(name, low, high) for name, (low, high) in axes.items()}

    def beat(self, number: int) -> None:
        """The trial made progress: its lease lives on."""
        if number in self._live:
            self._beat(self._live[number])

    def _beat(self, trial: optuna.trial.Trial) -> None:
        self._database.storage.record_heartbeat(trial._trial_id)

    def report(self, number: int, value: float, step: int, *, may_prune: bool) -> bool:
        """Store an intermediate value; True if the pruner says stop.

        Raises:
            LeaseLost: the trial is no longer ours.
        """
        trial = self._owned(number)
        with _late(number):
            trial.report(value, step)
            self._beat(trial)
            return may_prune and trial.should_prune()

    def complete(self, number: int, value: float, repeats: Sequence[tuple[int, int, float]] = ()) -> None:
        """The trial ended with its result, and its scores (seed, kimg, value) on further seeds, if it ran on such.

        Raises:
            LeaseLost: the trial is no longer ours; nothing was stored.
        """
        trial = self._owned(number)
        with _late(number):
            if repeats:
                trial.set_user_attr("repeats", [list(score) for score in repeats])
            self._optuna.tell(trial, value)
        del self._live[number]

    def prune(self, number: int) -> None:
        """The trial was stopped by the pruner; its last report is its value.

        Raises:
            LeaseLost: the trial is no longer ours; nothing was stored.
        """
        trial = self._owned(number)
        with _late(number):
            self._optuna.tell(trial, state=TrialState.PRUNED)
        del self._live[number]

    def fail(self, number: int, reason: str, *, retry: bool) -> None:
        """The trial failed; with `retry`, the same proposal waits again, a bounded number of times.

        Raises:
            LeaseLost: the trial is no longer ours; nothing was stored.
        """
        trial = self._owned(number)
        with _late(number):
            self._expire(trial._trial_id, reason, retry=retry)
        del self._live[number]

    def give_back(self, number: int) -> None:
        """Back into the queue, as it is: whoever claims it next goes on with the same proposal."""
        with contextlib.suppress(LeaseLost), _late(number):
            trial = self._owned(number)
            self._database.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        self._live.pop(number, None)

    def _owned(self, number: int) -> optuna.trial.Trial:
        trial = self._live.get(number)
        if trial is not None:
            stored = self._database.storage.get_trial(trial._trial_id)
            if stored.state == TrialState.RUNNING and stored.user_attrs.get("owner") == self.owner:
                return trial
        self._live.pop(number, None)
        raise LeaseLost(f"trial {number} is no longer owned by this launcher; its result is dropped")

    # -- lost trials

    def reap(self) -> int:
        """Fail the RUNNING trials without a live owner and queue their proposals again; how many there were.

        Lost are trials whose heartbeat is older than the grace period, and trials of a launcher of this
        machine whose process is gone. Rows that never had a heartbeat get one, and then the same grace.
        """
        with self._database.exclusive(self.name):  # a claim in another launcher is RUNNING before its first heartbeat
            before = self._optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            optuna.storages.fail_stale_trials(self._optuna)
            for trial in before:
                owner = trial.user_attrs.get("owner")
                if owner and _is_dead_here(owner) and self._is_running(trial):
                    self._expire(trial._trial_id, "its launcher ended without giving it back", retry=True)
                elif not self._has_heartbeat(trial) and _age(trial) > timedelta(seconds=self._database.grace_s):
                    self._database.storage.record_heartbeat(trial._trial_id)
        return sum(self._database.storage.get_trial(trial._trial_id).state == TrialState.FAIL for trial in before)

    def _expire(self, trial_id: int, reason: str, *, retry: bool) -> None:
        storage = self._database.storage
        storage.set_trial_user_attr(trial_id, "reason", reason)
        storage.set_trial_user_attr(trial_id, "final", not retry)
        if storage.set_trial_state_values(trial_id, TrialState.FAIL) and retry:
            self._database._retry(self._optuna, storage.get_trial(trial_id))

    def _is_running(self, trial: FrozenTrial) -> bool:
        return self._database.storage.get_trial(trial._trial_id).state == TrialState.RUNNING

    def _has_heartbeat(self, trial: FrozenTrial) -> bool:
        with self._database.storage.engine.connect() as connection:
            query = text("SELECT 1 FROM trial_heartbeats WHERE trial_id = :id")
            return connection.execute(query, {"id": trial._trial_id}).first() is not None

    # -- what there is

    def rows(self) -> list[Row]:
        """Every trial, by number."""
        return [_row(trial) for trial in self._optuna.get_trials(deepcopy=False)]

    def counts(self) -> Counts:
        return count(self.rows())


def protocol_hash(study: Study) -> str:
    """What a study's values may be compared with: only values of the same hash."""
    if study.evaluation is None:
        return sha256_of({"metric": study.metric})[:16]
    return study.evaluation.protocol.hash()[:16]


def _row(trial: FrozenTrial) -> Row:
    attributes = trial.user_attrs
    finite = {step: value for step, value in trial.intermediate_values.items() if math.isfinite(value)}
    duration = trial.duration.total_seconds() if trial.duration else None
    reason = attributes.get("reason")
    if trial.state == TrialState.FAIL and reason is None:
        reason = "its lease expired: no progress within the grace period"
    return Row(
        number=trial.number,
        state=trial.state.name,
        role=attributes.get("role", SEARCH),
        params=dict(trial.params or attributes.get("params", {})),
        weights=tuple(attributes.get("weights", ())),
        seeds=tuple(attributes.get("seeds", ())),
        value=trial.value if trial.state in _COUNTED else None,
        intermediate=finite,
        repeats=tuple((int(seed), int(step), float(value)) for seed, step, value in attributes.get("repeats", [])),
        duration_s=duration,
        reason=reason if trial.state == TrialState.FAIL else None,
        owner=attributes.get("owner"),
        is_final=bool(attributes.get("final")),
        retry_of=RetryHeartbeatStaleTrialCallback.retried_trial_number(trial),
        protocol=attributes.get("protocol"),
    )


def _has_params(trial: FrozenTrial) -> bool:
    """Whether a queued trial brings its parameters. A control outside the space has none: a false point would
    mislead the sampler."""
    return bool(trial.params or trial.system_attrs.get("fixed_params"))


@contextlib.contextmanager
def _late(number: int) -> Iterator[None]:
    """Optuna's words for a result that comes too late, in ours."""
    try:
        yield
    except (UpdateFinishedTrialError, ValueError) as error:
        raise LeaseLost(f"trial {number} has ended already; its late result is dropped") from error


def _is_dead_here(owner: str) -> bool:
    """Whether the owner was a process of this machine that no longer runs."""
    host, pid, started = owner.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        return int(psutil.Process(int(pid)).create_time()) != int(started)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _age(trial: FrozenTrial) -> timedelta:
    return datetime.now() - (trial.datetime_start or datetime.now())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
