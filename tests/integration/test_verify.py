"""Exports of real studies in a real PostgreSQL, and what `verify` says of them in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file
from sqlalchemy import text

from bdense_core.distill import distill
from bdense_core.errors import BadValue
from bdense_core.methods.base import with_settings
from bdense_core.task import Score
from bdense_core.weights import weights_at
from search.database import Database
from search.derived import confirmation, transfers
from search.errors import NothingFinished
from search.export import export_object
from search.settings import Settings
from search.spec import Study
from search.storage import Studies, StudyStore
from search.study_file import load_study, studies_folder
from search.verify import verify
from search.weights_file import seal_of
from tests.patience import PATIENCE_S

BETTER = ("method.best_share=0.9", "method.noise=0.001")
"""A known function whose best weights are clearly better than every control."""
NOISE = ("method.curvature=0", "method.noise=0.05")
"""All weights are alike."""


@pytest.fixture
def studies(database_url: str) -> Iterator[Studies]:
    database = Database(database_url)
    yield Studies(database)
    database.close()


def synthetic(*overrides: str, name: str = "t") -> Study:
    given = ("method.seconds=0", "budget.trials=6", "seeds.control_repeats=3", *overrides)
    return load_study(studies_folder() / "synthetic.yaml", name=name, overrides=given)


def run(store: StudyStore, cache: Path) -> StudyStore:
    """All trials, as a launcher runs them."""
    while claim := store.trials.claim():
        task = store.study.task(
            claim.weights, claim.seeds[0], cache_root=cache, schedule=claim.schedule, rule=claim.rule,
            is_search=claim.is_search,
        )  # fmt: skip
        runs = distill(with_settings(store.study.spec.method, claim.settings), task, claim.seeds[1:])
        *_, last = (event for event in runs if isinstance(event, Score))
        store.trials.report(claim.number, last.value, last.kimg, may_prune=False)
        compared = store.study.trial_seeds()
        further = [value for seed, kimg, value in last.repeats if kimg == last.kimg and seed in compared]
        store.trials.complete(
            claim.number, mean([last.value, *further]), repeats=[list(score) for score in last.repeats],
            evaluations=list(last.evaluations), metrics=last.metrics,
        )  # fmt: skip
    return store


def searched(studies: Studies, study: Study, cache: Path) -> StudyStore:
    return run(studies.create_or_resume(study), cache)


def confirmed(studies: Studies, study: Study, cache: Path) -> StudyStore:
    """The study with its confirmation beside it."""
    store = searched(studies, study, cache)
    searched(studies, confirmation(studies, study.name, top=3, seeds=5), cache)
    return store


def command(*arguments: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A command in a fresh process, in a home of its own."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "OPTUNA_", "BDENSE_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "search.cli", *arguments],
        env=environment | {"BDENSE_HOME": str(home)} | more,
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def checks(file: Path, home: Path, *options: str) -> tuple[int, list[dict[str, str]], str]:
    done = command("verify", str(file), "--format", "json", *options, home=home)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_confirmed_winner_is_exported_and_verified_in_a_fresh_process(studies: Studies, tmp_path: Path) -> None:
    store = confirmed(studies, synthetic(*BETTER), tmp_path)
    content = export_object(store, top=2)
    assert content["confirmed"] and content["verdict"] == content["confirmation"]["verdict"]
    assert content["name"] == content["confirmation"]["winner"] == content["candidates"][0]["name"]
    assert content["confirmation"]["seeds"] == content["seeds"]["confirmation"] == [1000, 1001, 1002, 1003, 1004]
    assert content["sha256"] == seal_of(content)
    assert set(content["provenance"]["packages"]) >= {"python", "torch", "numpy", "optuna", "ray", "bdense-search"}
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(content))
    code, found, errors = checks(file, tmp_path / "home")
    assert code == 0, errors
    assert {check["outcome"] for check in found} == {"passed"}
    assert "equal to the last bit" in next(check["detail"] for check in found if check["name"] == "rerun")


def test_the_export_has_the_versions_that_ran_the_trial_and_not_those_that_export_it(
    studies: Studies, database_url: str, tmp_path: Path
) -> None:
    store = searched(studies, synthetic(*BETTER), tmp_path)
    number = export_object(store)["trial"]
    older = {"python": "3.11.0", "torch": "1.0", "numpy": "1.0", "bdense-search": "0.0"}
    with store.database.transaction() as connection:
        connection.execute(
            text("UPDATE trial_user_attributes SET value_json = :value FROM trials WHERE key = 'packages' AND "
                 "trials.trial_id = trial_user_attributes.trial_id AND trials.number = :number"),
            {"value": json.dumps(older), "number": number},
        )  # fmt: skip
    later = Database(database_url)  # as another process reads it
    content = export_object(Studies(later).open("t"))
    later.close()
    assert content["provenance"]["packages"] == older
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(content))
    _, found, _ = checks(file, tmp_path / "home", "--quick")
    (version,) = (check for check in found if check["name"] == "version")
    assert version["outcome"] == "warning" and "torch 1.0 there" in version["detail"]


def test_pure_noise_exports_the_best_of_the_confirmation_unconfirmed_with_its_verdict(
    studies: Studies, database_url: str, tmp_path: Path
) -> None:
    confirmed(studies, synthetic(*NOISE), tmp_path)
    done = command("export", "--study", "t", home=tmp_path / "home", OPTUNA_STORAGE=database_url)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert not content["confirmed"]
    assert content["verdict"].startswith("not distinguishable from")
    assert f"warning: {content['verdict']}" in done.stderr.splitlines()
    rerun: dict[str, list[float]] = {}
    for row in studies.open("t.confirm").rows():
        rerun.setdefault(row.arm or "", []).append(row.value or 0.0)
    means = {name: mean(values) for name, values in rerun.items() if name.startswith("trial-")}
    assert content["name"] == min(means, key=means.__getitem__)


def test_candidates_stand_by_their_fresh_seeds_and_those_without_behind_them(studies: Studies, tmp_path: Path) -> None:
    """The search's own score flatters what was picked for it."""
    store = confirmed(studies, synthetic(*NOISE, "sampler.seed=2"), tmp_path)
    content = export_object(store, top=10)
    rerun = [arm["name"] for arm in content["confirmation"]["arms"] if arm["trial"] is not None]
    names = [candidate["name"] for candidate in content["candidates"]]
    assert (len(names), names[:3]) == (6, rerun), "the confirmation lists them by their means"
    values = [candidate["score"]["value"] for candidate in content["candidates"]]
    assert values[3:] == sorted(values[3:])
    assert values[:3] != sorted(values[:3]), "else this study shows nothing; take another seed"
    (chosen, *_) = export_object(store, top=2, trial=content["candidates"][4]["trial"])["candidates"]
    assert chosen["name"] == names[4]


