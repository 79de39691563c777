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
import copy
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from bdense_core.errors import BDenseError
from bdense_core.files import sha256_of
from bdense_core.weights import shares
from search.errors import LeaseLost, StorageError, StudyExists, StudyNotFound
from search.owner import is_dead_here, this_process
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

    def __reduce__(self) -> NoReturn:
        raise TypeError("a database handle holds the password and is never pickled")

    def names(self) -> list[str]:
        """All studies' names."""
        return sorted(study.study_name for study in self.storage.get_all_studies())

    def create_or_resume(self, study: Study) -> "StudyStore":
        """The study of that name: new, or the stored one when its settings agree.

        Raises:
            StudyExists: the name is taken with other settings; nothing was changed.
        """
        with self.exclusive(study.name):
            optuna_study = self._load(study.name)
            if optuna_study is not None and (_SPEC in optuna_study.user_attrs or optuna_study.get_trials()):
                store = self.open(study.name)
                if different := differences(store.study.to_dict(), study.to_dict()):
                    raise StudyExists(
                        f"study {study.name!r} exists with other settings ({'; '.join(different)}); nothing was "
                        "changed. Use another --study NAME, or the stored settings"
                    )
                store.study = study
            else:
                if optuna_study is None:
                    optuna_study = optuna.create_study(storage=self.storage, study_name=study.name)
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
        optuna_study = self._load(name)
        if optuna_study is None:
            known = ", ".join(self.names()) or "none yet"
            raise StudyNotFound(f"there is no study {name!r} in {mask(self.url)}; known studies: {known}")
        stored = optuna_study.user_attrs.get(_SPEC)
        if stored is None:
            raise StudyNotFound(f"study {name!r} was not made by this service; it has no specification")
        return StudyStore(self, optuna_study, Study.from_dict(stored))

    def _load(self, name: str) -> optuna.Study | None:
        try:
            return optuna.load_study(study_name=name, storage=self.storage)
        except KeyError:
            return None

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
        self.owner = this_process()
        self._database = database
        self._optuna = optuna_study
        self._optuna.pruner = make_pruner(study)
        self._live: dict[int, optuna.trial.Trial] = {}
        self._reaped_at = time.time()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a study's store holds the database and is never pickled")

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
            while self._may_start():
                self._optuna.sampler = make_sampler(self.study, len(self._optuna.get_trials(deepcopy=False)))
                trial = self._optuna.ask()
                self._beat(trial)
                trial.set_user_attr("owner", self.owner)
                try:
                    return self._take(trial)
                except BDenseError as error:  # a proposal without weights: it can never run
                    self._expire(trial._trial_id, str(error), retry=False)
                except BaseException:
                    self._database.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                    raise
            return None

    def _may_start(self) -> bool:
        """Whether a trial is due: a queued one, or a new one within the study's total."""
        rows = self.rows()
        started = sum(row.is_search and row.state in ("COMPLETE", "PRUNED", "RUNNING") for row in rows)
        queued = [row for row in rows if row.is_search and row.state == "WAITING"]
        surplus = max(0, started + len(queued) - self.study.spec.budget.trials)
        for row in queued[len(queued) - surplus :]:
            self._drop(row.number, "the study's total was lowered before it ran")
        if any(row.state == "WAITING" for row in rows if not row.is_search) or len(queued) > surplus:
            return True
        return started < self.study.spec.budget.trials

    def _drop(self, number: int, reason: str) -> None:
        trial = self._optuna.get_trials(deepcopy=False)[number]
        self._expire(trial._trial_id, reason, retry=False)

    def is_done(self) -> bool:
        """Whether all searched trials of the total and all controls have ended."""
        rows = self.rows()
        open_rows = [row for row in rows if row.state == "RUNNING" or (row.state == "WAITING" and not row.is_search)]
        return not open_rows and count(rows).counted >= self.study.spec.budget.trials

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
        """The trial made progress: its lease lives on.

        Raises:
            LeaseLost: the trial is no longer ours.
        """
        self._beat(self._owned(number))

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
            self._tell(trial, TrialState.COMPLETE, value)
        del self._live[number]

    def prune(self, number: int) -> None:
        """The trial was stopped by the pruner; its last report is its value.

        Raises:
            LeaseLost: the trial is no longer ours; nothing was stored.
        """
        trial = self._owned(number)
        with _late(number):
            self._tell(trial, TrialState.PRUNED)
        del self._live[number]

    def _tell(self, trial: optuna.trial.Trial, state: TrialState, value: float | None = None) -> None:
        try:
            self._optuna.tell(trial, value, state=state)
        except ValueError as error:  # Optuna's word for a trial that has ended meanwhile
            if self._database.storage.get_trial(trial._trial_id).state.is_finished():
                raise LeaseLost(f"trial {trial.number} has ended already; its late result is dropped") from error
            raise

    def fail(self, number: int, reason: str, *, retry: bool, detail: str | None = None) -> None:
        """The trial failed; with `retry`, the same proposal waits again, a bounded number of times.

        Raises:
            LeaseLost: the trial is no longer ours; nothing was stored.
        """
        with self._database.exclusive(self.name), _late(number):
            self._expire(self._owned(number)._trial_id, reason, retry=retry, detail=detail)
        del self._live[number]

    def give_back(self, number: int) -> None:
        """Back into the queue, as it is: whoever claims it next goes on with the same proposal."""
        storage = self._database.storage
        with contextlib.suppress(LeaseLost), self._database.exclusive(self.name), _late(number):
            trial = self._owned(number)
            storage.set_trial_user_attr(trial._trial_id, "owner", None)
            storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
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

        Lost are trials whose heartbeat is older than the grace period, trials of a launcher of this machine
        whose process is gone, and those that have no owner. Rows without a heartbeat get one, and then the same
        grace. All under the study's lock: a trial that another launcher claims is RUNNING before its first heartbeat.
        """
        storage, lost = self._database.storage, 0
        with self._database.exclusive(self.name):
            self._beat_after_outage()
            for trial_id, silent_s in self._silences().items():
                owner = storage.get_trial(trial_id).user_attrs.get("owner")
                if owner is None:  # a claim names its owner before it gives up this lock
                    lost += self._expire(trial_id, "its launcher ended while it claimed it", retry=True)
                elif is_dead_here(owner):
                    lost += self._expire(trial_id, "its launcher ended without giving it back", retry=True)
                elif silent_s is None:
                    storage.record_heartbeat(trial_id)
                elif silent_s > self._database.grace_s:
                    lost += self._expire(trial_id, f"no progress for {silent_s:.0f} s: its lease expired", retry=True)
        return lost

    def _beat_after_outage(self) -> None:
        """After a suspend or a database outage our own trials look as old as lost ones: one fresh grace for them.

        Otherwise heartbeats follow progress alone, so that a frozen worker's trial expires like any other.
        """
        now = time.time()  # the monotonic clock stands still while a laptop sleeps
        if now - self._reaped_at > self._database.grace_s / 2:
            for trial in self._live.values():
                self._beat(trial)
        self._reaped_at = now

    def _silences(self) -> dict[int, float | None]:
        """Seconds since the last heartbeat of each RUNNING trial by the database's clock; None where there is none."""
        query = text(
            "SELECT t.trial_id, EXTRACT(EPOCH FROM LOCALTIMESTAMP - h.heartbeat) FROM trials t "
            "LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id WHERE t.study_id = :study AND t.state = 'RUNNING'"
        )
        with self._database.storage.engine.connect() as connection:
            rows = connection.execute(query, {"study": self._optuna._study_id}).all()
        return {trial_id: None if silent is None else float(silent) for trial_id, silent in rows}

    def _expire(self, trial_id: int, reason: str, *, retry: bool, detail: str | None = None) -> bool:
        """RUNNING or WAITING to FAIL, and with `retry` a new WAITING row; False if it had ended already."""
        storage = self._database.storage
        try:
            for key, value in {"reason": reason, "final": not retry, "traceback": detail}.items():
                if value is not None:
                    storage.set_trial_user_attr(trial_id, key, value)
            if not storage.set_trial_state_values(trial_id, TrialState.FAIL):
                return False
        except UpdateFinishedTrialError:
            return False
        if retry:
            lost = copy.deepcopy(storage.get_trial(trial_id))
            gone = ("owner", "reason", "final", "traceback")
            lost.user_attrs = {key: value for key, value in lost.user_attrs.items() if key not in gone}
            self._database._retry(self._optuna, lost)
        return True

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
    except UpdateFinishedTrialError as error:
        raise LeaseLost(f"trial {number} has ended already; its late result is dropped") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
