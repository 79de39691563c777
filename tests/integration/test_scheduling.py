"""A launch's conductor between a real PostgreSQL and a worker's results, handed over as Ray Tune does it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.dict import flatten_dict

from bdense_core.methods import Synthetic
from bdense_core.methods.base import with_settings
from search.progress import Board
from search.scheduling import Conductor
from search.storage import StudyStore
from search.worker import run_trial
from tests.studies import opened, synthetic


class Room:
    """Places without a Ray: there is always one."""

    def left(self, running: int) -> int:
        return 1

    def waiting(self) -> set[str]:
        return set()

    starting = waiting

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