def test_the_command_writes_each_form(studies: Studies, database_url: str, tmp_path: Path) -> None:
    weights = list(export_object(searched(studies, synthetic(*BETTER), tmp_path))["weights"])

    def export(*options: str) -> subprocess.CompletedProcess[str]:
        return command("export", "--study", "t", *options, home=tmp_path / "home", OPTUNA_STORAGE=database_url)

    homeless = export("--format", "safetensors")
    assert homeless.returncode == 2 and "give --output FILE.safetensors" in homeless.stderr
    file = tmp_path / "weights.safetensors"
    assert export("--format", "safetensors", "--output", str(file)).returncode == 0
    assert load_file(file)["weights"].tolist() == weights
    names: dict[str, Any] = {}
    exec(export("--format", "python").stdout, names)
    assert [names["weights"](k) for k in range(4)] == weights
    assert yaml.safe_load(export("--format", "yaml").stdout)["weights"] == weights


def test_a_study_without_a_confirmation_claims_none(studies: Studies, tmp_path: Path) -> None:
    content = export_object(searched(studies, synthetic(*BETTER), tmp_path), top=10)
    assert (content["confirmed"], content["confirmation"], content["transfer"]) == (False, None, [])
    assert len(content["candidates"]) == 6
    values = [candidate["score"]["value"] for candidate in content["candidates"]]
    assert values == sorted(values)


