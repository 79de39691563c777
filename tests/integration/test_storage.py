"""Studies in a real PostgreSQL: created, resumed, edited, steered, deleted."""

import json
import logging
from pathlib import Path

import cloudpickle
import optuna
import pytest
from click.testing import CliRunner

from bdense_core.errors import BadValue, ConfigError
from bdense_core.methods import Synthetic
from bdense_core.methods.base import Control
from search.cli import commands
from search.database import Database
from search.errors import StudyBusy, StudyExists, StudyNotFound, StudyUnreadable
from search.storage import Studies
from tests.studies import opened, run_all, run_one, states, synthetic


def studies(url: str) -> Studies:
    return Studies(Database(url))


def test_a_resumed_study_asks_only_for_what_is_missing(database_url: str) -> None:
    run_all(opened(database_url, synthetic("budget.trials=3")))
    again = opened(database_url, synthetic("budget.trials=5"))
    run_all(again)
    assert states(again)["search", "COMPLETE"] == 5
    assert sum(states(again).values()) == 7
    values = {tuple(row.params.values()) for row in again.rows() if row.is_search}
    assert len(values) == 5, "the sampler repeated a random proposal after the restart"


def test_controls_carry_their_weights_and_parameters_only_where_the_space_holds_them(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=0"))
    run_all(store)
    rows = {row.role: row for row in store.rows()}
    assert rows["control:endpoint_only"].weights == (0, 0, 0, 1)
    assert rows["control:endpoint_only"].params == {}
    assert rows["control:uniform"].weights == (0.25,) * 4
    assert rows["control:uniform"].params == pytest.approx({"a": 0, "b": -1.3862943611198906})


def test_controls_are_known_to_the_sampler_with_the_settings_that_they_run_with(database_url: str) -> None:
    """The study's own shift is 0, and lies within the range in the first study alone."""
    for name, low, is_known in (("in", 0.0, True), ("out", 0.25, False)):
        tuned = synthetic("budget.trials=0", f"tune={{shift: [{low}, 1], flavour: }}", name=name)
        store = opened(database_url, tuned)
        run_all(store)
        rows = {row.role: row for row in store.rows()}
        known = {trial.user_attrs["role"]: trial.params for trial in store.optuna_study.get_trials()}
        assert rows["control:uniform"].settings == {"shift": 0.0, "flavour": "plain"}
        expected = {"a": 0, "b": pytest.approx(-1.3862943611198906), "shift": 0.0, "flavour": "plain"}
        assert rows["control:uniform"].params == expected, "what it was is shown in any case"
        assert known["control:uniform"] == (expected if is_known else {})
        assert known["control:endpoint_only"] == {}


def test_a_control_of_its_own_settings_runs_with_them_and_is_no_point_of_the_search(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = {
        "bitter": Control(weights=(0.25,) * 4, settings={"flavour": "bitter"}),
        "untrained": Control(weights=(0.25,) * 4, is_trained=False),
        "uniform": Control(weights=(0.25,) * 4),
    }
    monkeypatch.setattr(Synthetic, "controls", lambda _: controls)
    store = opened(database_url, synthetic("budget.trials=0", "tune={shift: }"))
    claims = {claim.role: claim for _ in controls if (claim := store.trials.claim()) is not None}
    assert claims["control:bitter"].settings == {"flavour": "bitter", "shift": 0.0}
    rows = {row.role.removeprefix("control:"): row for row in store.rows()}
    assert {name: row.is_trained for name, row in rows.items()} == {"bitter": True, "untrained": False, "uniform": True}
    known = {trial.user_attrs["role"].partition(":")[2]: trial.params for trial in store.optuna_study.get_trials()}
    assert [name for name, params in known.items() if params] == ["uniform"]


def test_other_settings_under_a_taken_name_change_nothing(database_url: str) -> None:
    before = opened(database_url, synthetic()).stored_spec
    with pytest.raises(StudyExists, match=r"method\.noise: stored 0\.05, now 0\.5.*space\.a"):
        opened(database_url, synthetic("method.noise=0.5", "space.a=[0, 1]"))
    assert studies(database_url).open("t").stored_spec == before


def test_a_control_that_failed_for_good_is_not_run_again_and_a_lost_one_is(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=0", "lease.max_retries=0"))
    for _ in range(2):
        claim = store.trials.claim()
        assert claim is not None
        store.trials.fail(claim.number, "said the test", retry=claim.role == "control:uniform")
    again = opened(database_url, synthetic("budget.trials=0"))
    assert states(again) == {
        ("control:endpoint_only", "FAIL"): 1,
        ("control:uniform", "FAIL"): 1,
        ("control:uniform", "WAITING"): 1,
    }


def test_an_edit_survives_a_launch_of_the_same_file_and_gives_way_to_a_changed_one(database_url: str) -> None:
    opened(database_url, synthetic("budget.trials=3")).edit({"budget.trials": 9, "lease.grace_s": 77})
    again = opened(database_url, synthetic("budget.trials=3"))
    assert again.kept == {"budget.trials": 9, "lease.grace_s": 77}
    assert (again.study.spec.budget.trials, again.study.spec.lease.grace_s) == (9, 77)
    changed = opened(database_url, synthetic("budget.trials=5"))
    assert (changed.study.spec.budget.trials, changed.study.spec.lease.grace_s) == (5, 77)
    assert studies(database_url).open("t").study.spec.budget.trials == 5


def test_an_edit_survives_a_launch_by_the_studys_name_and_the_file_after_it(database_url: str) -> None:
    by_name = studies(database_url)
    opened(database_url, synthetic("budget.trials=3")).edit({"budget.trials": 9, "lease.grace_s": 77})
    again = by_name.create_or_resume(by_name.open("t").study, said=())
    assert again.study.spec.budget.trials == 9 and again.kept == again.changed == {}
    by_file = opened(database_url, synthetic("budget.trials=3"))
    assert by_file.kept == {"budget.trials": 9, "lease.grace_s": 77} and by_file.changed == {}
    said = {"budget.trials": 4, "checkpoints": {"every_s": 7.0}}  # as by --trials and --set
    by_name.create_or_resume(by_name.open("t").study.edited(said), said=said)
    by_file = opened(database_url, synthetic("budget.trials=4", "checkpoints.every_s=7"))
    assert by_file.kept == {"lease.grace_s": 77} and by_file.changed == {}


def test_a_running_launcher_follows_edits_and_orders(database_url: str) -> None:
    launcher, person = opened(database_url, synthetic("budget.trials=3")), studies(database_url).open("t")
    before = launcher.follow()
    assert not before.paused
    person.edit({"budget.trials": 9})
    person.give_orders(paused=True)
    assert launcher.follow().paused and launcher.study.spec.budget.trials == 9
    person.give_orders(paused=False)
    person.stop()
    after = launcher.follow()
    assert not after.paused and after.stop != before.stop


@pytest.mark.parametrize(
    "edit",
    [
        {"method.noise": 0.5},
        {"space.a": [0, 1]},
        {"budget.every_kimg": 2},
        {"name": "x"},
        {"tune.shift": None},
        {"constraints.balance.max": 0.5},
    ],
)
def test_what_results_depend_on_cannot_be_edited(database_url: str, edit: dict[str, object]) -> None:
    store = opened(database_url, synthetic())
    before = store.stored_spec
    with pytest.raises(BadValue, match=r"cannot be changed.*budget\.trials"):
        store.edit(edit)
    assert store.stored_spec == before


def test_an_edit_to_nonsense_changes_nothing(database_url: str) -> None:
    store = opened(database_url, synthetic())
    before = store.stored_spec
    for edit in ({"budget.trials": -1}, {"lease.grace_s": 1}, {"lease.nonsense": 1}, {"resources.gpus": 1}):
        with pytest.raises(ConfigError):
            store.edit(edit)  # type: ignore[arg-type]
    assert store.stored_spec == before


@pytest.mark.parametrize("params", [{"a": 1.0}, {"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 99.0, "b": 0.0}])
def test_a_proposal_that_the_space_does_not_hold_is_refused(database_url: str, params: dict[str, float]) -> None:
    store = opened(database_url, synthetic("budget.trials=0"))
    with pytest.raises(BadValue):
        store.enqueue(params)
    assert len(store.rows()) == 2


def test_a_proposal_of_a_persons_own_has_settings_too_as_text_or_as_they_are(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=2", "tune={shift: [0, 0.5], flavour: }"))
    given = {"a": "1.5", "b": -1, "shift": "2.5e-1", "flavour": "bitter"}
    store.enqueue(given)
    for wrong, complaint in (
        ({"shift": 0.75}, r"shift = 0\.75 lies outside the study's range \[0, 0\.5\]"),
        ({"flavour": "sour"}, "flavour is 'sour'; choose one of plain, bitter"),
        ({"a": "steep"}, "a is 'steep'; give a finite number"),
        ({"a": "nan"}, "a is 'nan'; give a finite number"),
    ):
        with pytest.raises(BadValue, match=complaint):
            store.enqueue(given | wrong)
    with pytest.raises(BadValue, match="searches a, b, shift, flavour, and the proposal gives a, b; give a value for"):
        store.enqueue({"a": 1.0, "b": -1.0})
    run_all(store)
    own, other = (row for row in store.rows() if row.is_search)
    assert own.is_enqueued and own.params == {"a": 1.5, "b": -1.0, "shift": 0.25, "flavour": "bitter"}
    assert own.settings == {"shift": 0.25, "flavour": "bitter"} and other.params.keys() == own.params.keys()


def test_the_best_of_a_listed_study_keeps_its_constraints(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=2", "constraints.balance.max=0.5"))
    run_one(store), run_one(store)
    for value, balance in ((1.0, 0.75), (2.0, 0.25)):
        claim = store.trials.claim()
        assert claim is not None
        store.trials.complete(claim.number, value, metrics={"balance": balance})
    assert store.summary().best == 2.0


def test_a_study_is_deleted_unless_its_trials_run(database_url: str) -> None:
    store = opened(database_url, synthetic())
    claim = store.trials.claim()
    assert claim is not None
    with pytest.raises(StudyBusy, match="bdense-weights stop --study t"):
        studies(database_url).delete("t")
    store.trials.give_back(claim.number)
    studies(database_url).delete("t")
    assert studies(database_url).names() == []
    with pytest.raises(StudyNotFound):
        studies(database_url).delete("t")


def test_studies_of_one_name_have_different_keys_in_their_time(database_url: str) -> None:
    first = opened(database_url, synthetic()).key
    assert opened(database_url, synthetic()).key == first
    studies(database_url).delete("t")
    assert opened(database_url, synthetic()).key != first


def test_an_unknown_study_lists_the_known_ones(database_url: str) -> None:
    opened(database_url, synthetic(name="alpha"))
    with pytest.raises(StudyNotFound, match=r"no study 'beta'.*known studies: alpha"):
        studies(database_url).open("beta")


def test_a_half_created_study_is_taken_up(database_url: str) -> None:
    optuna.create_study(storage=Database(database_url).storage, study_name="t")
    run_all(opened(database_url, synthetic("budget.trials=1")))
    assert studies(database_url).open("t").is_done()


def test_a_study_of_an_older_version_is_read_and_goes_on(database_url: str) -> None:
    """Stored before sections for checkpoints, outages and families were there, its rows without versions."""
    store = opened(database_url, synthetic("budget.trials=1"))
    run_all(store)
    spec = json.loads(json.dumps(store.stored_spec))
    del spec["checkpoints"], spec["lease"]["outage_s"], spec["sampler"]["grid_points"]
    store.optuna_study.set_user_attr("bdense:spec", spec)
    with store.database.transaction() as connection:
        connection.exec_driver_sql("DELETE FROM trial_user_attributes WHERE key IN ('code', 'progress')")
        connection.exec_driver_sql("DELETE FROM study_user_attributes WHERE key = 'bdense:launched'")
    again = opened(database_url, synthetic("budget.trials=2"))
    assert [row.value for row in again.rows()] == [4.0, 4.0, 4.0]
    assert run_one(again) == 3 and again.is_done()


@pytest.mark.parametrize(
    "newer",
    [
        {"lease": {"patience": 1}},
        {"method": {"kind": "unheard of"}},
        {"files": {"teacher": {"path": "t", "sha256": "0", "signed_by": "somebody"}}},
    ],
)
def test_a_study_of_a_newer_version_is_named_and_leaves_the_others_listed(
    database_url: str, newer: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    opened(database_url, synthetic(name="old"))
    store = opened(database_url, synthetic(name="new"))
    store.optuna_study.set_user_attr("bdense:spec", store.stored_spec | newer)
    store.optuna_study.set_user_attr("bdense:code_version", "9.0.0")
    with pytest.raises(StudyUnreadable, match=r"study 'new' cannot be read: .*9\.0\.0 made it, this is"):
        studies(database_url).open("new")
    caplog.set_level(logging.INFO)
    done = CliRunner().invoke(commands, ["list", "--format", "json", "--storage", database_url])
    assert [study["name"] for study in json.loads(done.stdout)] == ["old"]
    assert "note: new is left out: study 'new' cannot be read" in caplog.text


def test_nothing_that_ray_pickles_holds_the_database(database_url: str, tmp_path: Path) -> None:
    from search.placement import Places
    from search.progress import Board
    from search.scheduling import AskOptuna, CarryDecisions, Conductor

    store = opened(database_url, synthetic())
    board = Board(study="t", metric="m", trials=1, controls=1, control_runs=1, slots=1)
    places = Places(store.study.spec.resources)
    conductor = Conductor(store, board, places, cache_root=tmp_path, checkpoints=None)
    for thing in (AskOptuna(conductor), CarryDecisions(conductor, places)):
        assert b"postgres" not in cloudpickle.dumps(thing)
    for unpicklable in (store.database, store, store.trials, conductor):
        with pytest.raises(TypeError, match="never pickled"):
            cloudpickle.dumps(unpicklable)


def test_the_study_of_a_row_is_read_once_it_has_ended(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1"))
    run_all(store)
    first, second = store.rows(), store.rows()
    assert all(one is other for one, other in zip(first, second, strict=True))
