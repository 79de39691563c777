"""Optuna's storage, reading trials by one statement: its own takes six, and makes an object of each row of each table.

A launcher reads all running trials at each claim, so this is most of what a claim takes.
"""

from collections.abc import Container, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from json import loads
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

_ROWS = """
SELECT t.trial_id, t.number, t.state, t.datetime_start, t.datetime_complete,
  (SELECT json_agg(json_build_array(p.param_name, p.param_value, p.distribution_json) ORDER BY p.param_id)
     FROM trial_params p WHERE p.trial_id = t.trial_id),
  (SELECT json_agg(json_build_array(v.value_type, v.value) ORDER BY v.objective)
     FROM trial_values v WHERE v.trial_id = t.trial_id),
  (SELECT json_agg(json_build_array(i.step, i.intermediate_value_type, i.intermediate_value))
     FROM trial_intermediate_values i WHERE i.trial_id = t.trial_id),
  (SELECT json_agg(json_build_array(u.key, u.value_json))
     FROM trial_user_attributes u WHERE u.trial_id = t.trial_id),
  (SELECT json_agg(json_build_array(s.key, s.value_json))
     FROM trial_system_attributes s WHERE s.trial_id = t.trial_id)
FROM trials t
"""
_SOME = text(
    _ROWS + "WHERE t.study_id = :study AND (t.trial_id = ANY(:known) OR t.trial_id > :after) ORDER BY t.trial_id"
)
_ONE = text(_ROWS + "WHERE t.trial_id = :trial")
_NUMBERS = {"INF_POS": float("inf"), "INF_NEG": float("-inf"), "NAN": float("nan")}


class _Row(NamedTuple):
    """What the statement says of a trial; None where a table has nothing of it."""

    trial_id: int
    number: int
    state: str
    start: datetime | None
    complete: datetime | None
    params: list[tuple[str, float, str]] | None
    values: list[tuple[str, float | None]] | None
    intermediate: list[tuple[int, str, float | None]] | None
    user: list[tuple[str, str]] | None
    system: list[tuple[str, str]] | None


class QuickStorage(RDBStorage):
    """`RDBStorage` on PostgreSQL. What it reads is what Optuna's own reads, which the tests compare."""

    def get_trial(self, trial_id: int) -> FrozenTrial:
        rows = self._read(_ONE, trial=trial_id)
        return _frozen(rows[0]) if rows else super().get_trial(trial_id)  # which says that it is gone

    def _get_trials(
        self, study_id: int, states: Container[TrialState] | None, included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:  # fmt: skip
        if states is not None:
            return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        rows = self._read(_SOME, study=study_id, known=list(included_trial_ids), after=trial_id_greater_than)
        if not rows:  # perhaps there is no such study
            return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        return [_frozen(row) for row in rows]

    def _read(self, statement: Any, **values: Any) -> Sequence[_Row]:
        with self.engine.connect() as connection:
            return [_Row(*row) for row in connection.execute(statement, values)]


def _frozen(row: _Row) -> FrozenTrial:
    params = [(name, float(value), _distribution(described)) for name, value, described in row.params or ()]
    return FrozenTrial(
        trial_id=row.trial_id,
        number=row.number,
        state=TrialState[row.state],
        value=None,
        values=[_number(*value) for value in row.values] if row.values else None,
        datetime_start=_local(row.start),
        datetime_complete=_local(row.complete),
        params={name: distribution.to_external_repr(value) for name, value, distribution in params},
        distributions={name: distribution for name, _, distribution in params},
        user_attrs={key: loads(value) for key, value in row.user or ()},
        system_attrs={key: loads(value) for key, value in row.system or ()},
        intermediate_values={step: _number(kind, value) for step, kind, value in row.intermediate or ()},
    )


def _local(stored: datetime | None) -> datetime | None:
    """Optuna stores UTC and shows this machine's time, both without saying so."""
    return stored and stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def _number(kind: str, value: float | None) -> float:
    return _NUMBERS[kind] if value is None else float(value)


@lru_cache(maxsize=256)
def _distribution(described: str) -> BaseDistribution:
    return json_to_distribution(described)