def test_another_trial_than_the_best_may_be_exported(studies: Studies, database_url: str, tmp_path: Path) -> None:
    store = confirmed(studies, synthetic(*BETTER), tmp_path)
    worst = max((row for row in store.rows() if row.is_search), key=lambda row: row.value or 0)
    content = export_object(store, trial=worst.number)
    assert (content["trial"], content["weights"], content["confirmed"]) == (worst.number, list(worst.weights), False)
    asked = ("export", "--study", "t", "--candidate", str(worst.number))
    done = command(*asked, home=tmp_path / "home", OPTUNA_STORAGE=database_url)
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    winner = content["confirmation"]["winner"]
    assert warning.startswith(f"warning: trial-{worst.number} is not confirmed; {winner} is better than every control")
    with pytest.raises(BadValue, match="trial 99 of study 't' is no searched trial"):
        export_object(store, trial=99)
    with pytest.raises(BadValue, match="trial 0 of study 't' is no searched trial"):
        export_object(store, trial=0)  # a control


def test_a_comparison_is_not_exported_but_what_it_compares(studies: Studies, tmp_path: Path) -> None:
    confirmed(studies, synthetic(*BETTER), tmp_path)
    with pytest.raises(BadValue, match="export that one: --study t"):
        export_object(studies.open("t.confirm"))
    with pytest.raises(NothingFinished):
        export_object(studies.create_or_resume(synthetic(name="empty")))


def test_a_transfer_lies_in_the_file_with_all_that_its_verdict_follows_from(studies: Studies, tmp_path: Path) -> None:
    store = confirmed(studies, synthetic(*BETTER), tmp_path)
    target = tmp_path / "target.yaml"
    target.write_text("name: target\nmethod: {kind: synthetic, best_share: 0.6, noise: 0.001}\n")
    exported = export_object(store, top=3)
    for study in transfers(exported, target, nfe=(), top=2, seeds=3, models=tmp_path):
        searched(studies, study, tmp_path)
    content = export_object(store)
    (table,) = content["transfer"]
    assert (table["target"], table["nfe"], table["metric"]) == ("target", 0, "synthetic-score")
    assert len([arm for arm in table["arms"] if not arm["is_control"]]) == 2
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(content))
    assert checks(file, tmp_path / "home", "--quick")[0] == 0

    table["arms"][0]["gains"] = [] if table["arms"][0]["gains"] else [{"control": "uniform"}]
    file.write_text(json.dumps(content | {"sha256": seal_of(content)}))
    code, found, _ = checks(file, tmp_path / "home", "--quick")
    assert code == 1
    assert [check["name"] for check in found if check["outcome"] == "failed"] == ["verdict"]


def test_comparisons_of_an_earlier_study_of_that_name_are_not_this_ones(studies: Studies, tmp_path: Path) -> None:
    confirmed(studies, synthetic(*BETTER), tmp_path)
    studies.delete("t")
    store = searched(studies, synthetic(*BETTER, "sampler.seed=7"), tmp_path)
    assert export_object(store)["confirmation"] is None


def test_weights_that_change_in_training_carry_their_schedule(studies: Studies, tmp_path: Path) -> None:
    content = export_object(searched(studies, synthetic("space.family=annealed"), tmp_path))
    assert content["family"] == "annealed" and len(content["schedule"]) >= 2
    slopes = [content["params"]["a0"], content["params"]["a1"]]
    for done, slope in zip((0.0, 1.0), slopes, strict=True):
        (weights,) = weights_at(content["schedule"], content["weights"], done, 1)
        ratios = [later / earlier for earlier, later in pairwise(weights)]
        assert ratios == pytest.approx([2.718281828459045**slope] * 3)
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(content))
    code, _, errors = checks(file, tmp_path / "home")
    assert code == 0, errors


TUNED = ("tune={shift: [0, 1], flavour: [plain, bitter]}", "constraints={balance: {max: 0.3}}", "method.noise=0.001")
"""A known function with settings to search: 0 and plain are best."""


