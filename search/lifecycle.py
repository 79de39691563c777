"""The life of a trial: every change of its state, and the lease that guards it. docs/lifecycle.md draws it.

A RUNNING trial has a lease: an owner, and a heartbeat that follows its progress. Reporting, ending and giving back
belong to the owner: whoever lost the lease gets `LeaseLost`, and the result is dropped. Claiming, losing, releasing
and dropping are for everybody, under the study's lock. Every transition may be repeated after an outage.
"""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection

from bdense_core.errors import BDenseError
from bdense_core.methods.base import with_settings
from bdense_core.weights import shares
from search import queries
from search.database import IS_GONE, Database, outlasting
from search.errors import LeaseLost, StudyNotFound
from search.owner import is_dead_here, this_process
from search.records import SEARCH, Claim, Params
from search.samplers import make_pruner, make_sampler, suggest
from search.spec import Study
from search.version import code_version, packages

_OF_ONE_ATTEMPT = (
    "owner", "reason", "final", "retry", "traceback", "progress", "notes", "resumed_from", "metrics", "violated",
)  # fmt: skip
"""Attributes that a retry does not take over."""

_ASIDE = "lost:"
"""Before the names of what the pruner noted of a lost trial: its retry has that now, and no cut-off counts it twice."""

_SUSPENDED_S = 15.0
"""A launcher reaps every few seconds: one that has not for so long was not running."""

_SEARCH = json.dumps(SEARCH)
_NO_ROW = 2**31 - 1
"""Beyond all rows' ids."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Who holds a RUNNING trial, and for how many seconds nothing was heard of it."""

    number: int
    owner: str | None
    silent_s: float | None


@dataclass(frozen=True, kw_only=True)
class Reaped:
    """What `Trials.reap` found: how many trials were lost, and which of our own are not ours any more."""

    lost: int
    ours: tuple[int, ...]


