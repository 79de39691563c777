"""Samplers and families of weights against a real PostgreSQL, with several launchers on one study."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from click.testing import CliRunner

from bdense_core.errors import BadValue
from bdense_core.weights import log_linear
from search.database import Database
from search.export import export_object
from search.figures import save_png, save_to_dashboard
from search.operations_cli import enqueue
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


def test_cma_es_learns_from_what_the_launch_that_it_runs_in_has_finished(databases: list[Database]) -> None:
    stores = launchers(databases, "sampler.kind=cmaes", "sampler.startup_trials=2", "budget.trials=16")
    run_all(stores[:1])
    trials = stores[0].optuna_study.get_trials(deepcopy=False)
    assert max(trial.system_attrs.get("cma:generation", 0) for trial in trials) >= 1


def test_a_grid_point_that_was_lost_is_run_by_its_retry_alone(databases: list[Database]) -> None:
    stores = launchers(databases, "sampler.kind=grid", "sampler.grid_points=3", "budget.trials=9")
    while (claim := stores[0].trials.claim()) and not claim.is_search:
        stores[0].trials.complete(claim.number, 1.0)
    assert claim is not None
    stores[0].trials.fail(claim.number, "its worker died", retry=True)
    run_all(stores)
    complete = [row for row in stores[1].rows() if row.is_search and row.state == "COMPLETE"]
    assert len({tuple(row.params.values()) for row in complete}) == len(complete) == 9
    assert [row.retry_of for row in complete if row.retry_of is not None] == [claim.number]


@pytest.mark.parametrize("family", ["log_quadratic", "free", "annealed", "per_interval"])
def test_every_family_runs_its_proposals_with_their_schedules_and_knows_the_controls(
    databases: list[Database], family: str
) -> None:
    stores = launchers(databases, f"space.family={family}", "budget.trials=6")
    run_all(stores)
    spec = stores[0].study.spec
    searched = [row for row in stores[0].rows() if row.is_search]
    assert [row.state for row in searched] == ["COMPLETE"] * 6
    for row in searched:
        assert row.params.keys() == spec.axes.keys()
        assert row.weights == spec.space.weights(row.params, 4)
        assert row.schedule == spec.space.schedule(row.params, 4, 1)
    known = {trial.user_attrs["role"]: trial.params for trial in stores[1].optuna_study.trials}
    assert known["control:uniform"] == pytest.approx(dict.fromkeys(spec.axes, 0.0), abs=1e-9)
    assert known["control:endpoint_only"] == {}


def test_a_persons_own_proposal_names_the_axes_of_its_family(
    databases: list[Database], database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BDENSE_HOME", str(tmp_path))
    store = launchers(databases, "space.family=annealed", "budget.trials=1")[0]

    def asked(*params: str) -> str | BaseException | None:
        done = CliRunner().invoke(enqueue, ["--study", "t", "--storage", database_url, *params])
        return done.output if done.exit_code == 0 else done.exception

    for params, complaint in (
        (("--param", "a0=0.5", "--a", "2"), "searches a0, a1, and the proposal gives a0, a; give a value for each"),
        (("--param", "a0=0.5", "--param", "a1=9"), r"a1 = 9 lies outside the study's range [-0.5, 3]"),
        (("--param", "a0=0.5", "--param", "a0=1"), "a0 is given twice, as 0.5 and as 1"),
        (("--param", "a0"), "--param wants NAME=VALUE, got 'a0'; for example --param a=1.4"),
    ):
        refused = asked(*params)
        assert isinstance(refused, BadValue)
        assert complaint in str(refused)
    assert "runs with the next launch" in str(asked("--param", "a0=0.5", "--param", "a1=2"))
    run_all([store])
    (own,) = [row for row in store.rows() if row.is_search]
    assert (own.is_enqueued, own.params) == (True, {"a0": 0.5, "a1": 2.0})


@pytest.mark.parametrize("kind", ["median", "percentile", "successive_halving"])
def test_pruning_on_the_surrogate_follows_it_and_not_the_metric(databases: list[Database], kind: str) -> None:
    pruner = (f"pruner.kind={kind}", "pruner.by=surrogate", "pruner.startup_trials=3")
    store, other = launchers(databases, *pruner, "budget.trials=4")
    controls = {claim.number for _ in range(2) if (claim := store.trials.claim())}
    for number in controls:
        assert not store.trials.report(number, 50.0, 1, may_prune=False, surrogate={"1": 5.0})
        store.trials.complete(number, 50.0)
    stopped = []
    for launcher, about in (
        (store, {"surrogate": {"1": 1.0}}),
        (other, {"surrogate": {"1": 9.0}}),
        (store, {"surrogate": {"1": 0.5}}),
        (other, {}),
    ):
        claim = launcher.trials.claim()
        assert claim is not None and claim.is_search
        metric = 100 / about["surrogate"]["1"] if about else 999.0
        stopped.append(launcher.trials.report(claim.number, metric, 1, may_prune=True, **about))
        launcher.trials.complete(claim.number, metric)
    assert stopped == [False, True, False, False]


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
