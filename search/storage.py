"""Studies in the database: created, resumed, edited, steered, read and deleted. Trials change in `lifecycle.py`."""

import difflib
import json
import logging
import math
import secrets
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from bdense_core.errors import BadValue, BDenseError, UnknownKey
from bdense_core.files import sha256_of
from bdense_core.methods.base import Axis, with_settings
from search.database import Database, outlasting
from search.errors import StudyBusy, StudyExists, StudyNotFound, StudyUnreadable
from search.lifecycle import Trials
from search.records import SEARCH, Counts, Params, Row, StudySummary, count, last_of_chains
from search.sections import Arm
from search.spec import EDITABLE, Study, differences, known_keys, mutable_values
from search.study_file import check_search
from search.tuning import value_of
from search.version import code_version

_SPEC, _SPEC_HASH, _CODE, _CREATED = "bdense:spec", "bdense:spec_sha256", "bdense:code_version", "bdense:created"
_LAUNCHED = "bdense:launched"
"""What the last launch's file said of the keys that may change: to tell its edits from those by `set`."""
_ORDERS = "bdense:orders"
_ANEW = "`bdense-weights delete --study {name}` makes room for a new one"
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)

warnings.filterwarnings("ignore", category=ExperimentalWarning)
logging.getLogger("optuna").setLevel(logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What people ask of all launchers of a study."""

    paused: bool = False
    stop: str = ""
    """Another text than before: stop now."""


class Studies:
    """The studies of a database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def names(self) -> list[str]:
        """All studies' names."""
        return sorted(study.study_name for study in self.database.storage.get_all_studies())

    def create_or_resume(self, study: Study, *, said: Collection[str] | None = None) -> "StudyStore":
        """The study of that name: new, or the stored one when its settings agree.

        Of the keys that may change, those that the launch changes are taken over; edits by `set` stay.

        Args:
            said: the keys that the launch itself gives, beside what is stored of the study; None: all, as a file does.

        Raises:
            StudyExists: the name is taken with other settings; nothing was changed.
        """
        with self.database.exclusive(study.name):
            optuna_study = self._load(study.name)
            if optuna_study is not None and (_SPEC in optuna_study.user_attrs or optuna_study.get_trials()):
                store = self.open(study.name)
                study = _joined(store.study, study)
                store = self._resume(store, study)
            else:
                store = self._create(study, optuna_study)
            before = {} if said is None else store.optuna_study.user_attrs.get(_LAUNCHED, {})
            now = mutable_values(study)
            store.optuna_study.set_user_attr(_LAUNCHED, before | {key: now[key] for key in _of(now, said)})
            store.enqueue_missing()
            return store

    def _create(self, study: Study, begun: optuna.Study | None) -> "StudyStore":
        optuna_study = begun or optuna.create_study(storage=self.database.storage, study_name=study.name)
        optuna_study.set_metric_names([study.metric])
        optuna_study.set_user_attr(_CODE, code_version())
        optuna_study.set_user_attr(_CREATED, datetime.now().astimezone().isoformat(timespec="microseconds"))
        optuna_study.set_user_attr(_SPEC_HASH, study.sha256())
        optuna_study.set_user_attr(_SPEC, study.to_dict())
        return StudyStore(self.database, optuna_study, study)

    def _resume(self, store: "StudyStore", study: Study) -> "StudyStore":
        if different := differences(store.study.to_dict(), study.to_dict()):
            way_out = "Use another --study NAME, or the stored settings" if study.spec.comparison is None else _ANEW
            raise StudyExists(
                f"study {study.name!r} exists with other settings ({'; '.join(different)}); nothing was "
                f"changed. {way_out.format(name=study.name)}"
            )
        launched = store.optuna_study.user_attrs.get(_LAUNCHED, {})
        now, stored = mutable_values(study), mutable_values(store.study)
        edited = {key: value for key, value in stored.items() if key in now and now[key] == launched.get(key, value)}
        store.kept = {key: value for key, value in edited.items() if value != now[key] and not _is_comparison(key)}
        store.save(study.edited(store.kept))
        taken = mutable_values(store.study)
        store.changed = {
            key: value
            for key, value in stored.items()
            if key in taken and taken[key] != value and not _is_comparison(key)
        }
        return store

    def open(self, name: str) -> "StudyStore":
        """A stored study.

        Raises:
            StudyNotFound: no study of that name of ours; the message lists those there are.
            StudyUnreadable: another version made it, with settings that this one does not know.
        """
        optuna_study = self._load(name)
        if optuna_study is None:
            known = ", ".join(self.names()) or "none yet"
            raise StudyNotFound(f"there is no study {name!r} in {self.database.address}; known studies: {known}")
        stored = optuna_study.user_attrs.get(_SPEC)
        if stored is None:
            raise StudyNotFound(f"study {name!r} was not made by this service; it has no specification")
        try:
            study = Study.from_dict(stored)
        except (BDenseError, KeyError, TypeError) as error:
            maker = optuna_study.user_attrs.get(_CODE, "an unknown version")
            raise StudyUnreadable(
                f"study {name!r} cannot be read: {error}; {maker} made it, this is {code_version()}"
            ) from error
        return StudyStore(self.database, optuna_study, study)

    def _load(self, name: str) -> optuna.Study | None:
        try:
            return optuna.load_study(study_name=name, storage=self.database.storage)
        except KeyError:
            return None

    def ours(self) -> list[str]:
        """The names of the studies that this service made; a database may hold others' too."""
        return [study.study_name for study in self.database.storage.get_all_studies() if _SPEC in study.user_attrs]

    def comparisons_of(self, source: "StudyStore") -> list["StudyStore"]:
        """The confirmations and transfers of a search's weightings; not those of an earlier study of its name."""
        wanted = {"of": source.name, "of_created": source.created}
        return [
            self.open(study.study_name)  # these alone: another study, of a newer version, is nothing to stumble over
            for study in self.database.storage.get_all_studies()
            if wanted.items() <= ((study.user_attrs.get(_SPEC) or {}).get("comparison") or {}).items()
        ]

    def delete(self, name: str) -> None:
        """Remove a study with all its trials.

        Raises:
            StudyNotFound: there is none of ours.
            StudyBusy: trials of it are running somewhere; nothing was deleted.
        """
        store = self.open(name)
        with self.database.exclusive(name):
            grace_s = store.study.spec.lease.grace_s
            alive = [
                lease for lease in store.trials.leases() if lease.silent_s is not None and lease.silent_s < grace_s
            ]
            if alive:
                raise StudyBusy(
                    f"{len(alive)} trial(s) of study {name!r} are running; "
                    f"`bdense-weights stop --study {name}` ends them, then delete it"
                )
            optuna.delete_study(study_name=name, storage=self.database.storage)


def _joined(stored: Study, wanted: Study) -> Study:
    """A study that is asked for, with what is stored of its comparison: asking for less takes nothing away.

    Raises:
        StudyExists: the stored one compares something else, or nothing.
    """
    before, now = stored.spec.comparison, wanted.spec.comparison
    if before is None and now is None:
        return wanted
    try:
        if before is None or now is None:
            raise BadValue("it is no such comparison" if before is None else f"it compares weightings of {before.of!r}")
        return wanted.edited({"comparison": before.joined(now).model_dump(mode="json")})
    except BadValue as error:
        way_out = _ANEW.format(name=wanted.name)
        raise StudyExists(f"study {wanted.name!r} exists: {error}; nothing was changed. {way_out}") from error


def _of(keys: Iterable[str], said: Collection[str] | None) -> list[str]:
    """Those keys that were said, by themselves or with their section."""
    return [key for key in keys if said is None or any(f"{key}.".startswith(f"{given}.") for given in said)]


def _is_comparison(key: str) -> bool:
    """Keys that grow by `joined`, without a word."""
    return key.partition(".")[0] == "comparison"


class StudyStore:
    """One study in the database.

    Attributes:
        trials: their lives.
        key: a name for folders that no other study has, in no database at no time.
        kept: keys that keep their value from `set` although the launch's file says otherwise.
        changed: keys that a launch changed, with their values before.
    """

    def __init__(self, database: Database, optuna_study: optuna.Study, study: Study) -> None:
        self.database = database
        self.kept: dict[str, Any] = {}
        self.changed: dict[str, Any] = {}
        self.trials = Trials(database, optuna_study, study)
        self._optuna = optuna_study
        self._ended: dict[int, Row] = {}
        self.key = f"{study.name}-{sha256_of([study.name, optuna_study.user_attrs.get(_CREATED)])[:8]}"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a study's store holds the database and is never pickled")

    def recovered(self) -> None:
        self.trials.recovered()

    # -- the study

    @property
    def study(self) -> Study:
        return self.trials.study

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def optuna_study(self) -> optuna.Study:
        """For the dashboard's figures."""
        return self._optuna

    @property
    def stored_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self._optuna.user_attrs[_SPEC]
        return spec

    @property
    def created(self) -> str:
        """When the study was made: what tells it from another one of its name."""
        return str(self._optuna.user_attrs.get(_CREATED))

    def save(self, study: Study) -> None:
        """Store the resolved study with whatever may change in it."""
        self.trials.study = study
        if self._optuna.user_attrs.get(_SPEC) != study.to_dict():
            self._optuna.set_user_attr(_SPEC, study.to_dict())

    def edit(self, values: dict[str, Any]) -> None:
        """Change keys of a study that may be running; its launchers notice within seconds.

        Raises:
            BadValue: a key that may not change, or a value that is none; nothing was changed.
        """
        known = known_keys(self.study.spec.method.kind, self.study.spec.space.family)
        for key in values:
            is_known = key in known or key.partition(".")[0] in known  # such as tune.NAME
            if not is_known and key not in EDITABLE:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
                raise UnknownKey(f"unknown key {key}; did you mean {nearest[0]}?")
            if not any(key == allowed or key.startswith(allowed + ".") for allowed in EDITABLE):
                raise BadValue(
                    f"{key} cannot be changed in a study that exists: results depend on it; "
                    f"what may change: {', '.join(EDITABLE)}"
                )
        with self.database.exclusive(self.name):
            study = Study.from_dict(self.stored_spec).edited(values)
            check_search(study.spec)
            if different := differences(Study.from_dict(self.stored_spec).to_dict(), study.to_dict()):
                raise BadValue(f"a study that exists cannot change {'; '.join(different)}: results depend on it")
            self.save(study)

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
        ended = [row for row in rows if row.is_search and row.state == "COMPLETE" and not row.violated]
        finished = [row.value for row in ended if row.value is not None]
        return StudySummary(
            name=self.name,
            metric=self.study.metric,
            counts=count(rows),
            best=min(finished, default=None),
            created=str(self.provenance()["created"]),
        )

    # -- what people ask for

    def give_orders(self, **changed: Any) -> None:
        """Change some of the `Orders`."""
        with self.database.exclusive(self.name):
            orders = self._optuna.user_attrs.get(_ORDERS, {})
            self._optuna.set_user_attr(_ORDERS, {**orders, **changed})

    def stop(self) -> None:
        """Ask all launchers to give their trials back and to end."""
        self.give_orders(stop=secrets.token_hex(8))

    @outlasting
    def follow(self) -> Orders:
        """The orders as they are now; the study's edited keys are taken over on the way.

        Raises:
            StudyNotFound: the study was deleted.
        """
        query = text(
            "SELECT key, value_json FROM study_user_attributes WHERE study_id = :study AND key IN (:spec, :orders)"
        )
        with self.database.transaction() as connection:
            rows = connection.execute(query, {"study": self._optuna._study_id, "spec": _SPEC, "orders": _ORDERS}).all()
        found = {key: json.loads(value) for key, value in rows}
        if _SPEC not in found:
            raise StudyNotFound(f"study {self.name!r} is gone: somebody deleted it")
        edited = self.study.edited(mutable_values(Study.from_dict(found[_SPEC])))
        if edited != self.study:
            self.trials.study = edited
        return Orders(**found.get(_ORDERS, {}))

    def done_with(self, origins: list[int]) -> list[int]:
        """Those of the chains of retries, each named by its first trial, that have come to their end."""
        rows = last_of_chains(self.rows()) if origins else []
        still_open = {row.origin for row in rows if row.state in ("RUNNING", "WAITING") or row.is_retried}
        return [origin for origin in origins if origin not in still_open]

    def enqueue(self, params: Params) -> int:
        """Queue a proposal of a person's own: it runs in any case, and counts towards the total.

        Args:
            params: a value of each axis, of the weights and of tuned settings; numbers may be given as text.

        Returns:
            The number of its trial.

        Raises:
            BadValue: a parameter that the study does not search, lacks, or has within another range, or settings that
                the method refuses together.
        """
        spec = self.study.spec
        weights = {name: Axis(about="of the weights", low=low, high=high) for name, (low, high) in spec.axes.items()}
        axes = weights | spec.tuned
        if params.keys() != axes.keys():
            given = ", ".join(params) or "none"
            raise BadValue(
                f"study {self.name!r} searches {', '.join(axes)}, and the proposal gives {given}; give a value for "
                "each, and no other"
            )
        values = {name: value_of(name, axis, params[name]) for name, axis in axes.items()}
        with_settings(spec.method, self.study.settings_of(values))
        with self.database.exclusive(self.name):
            self._optuna.enqueue_trial(values, user_attrs={"role": SEARCH, "enqueued": True})
            return len(self._optuna.get_trials(deepcopy=False)) - 1

    def enqueue_missing(self) -> None:
        """Put every control, or every run of a comparison, that neither ran nor waits into the queue."""
        newest = last_of_chains(self.rows())
        again = self.study.spec.comparison is not None  # whoever asks for it again wants what failed for good, too
        present = {
            (row.role, row.seeds)
            for row in newest
            if row.state != "FAIL" or row.is_retried or (row.is_final and not again)
        }
        for role, seeds, arm in self.study.fixed_runs():
            if (role, seeds) not in present:
                self._enqueue_run(role, seeds, arm)

    def _enqueue_run(self, role: str, seeds: tuple[int, ...], arm: Arm) -> None:
        attributes: dict[str, Any] = {"role": role, "weights": list(arm.weights), "seeds": list(seeds)}
        if arm.settings:
            attributes["settings"] = arm.settings
        if not arm.is_trained:
            attributes["untrained"] = True
        if arm.schedule:
            attributes["schedule"] = arm.schedule
        if arm.rule != "fixed":
            attributes["rule"] = arm.rule
        if shown := self.study.params_of(arm, within_ranges=False):
            attributes["params"] = shown
        is_control = self.study.spec.comparison is None
        proposed = self.study.params_of(arm) if is_control else None
        self._optuna.enqueue_trial(proposed or {}, user_attrs=attributes)

    # -- what there is

    @outlasting
    def rows(self) -> list[Row]:
        """Every trial, by number. What has ended is read once."""
        rows = []
        for trial in self._optuna.get_trials(deepcopy=False):
            row = self._ended.get(trial.number) or _row(trial)
            if trial.state.is_finished():
                self._ended[trial.number] = row
            rows.append(row)
        return rows

    def counts(self) -> Counts:
        return count(self.rows())

    def is_done(self) -> bool:
        """Whether all searched trials of the total have ended, and all controls and what people put into the queue."""
        rows = self.rows()
        due = [row for row in rows if row.state == "RUNNING" or (row.state == "WAITING" and row.runs_in_any_case)]
        return not due and count(rows).counted >= self.study.spec.budget.trials


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
        params=dict(trial.params or attributes.get("params") or trial.system_attrs.get("fixed_params", {})),
        weights=tuple(attributes.get("weights", ())),
        seeds=tuple(attributes.get("seeds", ())),
        settings=attributes.get("settings", {}),
        is_trained=not attributes.get("untrained"),
        value=trial.value if trial.state in _COUNTED else None,
        intermediate=finite,
        repeats=tuple((int(seed), int(step), float(value)) for seed, step, value in attributes.get("repeats", [])),
        surrogate={int(step): float(value) for step, value in attributes.get("surrogate", {}).items()},
        metrics=attributes.get("metrics", {}),
        violated=tuple(attributes.get("violated", ())),
        evaluations=tuple(attributes.get("evaluations", ())),
        samples=attributes.get("samples"),
        schedule=tuple(tuple(map(tuple, rows)) for rows in attributes.get("schedule", ())),
        rule=attributes.get("rule", "fixed"),
        shares_learned=tuple(attributes.get("shares_learned", ())),
        duration_s=duration,
        reason=reason if trial.state == TrialState.FAIL else None,
        owner=attributes.get("owner"),
        is_final=bool(attributes.get("final")),
        is_retried=trial.state == TrialState.FAIL and bool(attributes.get("retry")),
        is_enqueued="enqueued" in attributes,
        retry_of=RetryHeartbeatStaleTrialCallback.retried_trial_number(trial),
        protocol=attributes.get("protocol"),
        code=attributes.get("code"),
        packages=attributes.get("packages", {}),
        progress=attributes.get("progress", {}),
        notes=tuple(attributes.get("notes", ())),
        resumed_from=attributes.get("resumed_from"),
        started=trial.datetime_start,
        ended=trial.datetime_complete,
    )