def test_settings_and_figures_lie_in_the_file_and_the_trial_runs_again_with_them(
    studies: Studies, tmp_path: Path
) -> None:
    store = confirmed(studies, synthetic(*TUNED, "method.best_share=0.9"), tmp_path)
    content = export_object(store, top=3)
    row = next(row for row in store.rows() if row.number == content["trial"])
    assert content["terms"] == ["branch.1", "branch.2", "branch.3", "branch.4"]
    assert content["settings"] == {"shift": row.params["shift"], "flavour": row.params["flavour"]}
    assert content["metrics"] == {"balance": pytest.approx(1 - content["shares"][-1])}
    assert {entry["name"]: entry["settings"] for entry in content["controls"]}["uniform"] == {
        "shift": 0.0, "flavour": "plain",
    }  # fmt: skip
    table = content["confirmation"]["metrics"]["balance"]
    assert table["uniform"]["mean"]["mean"] == pytest.approx(0.75)
    assert [item["control"] for item in table["uniform"]["differences"]] == ["endpoint_only"]
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(content))
    code, found, errors = checks(file, tmp_path / "home")
    assert code == 0, errors
    outcomes = {check["name"]: check["outcome"] for check in found}
    assert outcomes == dict.fromkeys(outcomes, "passed") and "figures" in outcomes


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("shift", 0.5, "settings is"),
        ("flavour", "sour", "lies not in what the study searches"),
        ("shift", 1.5, "lies not in what the study searches"),
        ("shift", "0.5", "lies not in what the study searches"),
        ("shift", None, "lies not in what the study searches"),
    ],
)
def test_a_setting_that_the_search_did_not_propose_is_found(
    studies: Studies, tmp_path: Path, key: str, value: object, words: str
) -> None:
    """In the settings alone, or, as a careful forger does it, in the parameters as well."""
    content = export_object(searched(studies, synthetic(*TUNED), tmp_path))
    for entry in (content, content["candidates"][0]):
        for part in ("settings", *(["params"] if words != "settings is" else [])):
            entry[part] = {name: old for name, old in entry[part].items() if name != key}
            entry[part] |= {} if value is None else {key: value}
    settings = Settings.load(home=tmp_path, environ={})
    found = list(verify(content | {"sha256": seal_of(content)}, settings, quick=True))
    (fault,) = [check for check in found if check.outcome == "failed"]
    assert (fault.name, words in fault.detail) == ("weights", True)


def test_a_trial_that_violates_a_constraint_is_exported_only_when_it_is_asked_for(
    studies: Studies, database_url: str, tmp_path: Path
) -> None:
    """Whatever is best by far has a last share of 0.4, and with it a balance of 0.6."""
    of = synthetic(*TUNED, "method.best_share=0.4", "budget.trials=12", "sampler.kind=random")
    store = confirmed(studies, of, tmp_path)
    rows = [row for row in store.rows() if row.is_search]
    best = min(rows, key=lambda row: row.value or 0)
    assert best.violated == ("balance",) and best.metrics["balance"] > 0.3
    content = export_object(store, top=12)
    assert content["trial"] == min((row for row in rows if not row.violated), key=lambda row: row.value or 0).number
    assert {entry["violated"] == [] for entry in content["candidates"]} == {True}
    assert best.number not in {arm.trial for arm in studies.open("t.confirm").study.spec.comparison.arms}
    asked = ("export", "--study", "t", "--candidate", str(best.number))
    done = command(*asked, home=tmp_path / "home", OPTUNA_STORAGE=database_url)
    content = json.loads(done.stdout)
    assert (content["trial"], content["violated"], content["confirmed"]) == (best.number, ["balance"], False)
    assert f"warning: trial-{best.number} violates balance; " in done.stderr
    file = tmp_path / "weights.json"
    file.write_text(done.stdout)
    assert checks(file, tmp_path / "home")[0] == 0
    content["violated"] = content["candidates"][0]["violated"] = []
    file.write_text(json.dumps(content | {"sha256": seal_of(content)}))
    code, found, _ = checks(file, tmp_path / "home", "--quick")
    assert (code, [check["name"] for check in found if check["outcome"] == "failed"]) == (1, ["scores"])


def test_where_all_trials_violate_a_constraint_nothing_is_exported_and_the_reason_is_that(
    studies: Studies, tmp_path: Path
) -> None:
    searched(studies, synthetic("constraints={balance: {min: 0.99}}"), tmp_path)
    words = r"all searched trials that ran to their end \(6\) violate the study's constraints \(balance\)"
    with pytest.raises(NothingFinished, match=words):
        export_object(studies.open("t"))
    with pytest.raises(NothingFinished, match=words):
        confirmation(studies, "t", top=1, seeds=2)


