"""Samplers and families of weights against a real PostgreSQL, with several launchers on one study."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from bdense_core.weights import log_linear
from search.database import Database
from search.export import export_object
from search.figures import save_png, save_to_dashboard
from search.report import notes, show_object, trial_table
from search.storage import Studies, StudyStore
from search.study_file import load_study


@pytest.fixture
def databases(database_url: str) -> Iterator[list[Database]]:
    """Two launchers' connections."""
    opened = [Database(database_url) for _ in range(2)]
    yield opened
    for database in opened:
        database.close()


def launchers(databases: list[Database], *overrides: str) -> list[StudyStore]:
    given = ("seeds.control_repeats=1", "sampler.startup_trials=2", *overrides)
    study = load_study(Path("synthetic.yaml"), name="t", overrides=given)
    return [Studies(database).create_or_resume(study) for database in databases]


def run_all(stores: list[StudyStore], *, at_once: int = 1) -> None:
    """Launchers in turn; each has `at_once` trials in flight, and the score is that of the slope."""
    for store in cycle(stores):
        claims = [claim for _ in range(at_once) if (claim := store.trials.claim())]
        if not claims:
            return
        for claim in claims:
            value = 1 + (claim.weights[-1] / sum(claim.weights) - 0.75) ** 2
            store.trials.report(claim.number, value, 3, may_prune=False)
            store.trials.complete(claim.number, value)


@pytest.mark.parametrize("kind", ["tpe", "gp", "cmaes", "qmc", "random", "grid"])
def test_two_launchers_with_trials_in_flight_never_run_one_proposal_twice(databases: list[Database], kind: str) -> None:
    stores = launchers(databases, f"sampler.kind={kind}", "sampler.grid_points=4", "budget.trials=16")
    run_all(stores, at_once=3)
    searched = [row for row in stores[0].rows() if row.is_search]
    assert [row.state for row in searched] == ["COMPLETE"] * 16
    assert len({tuple(row.params.values()) for row in searched}) == 16


def test_a_grid_point_that_was_lost_is_run_by_its_retry_alone(databases: list[Database]) -> None:
    stores = launchers(databases, "sampler.kind=grid", "sampler.grid_points=3", "budget.trials=9")
    while (claim := stores[0].trials.claim()) and claim.is_control:
        stores[0].trials.complete(claim.number, 1.0)
    assert claim is not None
    stores[0].trials.fail(claim.number, "its worker died", retry=True)
    run_all(stores)
    complete = [row for row in stores[1].rows() if row.is_search and row.state == "COMPLETE"]
    assert len({tuple(row.params.values()) for row in complete}) == len(complete) == 9
    assert [row.retry_of for row in complete if row.retry_of is not None] == [claim.number]


@pytest.mark.parametrize(("family", "axes"), [("log_linear", ["a", "b"]), ("slope", ["a"])])
def test_tables_export_and_figures_know_each_family(
    databases: list[Database], family: str, axes: list[str], tmp_path: Path
) -> None:
    store = launchers(databases, f"space.family={family}", "budget.trials=6")[0]
    run_all([store])
    rows = store.rows()
    exported, shown = export_object(store), show_object(store, rows)
    assert log_linear(exported["a"], exported["b"], 4) == pytest.approx(exported["weights"])
    assert exported["family"] == family
    best = next(trial for trial in shown["trials"] if trial["number"] == exported["trial"])
    assert list(best["params"]) == axes
    assert (best["a"], best["b"]) == (exported["a"], exported["b"])
    headers = [str(column.header) for column in trial_table(store, rows).columns]
    assert headers[2 : 2 + len(axes) + 1] == [*axes, "shares"]
    assert any("importance of the axes, from 6 finished" in line for line in notes(store, rows)) == (len(axes) > 1)
    save_png(store, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    save_to_dashboard(store)
    saved = databases[1].storage.get_study_system_attrs(store.optuna_study._study_id)
    assert any("bdense-map" in key for key in saved)
