"""A launch's conductor between a real PostgreSQL and a worker's results, handed over as Ray Tune does it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.dict import flatten_dict

from bdense_core.methods import Synthetic
from bdense_core.methods.base import with_settings
from search import checkpoints
from search.checkpoints import Checkpoints
from search.progress import Board
from search.scheduling import Conductor
from search.storage import StudyStore
from search.worker import run_trial
from tests.hanging_store import URL, hanging
from tests.patience import PATIENCE_S
from tests.studies import opened, synthetic


class Room:
    """Places without a Ray: there is always one, and whose process is said to start stays there."""

    def __init__(self) -> None:
        self.begun: set[str] = set()
        self.killed: list[str] = []

    def left(self, running: int) -> int:
        return 1

    def waiting(self) -> set[str]:
        return set()

    def starting(self) -> set[str]:
        return self.begun

    def kill(self, tune_id: str) -> None:
        self.killed.append(tune_id)

    def total(self) -> int:
        return 1

    def release_idle(self) -> None: ...


@pytest.fixture
def launched(database_url: str, tmp_path: Path) -> tuple[StudyStore, Conductor]:
    study = synthetic(
        "budget.trials=4", "tune={shift: , flavour: }", "constraints.balance={min: 0.4}", "pruner.kind=none",
        "sampler.kind=random", "method.seconds=0",
    )  # fmt: skip
    store = opened(database_url, study)
    board = Board(study="t", metric="m", trials=4, controls=2, control_runs=1, slots=1)
    places: Any = Room()
    return store, Conductor(store, board, places, cache_root=tmp_path, checkpoints=None)


def run_all(conductor: Conductor) -> Iterator[dict[str, Any]]:
    """Every trial's description, each run to its end."""
    number = 0
    while isinstance(asked := conductor.next(str(number)), dict):
        yield asked["trial"]
        for result in run_trial(asked["trial"]):
            conductor.on_result(str(number), flatten_dict(result))
        number += 1


def test_workers_run_the_method_with_a_trials_own_settings_and_its_figures_come_back(
    launched: tuple[StudyStore, Conductor],
) -> None:
    store, conductor = launched
    given = list(run_all(conductor))
    rows = store.rows()
    assert conductor.fatal is None and [row.state for row in rows] == ["COMPLETE"] * 6
    for row, trial in zip(rows, given, strict=True):
        method = with_settings(Synthetic(seconds=0), row.settings)
        assert (trial["method"]["shift"], trial["method"]["flavour"]) == (method.shift, method.flavour)
        assert row.value == pytest.approx(method.truth(row.weights), abs=0.3), "0.3 is six of its spreads"
        assert row.metrics == {"balance": pytest.approx(1 - row.shares[-1])}
        assert row.violated == (("balance",) if row.metrics["balance"] < 0.4 else ())
    assert {row.violated for row in rows} == {(), ("balance",)}
    assert any(row.settings["flavour"] == "bitter" for row in rows)


def conductor_of(store: StudyStore, places: Any, folder: Path, kept_at: Checkpoints | None = None) -> Conductor:
    board = Board(study="t", metric="m", trials=4, controls=2, control_runs=1, slots=1)
    return Conductor(store, board, places, cache_root=folder, checkpoints=kept_at)


def test_a_store_that_hangs_holds_no_launcher_up(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while its trials run, which need their heartbeats, nor when somebody wants it to end."""
    monkeypatch.setattr(checkpoints, "LAST_SWEEP_WITHIN_S", PATIENCE_S)
    store = opened(database_url, synthetic("budget.trials=2", "pruner.kind=none", "method.seconds=0"))
    with hanging("ls") as hung:
        conductor = conductor_of(store, Room(), tmp_path, Checkpoints(URL))
        for trial in run_all(conductor):
            trial["checkpoint"] = None  # what a store that hangs means to workers is another matter
        assert store.is_done() and conductor.fatal is None
        conductor.stop_requested = True
        conductor.give_back_all()
        assert (hung.asked, hung.answered) == (["ls"], [])


def test_the_state_of_trials_that_have_ended_is_gone_when_a_launch_is(database_url: str, tmp_path: Path) -> None:
    store = opened(database_url, synthetic("budget.trials=1", "pruner.kind=none", "method.seconds=0"))
    kept = Checkpoints(tmp_path / "kept")
    conductor = conductor_of(store, Room(), tmp_path, kept)
    left = [Path(trial["checkpoint"]) for trial in run_all(conductor)]
    assert any(folder.exists() for folder in left)
    conductor.give_back_all()
    assert kept.trials(store.key) == []


def test_a_trial_that_loses_its_lease_before_it_has_begun_is_stopped_at_once(database_url: str, tmp_path: Path) -> None:
    store = opened(database_url, synthetic("budget.trials=4", "lease.heartbeat_s=1", "lease.grace_s=60"))
    places = Room()
    conductor = conductor_of(store, places, tmp_path)
    assert isinstance(conductor.next("first"), dict)
    places.begun = {"first"}
    (number,) = store.trials.live
    trial = store.optuna_study.get_trials()[number]
    store.database.storage.set_trial_user_attr(trial._trial_id, "owner", "b|elsewhere|1|1")
    time.sleep(0.5)  # until the next heartbeat is due
    conductor.tick()
    assert places.killed == ["first"] and conductor.fatal is None
    assert conductor.give_back_all() == 0, "it is none of ours"
    assert store.rows()[number].owner == "b|elsewhere|1|1"


def test_a_worker_with_other_packages_trains_nothing_and_costs_the_trial_no_attempt(
    database_url: str, tmp_path: Path
) -> None:
    """A trial may start on a node that has just joined, before the node is asked what it has."""
    store = opened(database_url, synthetic("budget.trials=1"))
    conductor = conductor_of(store, Room(), tmp_path)
    asked = conductor.next("first")
    assert isinstance(asked, dict)
    trial = asked["trial"]
    trial["versions"] = trial["versions"] | {"torch": "0.0"}
    (result,) = run_trial(trial)
    conductor.on_result("first", flatten_dict(result))
    assert conductor.fatal is not None and "(the launcher 0.0); install the same code and packages" in conductor.fatal
    assert conductor.give_back_all() == 1
    assert {(row.state, row.retry_of) for row in store.rows()} == {("WAITING", None)}