class Trials:
    """One study's trials, as one launcher sees them.

    Every method but the constructor waits while the database does not answer (`Database.outlast`), and raises
    `StorageError` if that takes too long.
    """

    def __init__(self, database: Database, optuna_study: optuna.Study, study: Study) -> None:
        self.database = database
        self.owner = this_process()
        self._optuna = optuna_study
        self._live: dict[int, optuna.trial.Trial] = {}
        self._reaped_at = time.time()
        self._settled = (0, 0)
        """No row up to this id is open, and so many of them are searched trials that ended well."""
        self.study = study

    def __reduce__(self) -> NoReturn:
        raise TypeError("a study's trials hold the database and are never pickled")

    @property
    def study(self) -> Study:
        return self._study

    @study.setter
    def study(self, study: Study) -> None:
        self._study = study
        self._optuna.sampler = make_sampler(study)
        self._optuna.pruner = make_pruner(study)

    @property
    def live(self) -> tuple[int, ...]:
        """The trials that this launcher believes to own."""
        return tuple(self._live)

    def recovered(self) -> None:
        """After an outage: heartbeats before anything else."""
        for trial in self._live.values():
            with self.database.transaction() as connection:
                connection.execute(queries.BEAT, {"trial": trial._trial_id})

    # -- WAITING or nothing, to RUNNING

    @outlasting
    def claim(self) -> Claim | None:
        """The next trial to run, now RUNNING and ours; None when nothing is left to start.

        Under the study's lock, so that N asked trials are N run trials from any number of launchers.
        """
        with self.database.exclusive(self.study.name) as lock:
            while (trial := self._start()) is not None:
                lock.check()
                try:
                    return self._take(trial)
                except (LeaseLost, UpdateFinishedTrialError):  # another has it: mostly since the lock was lost
                    lock.check()
                except BDenseError as error:  # a proposal without weights: it can never run
                    lock.check()  # or it is another's to end
                    self._end(trial._trial_id, str(error), retry=False)
            return None

    def _start(self) -> optuna.trial.Trial | None:
        """The oldest waiting row, else a new one if the study's total has room, RUNNING now; else None."""
        are_waiting, has_room = self._due()
        if not are_waiting and not has_room:
            return None
        if are_waiting:
            return self._optuna.ask()
        # `ask` would read all trials to see whether one waits; we know. As it does, forget what samplers have read.
        self._optuna._thread_local.cached_all_trials = None
        return optuna.trial.Trial(self._optuna, self._optuna._storage.create_new_trial(self._optuna._study_id))

    def _due(self) -> tuple[bool, bool]:
        """Whether rows wait that are to run, and whether the study's total has room for a new one."""
        study = {"study": self._optuna._study_id}
        with self.database.transaction() as connection:
            connection.execute(queries.ONE_VIEW)  # a trial that ends just now counts once
            rows = [
                (trial_id, state, json.loads(role or _SEARCH) == SEARCH, enqueued is not None)
                for trial_id, state, role, enqueued in connection.execute(queries.OPEN, study)
            ]
            ended = self._count_ended(connection, min((row[0] for row in rows), default=None))
        running = sum(search and state == "RUNNING" for _, state, search, _ in rows)
        waiting = [(trial_id, search, enqueued) for trial_id, state, search, enqueued in rows if state == "WAITING"]
        queued = [trial_id for trial_id, search, enqueued in waiting if search and not enqueued]
        by_people = sum(search and enqueued for _, search, enqueued in waiting)  # these run in any case, as controls do
        room = max(0, self.study.spec.budget.trials - ended - running - by_people)
        for trial_id in queued[room:]:
            self._end(trial_id, "the study's total was lowered before it ran", retry=False)
        return len(waiting) - len(queued[room:]) > 0, room > len(queued)

    def _count_ended(self, connection: Connection, first_open: int | None) -> int:
        """Searched trials that ended COMPLETE or PRUNED; those below all open ones are counted once."""
        about = {"study": self._optuna._study_id, "search": _SEARCH}
        if first_open is not None:
            settled, count = self._settled
            new = connection.execute(queries.ENDED, {**about, "after": settled, "before": first_open}).scalar_one()
            self._settled = max(settled, first_open - 1), count + new
        settled, count = self._settled
        rest: int = connection.execute(queries.ENDED, {**about, "after": settled, "before": _NO_ROW}).scalar_one()
        return count + rest

    def _take(self, trial: optuna.trial.Trial) -> Claim:
        """Give the row an owner, a heartbeat, its weights and its settings, at one stroke.

        Raises:
            LeaseLost: it is not ours to take any more; nothing was stored but parameters that it lacked.
        """
        stored = trial._cached_frozen_trial  # read when it was started, under the lock
        attributes = stored.user_attrs
        role = attributes.get("role", SEARCH)
        params = self._propose(trial) if role == SEARCH or _has_params(stored) else {}
        run = attributes if "weights" in attributes else self._meant(params)
        weights, schedule, settings = run["weights"], run.get("schedule", ()), run.get("settings", {})
        with_settings(self.study.spec.method, settings)  # refused here, it ends this trial alone
        seeds = attributes.get("seeds") or self.study.trial_seeds()
        values = {
            "role": role,
            "weights": list(weights),
            "shares": [round(share, 6) for share in shares(weights)],
            "seeds": list(seeds),
            "protocol": self.study.protocol_hash(),
            "code": code_version(),
            "packages": packages(),  # workers have the same
        } | {key: value for key, value in (("schedule", schedule), ("settings", settings)) if value}
        row = {"trial": trial._trial_id}
        with self.database.transaction() as connection:
            if not connection.execute(queries.TAKE, {**row, "owner": json.dumps(self.owner)}).rowcount:
                raise self._lost(trial.number)
            connection.execute(queries.BEAT, row)
            connection.execute(queries.SET, {**row, "values": json.dumps(values)})
        self._live[trial.number] = trial
        history = RetryHeartbeatStaleTrialCallback.retry_history(stored)
        return Claim(
            number=trial.number,
            origin=history[0] if history else trial.number,
            role=role,
            weights=tuple(weights),
            params=params,
            settings=settings,
            schedule=tuple(tuple(map(tuple, rows)) for rows in schedule),
            rule=attributes.get("rule", "fixed"),
            seeds=tuple(seeds),
            reported=tuple(sorted(stored.intermediate_values)),
        )

    def _propose(self, trial: optuna.trial.Trial) -> Params:
        """The row's parameters; those that it lacks are proposed.

        They are read again, since Optuna keeps what is there: another launcher may have written some of them, where
        one of the two has lost the lock. None changes once it is written.
        """
        proposed = suggest(trial, self.study)
        written = self.database.storage.get_trial(trial._trial_id).params
        return {name: written[name] for name in proposed}

    def _meant(self, params: Params) -> dict[str, Any]:
        """What a proposal stands for: weights, perhaps a schedule of them, and settings of the method."""
        space, num_branches = self.study.spec.space, self.study.num_branches
        return {
            "weights": space.weights(params, num_branches),
            "schedule": space.schedule(params, num_branches, self.study.num_intervals),
            "settings": self.study.settings_of(params),
        }

    # -- RUNNING, and it stays so

    @outlasting
    def beat(self, number: int, /, **about: Any) -> None:
        """The trial made progress: its lease lives on. `about` becomes attributes of the trial, JSON-able.

        Raises:
            LeaseLost: the trial is no longer ours.
        """
        self._renew(self._ours(number), about)

    @outlasting
    def report(self, number: int, value: float, step: int, /, *, may_prune: bool, **about: Any) -> bool:
        """Store an intermediate value; True if the pruner says stop. `about` as for `beat`.

        Raises:
            LeaseLost: the trial is no longer ours.
        """
        trial = self._ours(number)
        self._renew(trial, about)
        storage = self.database.storage
        try:  # the storage's own, since a trial's cannot be repeated after an outage
            storage.set_trial_intermediate_value(trial._trial_id, step, value)
        except UpdateFinishedTrialError as error:
            raise self._lost(number) from error
        return may_prune and self._optuna.pruner.prune(self._optuna, storage.get_trial(trial._trial_id))

    def _renew(self, trial: optuna.trial.Trial, about: dict[str, Any]) -> None:
        """A heartbeat and attributes, if the trial is still ours: all in one transaction."""
        with self.database.transaction() as connection:
            if self._lease(connection, trial._trial_id) != ("RUNNING", self.owner):
                raise self._lost(trial.number)
            connection.execute(queries.BEAT, {"trial": trial._trial_id})
            if about:
                connection.execute(queries.SET, {"trial": trial._trial_id, "values": json.dumps(about)})

    # -- RUNNING to an end, by its owner

    @outlasting
    def complete(self, number: int, value: float, /, **about: Any) -> None:
        """The trial ended with its result; `about` as for `beat`.

        Where the study has constraints, what the figures in `about["metrics"]` make of them is stored for samplers and
        dashboards.

        Raises:
            LeaseLost: the trial is no longer ours; nothing was stored.
        """
        metrics = about.get("metrics", {})
        if violated := self.study.violations(metrics):
            about |= {"violated": list(violated)}
        self._tell(number, TrialState.COMPLETE, value, about, excesses=self.study.excesses(metrics))

    @outlasting
    def prune(self, number: int, value: float, /) -> None:
        """The trial was stopped by the pruner; its last report is its value.

        Raises:
            LeaseLost: the trial is no longer ours; nothing was stored.
        """
        self._tell(number, TrialState.PRUNED, value, {})

    def _tell(
        self, number: int, state: TrialState, value: float, about: dict[str, Any], *, excesses: Sequence[float] = ()
    ) -> None:
        trial = self._ours(number)
        try:
            self._renew(trial, about)
            if excesses:
                self.database.storage.set_trial_system_attr(trial._trial_id, _CONSTRAINTS_KEY, list(excesses))
            self.database.storage.set_trial_state_values(trial._trial_id, state, [value])
        except (LeaseLost, UpdateFinishedTrialError) as error:
            with self.database.transaction() as connection:
                lease = self._lease(connection, trial._trial_id)
            if lease != (state.name, self.owner):  # or it was told before an outage, which only took the answer
                raise self._lost(number) from error
        self._live.pop(number, None)

    @outlasting
    def fail(self, number: int, reason: str, *, retry: bool, detail: str | None = None) -> bool:
        """The trial failed. With `retry` the same proposal waits again, at most `lease.max_retries` times.

        Returns:
            Whether it waits again.

        Raises:
            LeaseLost: the trial is no longer ours; nothing was stored.
        """
        trial = self._ours(number)
        with self.database.exclusive(self.study.name):
            with self.database.transaction() as connection:
                lease = self._lease(connection, trial._trial_id)
            if lease != ("RUNNING", self.owner) and not self._failed_so(trial._trial_id, reason):
                raise self._lost(number)
            stored = self._end(trial._trial_id, reason, retry=retry, detail=detail)
        del self._live[number]
        return _is_owed_a_retry(stored)

    def _failed_so(self, trial_id: int, reason: str) -> bool:
        """Whether it was stored already that the trial failed for this reason, before an outage."""
        stored = self.database.storage.get_trial(trial_id)
        return stored.state == TrialState.FAIL and stored.user_attrs.get("reason") == reason

    @outlasting
    def give_back(self, number: int) -> None:
        """Back into the queue, as it is: whoever claims it next goes on with the same proposal."""
        trial = self._live.get(number)
        if trial is None:
            return
        with self.database.exclusive(self.study.name):
            self._release(trial._trial_id, self.owner)
        self._live.pop(number, None)

    def _release(self, trial_id: int, owner: str | None) -> None:
        """RUNNING to WAITING, if it is still this owner's."""
        with self.database.transaction() as connection:
            if self._lease(connection, trial_id) == ("RUNNING", owner):
                connection.execute(queries.WAIT, {"trial": trial_id})
                connection.execute(queries.SET, {"trial": trial_id, "values": json.dumps({"owner": None})})

    def _ours(self, number: int) -> optuna.trial.Trial:
        if number not in self._live:
            raise self._lost(number)
        return self._live[number]

    def _lost(self, number: int) -> LeaseLost:
        self._live.pop(number, None)
        return LeaseLost(f"trial {number} is no longer owned by this launcher; its result is dropped")

    def _lease(self, connection: Connection, trial_id: int) -> tuple[str, str | None]:
        found = connection.execute(queries.LEASE, {"trial": trial_id}).one_or_none()
        if found is None:
            raise StudyNotFound(IS_GONE)
        state, owner = found
        return state, json.loads(owner) if owner else None

    # -- RUNNING without a live owner

    @outlasting
    def reap(self) -> Reaped:
        """Put the RUNNING trials without a live owner back into the queue.

        Lost are trials whose heartbeat is older than the grace period, and trials of a launcher of this machine whose
        process is gone. A row without an owner is a claim that was never finished: it waits again as it is. A row that
        has an owner and never had a heartbeat gets one, and then the same grace. A failed row whose retry was not
        written any more gets it now.
        """
        lost = 0
        with self.database.exclusive(self.study.name):
            self._beat_after_sleep()
            running = self._running()
            for trial_id, lease in running.items():
                if lease.owner is None:
                    self._release(trial_id, None)
                elif lease.owner != self.owner and is_dead_here(lease.owner):
                    lost += self._lose(trial_id, "its launcher ended without giving it back")
                elif lease.silent_s is None:
                    with self.database.transaction() as connection:
                        connection.execute(queries.BEAT, {"trial": trial_id})
                elif lease.silent_s > self.study.spec.lease.grace_s:
                    lost += self._lose(trial_id, f"no progress for {lease.silent_s:.0f} s: its lease expired")
            self._retry_what_was_not()
            ours = {lease.number for lease in self._running().values() if lease.owner == self.owner}
        gone = tuple(number for number in self._live if number not in ours)
        for number in gone:
            del self._live[number]
        return Reaped(lost=lost, ours=gone)

    def leases(self) -> list[Lease]:
        """Of all RUNNING trials."""
        return list(self._running().values())

    def _running(self) -> dict[int, Lease]:
        with self.database.transaction() as connection:
            rows = connection.execute(queries.RUNNING, {"study": self._optuna._study_id}).all()
        return {
            trial_id: Lease(
                number=number,
                owner=json.loads(owner) if owner else None,
                silent_s=None if silent is None else float(silent),
            )
            for trial_id, number, owner, silent in rows
        }

    def _beat_after_sleep(self) -> None:
        """After a suspend our own trials look as old as lost ones: one fresh grace for them.

        Otherwise heartbeats follow progress alone, so that a frozen worker's trial expires like any other.
        """
        now = time.time()  # the monotonic clock stands still while a laptop sleeps
        if now - self._reaped_at > max(_SUSPENDED_S, self.study.spec.lease.grace_s / 2):
            self.recovered()
        self._reaped_at = now

    def _lose(self, trial_id: int, reason: str) -> bool:
        """Whether it was lost; its owner may have ended it just now."""
        return self._end(trial_id, reason, retry=True).state == TrialState.FAIL

    # -- to FAIL, and to a retry; the caller holds the study's lock

    def _end(self, trial_id: int, reason: str, *, retry: bool, detail: str | None = None) -> FrozenTrial:
        """RUNNING or WAITING to FAIL, and with `retry` a new WAITING row unless there were too many; the row since.

        If it has ended meanwhile it stays as it is, and if it failed before an outage, what is left is its retry.
        """
        storage = self.database.storage
        tried = len(RetryHeartbeatStaleTrialCallback.retry_history(storage.get_trial(trial_id)))
        again = retry and tried < self.study.spec.lease.max_retries
        about = {"reason": reason, "final": not retry, "retry": again} | ({"traceback": detail} if detail else {})
        with self.database.transaction() as connection:
            if connection.execute(queries.FAIL, {"trial": trial_id}).rowcount:
                connection.execute(queries.SET, {"trial": trial_id, "values": json.dumps(about)})
                if again:  # at one stroke with its end: who reads an ended trial keeps it as it is
                    connection.execute(queries.SET_ASIDE, {"trial": trial_id, "before": _ASIDE})
        stored = storage.get_trial(trial_id)
        if _is_owed_a_retry(stored):
            self._retry(stored)
        return stored

    def _retry_what_was_not(self) -> None:
        with self.database.transaction() as connection:
            failed = connection.execute(queries.UNRETRIED, {"study": self._optuna._study_id}).all()
            known = self._retried(connection) if failed else set()
        for trial_id, number in failed:
            if number not in known:
                self._retry(self.database.storage.get_trial(trial_id))

    def _retry(self, lost: FrozenTrial) -> None:
        """Queue the same proposal again with what it had reported; once, however often it is asked for."""
        with self.database.transaction() as connection:
            if lost.number in self._retried(connection):
                return
        again = copy.deepcopy(lost)
        again.user_attrs = {key: value for key, value in lost.user_attrs.items() if key not in _OF_ONE_ATTEMPT}
        again.system_attrs.pop(_CONSTRAINTS_KEY, None)
        again.system_attrs = {key.removeprefix(_ASIDE): value for key, value in again.system_attrs.items()}
        RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(self._optuna, again)

    def _retried(self, connection: Connection) -> set[int]:
        """The numbers of all trials that have a retry."""
        histories = connection.execute(queries.RETRIES, {"study": self._optuna._study_id})
        return {number for (history,) in histories for number in json.loads(history)}


def _is_owed_a_retry(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and bool(trial.user_attrs.get("retry"))


def _has_params(trial: FrozenTrial) -> bool:
    """Whether a queued trial brings its parameters. A control outside the space has none: a false point would
    mislead the sampler."""
    return bool(trial.params or trial.system_attrs.get("fixed_params"))
