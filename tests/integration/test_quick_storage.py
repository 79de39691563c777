"""What is read by one statement is what Optuna's own storage reads."""

import math
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.quick_storage import QuickStorage

_SPACE: dict[str, Any] = {
    "z": FloatDistribution(-1.0, 3.0),
    "rate": FloatDistribution(1e-5, 1.0, log=True),
    "even": FloatDistribution(0.0, 1.0, step=0.25),
    "count": IntDistribution(1, 64, log=True),
    "kind": CategoricalDistribution(["a", 'quo"te', None, True, 3, 0.5]),
}
_VALUES: dict[str, Any] = {"z": 0.1 + 0.2, "rate": 1 / 3e4, "even": 0.75, "count": 17, "kind": 'quo"te'}


def described(trials: list[FrozenTrial]) -> list[str]:
    """All there is of trials, nan too, which equals nothing; attributes in any order."""
    loose = ("_user_attrs", "_system_attrs", "intermediate_values")
    return [
        repr({key: sorted(value.items()) if key in loose else value for key, value in vars(trial).items()})
        for trial in trials
    ]


@pytest.fixture
def study(database_url: str, zone: None) -> optuna.Study:
    study = optuna.create_study(storage=RDBStorage(database_url), directions=["minimize", "maximize"])
    attributes = {"text": "é \\ \" 'x' ☃", "nested": {"list": [1, 2.5, None, {"a": True}]}, "none": None}
    whole: dict[str, Any] = {"params": _VALUES, "distributions": _SPACE, "user_attrs": attributes}
    steps = {0: 1e300, 3: math.nan, 2: math.inf, 1: -math.inf, 10: 0.1}
    some = [{**_VALUES, "kind": choice} for choice in (None, True, 3, 0.5)] + [{**_VALUES, "z": 1.0}]
    study.ask({"z": _SPACE["z"]}).set_user_attr("running", "yes")
    study.add_trials(
        [
            create_trial(**whole, values=[5e-324, math.inf], intermediate_values=steps, system_attrs={"s": [1]}),
            create_trial(**whole, values=[-math.inf, -0.0], state=TrialState.PRUNED),
            *(create_trial(params=params, distributions=_SPACE, values=[1, 2]) for params in some),
            create_trial(state=TrialState.FAIL),
            create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": {"z": 0.5}}),
        ]
    )
    return study


def test_whole_studies_and_single_trials_are_read_alike(study: optuna.Study, database_url: str) -> None:
    quick, own = QuickStorage(database_url), RDBStorage(database_url)
    expected = own.get_all_trials(study._study_id)
    assert {trial.state for trial in expected} == set(TrialState)
    assert described(quick.get_all_trials(study._study_id)) == described(expected)
    ids = [trial._trial_id for trial in expected]
    assert described([quick.get_trial(each) for each in ids]) == described(expected)
    for states in ((TrialState.COMPLETE,), (TrialState.RUNNING, TrialState.WAITING)):
        assert described(quick.get_all_trials(study._study_id, states=states)) == described(
            own.get_all_trials(study._study_id, states=states)
        )
    for known, after in (({ids[1], ids[3]}, ids[5]), (set(), ids[-1]), ({ids[0], ids[-1]}, -1)):
        found, wanted = (each._get_trials(study._study_id, None, known, after) for each in (quick, own))
        assert described(found) == described(wanted)


def test_what_is_not_there_is_told_of_as_optuna_does(study: optuna.Study, database_url: str) -> None:
    quick, own = QuickStorage(database_url), RDBStorage(database_url)
    empty = optuna.create_study(storage=own)
    assert quick.get_all_trials(empty._study_id) == []
    for storage in (quick, own):
        with pytest.raises(KeyError, match="Record does not exist"):
            storage.get_all_trials(10**6)
        with pytest.raises(KeyError, match="Record does not exist"):
            storage.get_trial(10**6)


def test_cached_reading_follows_trials_as_they_change(study: optuna.Study, database_url: str) -> None:
    """Optuna's cache on top of it, beside a storage without any."""
    cached = optuna.load_study(study_name=study.study_name, storage=QuickStorage(database_url))
    own = RDBStorage(database_url)
    for _ in range(3):
        trial = study.ask({"z": _SPACE["z"]})
        trial.set_user_attr("owner", "somebody")
        assert described(cached.get_trials()) == described(own.get_all_trials(study._study_id))
        study.tell(trial, [1.0, 2.0])
    assert described(cached.get_trials()) == described(own.get_all_trials(study._study_id))