def test_model_files_are_known_by_their_hash_and_no_other_path_is_opened(studies: Studies, tmp_path: Path) -> None:
    store = studies.create_or_resume(load_study(studies_folder() / "digits.yaml", name="t"))
    while not any(row.is_search and row.state == "COMPLETE" for row in store.rows()):
        claim = store.trials.claim()
        assert claim is not None
        store.trials.report(claim.number, 1.0, 4, may_prune=False)
        store.trials.complete(claim.number, 1.0)
    content = export_object(store)
    settings = Settings.load(home=tmp_path, environ={})
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert all(check.outcome != "failed" for check in verify(content, settings, quick=True))

    true = content["provenance"]["teacher_sha256"]
    content["provenance"]["teacher_sha256"] = content["spec"]["files"]["teacher"]["sha256"] = "0" * 64
    for path in ("/dev/zero", "/etc/passwd", f"{tmp_path}/pipe.safetensors"):
        content["spec"]["files"]["teacher"]["path"] = path
        faults = {
            check.name: check.detail for check in verify(content, settings, quick=True) if check.outcome == "failed"
        }
        assert set(faults) == {"sha256", "spec", "files"}
        assert f"no teacher with sha256 {'0' * 64} is here: the one called 'digits' has {true}" in faults["files"]

    content["spec"]["teacher"] = "cifar10"
    faults = {check.name: check.detail for check in verify(content, settings, quick=True) if check.outcome == "failed"}
    assert "bdense-weights fetch-teacher cifar10" in faults["files"]


@pytest.mark.parametrize("name", sorted(path.name for path in studies_folder().glob("digits*.yaml")))
def test_the_file_of_every_shipped_study_of_the_digits_holds(studies: Studies, tmp_path: Path, name: str) -> None:
    """Whatever its method, settings and figures; values are made up, as no network is trained here."""
    store = studies.create_or_resume(load_study(studies_folder() / name, name="t"))
    study = store.study
    figures = dict.fromkeys(study.spec.method.metrics(), 0.875)
    while not any(row.is_search and row.state == "COMPLETE" for row in store.rows()):
        claim = store.trials.claim()
        assert claim is not None
        value = 5.0 - 0.1 * claim.number
        store.trials.report(claim.number, value, study.steps[-1], may_prune=False)
        repeats = [[seed, study.steps[-1], value + 0.01 * seed] for seed in claim.seeds[1:]]
        store.trials.complete(claim.number, value, repeats=repeats, metrics=figures)
    ended = next(row for row in store.rows() if row.is_search and row.state == "COMPLETE")
    content = export_object(store, trial=ended.number)
    found = list(verify(content, Settings.load(home=tmp_path, environ={}), quick=True))
    assert [check for check in found if check.outcome == "failed"] == []
    assert tuple(content["terms"]) == study.spec.method.terms
    assert content["settings"].keys() == study.spec.tuned.keys()
    assert (content["metrics"], content["violated"]) == (figures, list(study.violations(figures)))
    meant = {name: arm for name, arm in study.controls().items() if arm.rule == "fixed"}
    written = {entry["name"]: entry for entry in content["controls"] if entry["rule"] == "fixed"}
    assert written.keys() == meant.keys()
    for control, arm in meant.items():
        entry = written[control]
        assert (entry["settings"], entry["is_trained"]) == (arm.settings, arm.is_trained)
    trained = sum(arm.is_trained for arm in meant.values())
    assert content["noise_floor"]["num_controls"] == trained


@pytest.mark.long
def test_a_distillation_of_the_digits_runs_again_to_the_last_bit(studies: Studies, tmp_path: Path) -> None:
    overrides = (
        "method.budget_kimg=1", "budget.trials=1", "evaluation.n_samples=200", "evaluation.batch=200",
        "seeds.control_repeats=2", "seeds.evaluation_repeats=1",
    )  # fmt: skip
    study = load_study(studies_folder() / "digits.yaml", name="t", overrides=overrides)
    home = tmp_path / "home"
    content = export_object(searched(studies, study, home / "cache"))
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(content))
    code, found, errors = checks(file, home)
    assert code == 0, errors
    assert "equal to the last bit" in next(check["detail"] for check in found if check["name"] == "rerun")

    value = content["score"]["value"] + 10
    for entry in (content, content["candidates"][0]):
        entry["score"]["value"] = entry["by_seed"]["0"] = value
    file.write_text(json.dumps(content | {"sha256": seal_of(content)}))
    code, found, errors = checks(file, home)
    assert code == 1
    (failed,) = [check for check in found if check["outcome"] == "failed"]
    assert failed["name"] == "rerun" and f"the file says {value:.9g}" in failed["detail"]
