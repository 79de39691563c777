"""Study files: what is accepted, what is refused and with which words."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bdense_core import assets
from bdense_core.data import DATASETS
from bdense_core.dataset_names import DATASET_NAMES
from bdense_core.errors import BadValue, CheckpointError, ConfigError, UnknownKey
from bdense_core.files import HashedFile
from search import study_file
from search.errors import MissingFile
from search.preflight import preflight
from search.sections import Arm, ComparisonSection
from search.settings import Settings
from search.spec import Study, differences, flatten, known_keys
from search.study_file import load_study, studies_folder

MINIMAL = {"name": "t", "method": {"kind": "synthetic"}}


def write(folder: Path, content: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("values", "wrong", "nearest"),
    [
        ({"method": {"kind": "sfd", "lrate": 1e-3}}, "method.lrate", "method.lr"),
        ({"budgets": {"trials": 3}}, "budgets", "budget"),
        ({"budget": {"trails": 3}}, "budget.trails", "budget.trials"),
        ({"space": {"indexorigin": 1}}, "space.indexorigin", "space.index_origin"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    tmp_path: Path, values: dict[str, object], wrong: str, nearest: str
) -> None:
    with pytest.raises(UnknownKey) as caught:
        load_study(write(tmp_path, MINIMAL | {"teacher": "digits"} | values))
    assert f"unknown key {wrong} " in str(caught.value)
    assert f"did you mean {nearest}" in str(caught.value)


def test_an_unknown_key_in_an_override_is_refused_alike(tmp_path: Path) -> None:
    with pytest.raises(UnknownKey, match=r"method\.second .*did you mean method\.seconds\?"):
        load_study(write(tmp_path, MINIMAL), overrides=("method.second=1",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {"b": [-6, 0]}}, "must not go below -5"),
        ({"space": {"a": [2, 1]}}, "must rise"),
        ({"method": {"kind": "sfd", "num_branches": 3, "teacher_steps": 4}}, "does not divide"),
        ({"method": {"kind": "sfd", "lr": 0}}, "method.lr must be positive"),
        ({"method": {"kind": "progresive"}}, "unknown method.kind 'progresive'"),
        ({"method": {"lr": 1}}, "method.kind"),
        ({"budget": {"trials": "many"}}, "budget.trials"),
        ({"name": "../etc"}, "name"),
        ({"method": {"kind": "sfd"}}, "names no teacher"),
        ({"method": {"kind": "synthetic", "num_branches": 1}}, "at least 2"),
        ({"method": {"kind": "synthetic", "budget_kimg": 2.5}}, "must be whole"),
        ({"space": {"a": [-1, float("inf")]}}, "must be finite"),
        ({"space": {"a": [-1, 400]}}, "gives no weights"),
        ({"method": {"kind": "sfd", "budget_kimg": float("inf")}, "teacher": "digits"}, "must be finite"),
        ({"lease": {"heartbeat_s": 15, "grace_s": 20}}, "must exceed twice"),
        (
            {"dataset": "cifar10", "teacher": "digits", "method": {"kind": "sfd"}},
            "dataset is 'cifar10', but the teacher 'digits'",
        ),
        (
            {"dataset": "cifar10", "teacher": "mine.safetensors", "method": {"kind": "sfd"}},
            "evaluation.features 'digits'",
        ),
    ],
)
def test_a_value_outside_its_range_is_refused_with_its_key(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(BadValue, match=message.replace("[", r"\[")):
        load_study(write(tmp_path, MINIMAL | values))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="lacks the key name"):
        load_study(write(tmp_path, {"method": {"kind": "synthetic"}}))


def test_a_missing_file_lists_the_shipped_studies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no study file .*nowhere\.yaml.*digits\.yaml"):
        load_study(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["digits", "digits.yaml"])
def test_a_shipped_study_is_found_by_its_bare_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_study(Path(name)).name == "digits"
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(MINIMAL))
    assert load_study(Path("digits.yaml")).name == "t", "a file of the user's own comes first"


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "\x00"])
def test_a_file_that_is_no_study_is_a_config_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_study(write(tmp_path, text))


def test_a_teacher_that_does_not_exist_is_named(tmp_path: Path) -> None:
    values = MINIMAL | {"method": {"kind": "sfd"}, "teacher": "mine.safetensors"}
    with pytest.raises(CheckpointError, match=r"no teacher 'mine\.safetensors'.*known by name: digits"):
        load_study(write(tmp_path, values))


def test_the_names_of_data_sets_are_known_without_torch() -> None:
    assert set(DATASET_NAMES) == set(DATASETS)
    code = "import sys, search.study_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def with_data(folder: Path, dataset: str, *overrides: str, tolerate: bool = False) -> Study:
    content = {"name": "t", "method": {"kind": "dash"}, "teacher": "mine.safetensors", "dataset": dataset}
    content["evaluation"] = {"features": "mine-features.safetensors", "reference": "mine-reference.safetensors"}
    for role in ("teacher", "features", "reference"):
        name = "mine.safetensors" if role == "teacher" else f"mine-{role}.safetensors"
        shutil.copy(assets.path(f"digits/{role}.safetensors"), folder / name)
    return load_study(write(folder, content), overrides=overrides, tolerate_missing=tolerate)


def test_a_method_that_trains_on_data_gets_it_by_name_or_as_a_path_that_every_node_finds(tmp_path: Path) -> None:
    images = tmp_path / "images.npz"
    images.write_bytes(b"")
    assert with_data(tmp_path, "digits").dataset == "digits"
    study = with_data(tmp_path, "images.npz")
    assert study.dataset == str(images)
    assert Study.from_dict(study.to_dict()).dataset == str(images)
    assert study.task((1.0,) * 3, 0, cache_root=tmp_path).dataset == str(images)
    elsewhere = replace(study, dataset="/elsewhere/images.npz")
    assert differences(study.to_dict(), elsewhere.to_dict()) == [], "where it lies is the machine's affair"
    assert load_study(studies_folder() / "digits.yaml").dataset is None, "SFD trains on noise alone"


def test_a_data_set_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"no data set 'nowhere\.npz'"):
        with_data(tmp_path, "nowhere.npz")
    (told,) = with_data(tmp_path, "nowhere.npz", tolerate=True).missing
    assert "no data set 'nowhere.npz'" in told


def test_a_data_set_that_has_gone_since_stops_a_launch(tmp_path: Path) -> None:
    (tmp_path / "images.npz").write_bytes(b"")
    study = with_data(tmp_path, "images.npz")
    (tmp_path / "images.npz").unlink()
    with pytest.raises(MissingFile, match=r"the data set .*images\.npz does not exist any more"):
        preflight(study, Settings.load(home=tmp_path))


@pytest.mark.parametrize(("teacher", "is_of_digits"), [("digits-other", True), ("digits16-other", False)])
def test_a_shipped_teacher_is_of_the_data_set_before_its_dash(
    teacher: str, is_of_digits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = (*assets.names(), f"{teacher}/teacher.safetensors")
    monkeypatch.setattr(assets, "names", lambda: shipped)
    monkeypatch.setattr(assets, "hashed", lambda name: HashedFile(path=name, sha256="0"))
    monkeypatch.setattr(study_file, "features_name", lambda _: "digits")
    path = write(tmp_path, MINIMAL | {"method": {"kind": "sfd"}, "teacher": teacher})
    if is_of_digits:
        assert load_study(path).spec.teacher == teacher
    else:
        with pytest.raises(BadValue, match="the teacher 'digits16-other' was trained on 'digits16'"):
            load_study(path)


def test_a_comparison_that_goes_on_has_the_settings_it_had(tmp_path: Path) -> None:
    def comparison(**settings: float) -> ComparisonSection:
        arm = Arm(name="trial-1", weights=(1.0, 1.0), settings=settings)
        return ComparisonSection(kind="confirm", of="s", of_created="", target="s", arms=(arm,), seeds=(1,))

    assert comparison(shift=0.5).joined(comparison(shift=0.5)) == comparison(shift=0.5)
    with pytest.raises(BadValue, match="it has other weights or settings called trial-1"):
        comparison(shift=0.5).joined(comparison(shift=0.25))


def test_a_comparison_counts_how_often_it_was_widened_and_keeps_values_of_one_confirmation() -> None:
    def comparison(*names: str, seeds: int = 2, confirmed: float | None = None) -> ComparisonSection:
        arms = tuple(Arm(name=name, weights=(1.0,), confirmed_value=confirmed) for name in names)
        return ComparisonSection(
            kind="transfer", of="s", of_created="", target="t", arms=arms, seeds=tuple(range(seeds))
        )  # fmt: skip

    first = comparison("x", "y", confirmed=1.0)
    assert first.joined(comparison("x", seeds=1, confirmed=1.0)).widened == 0
    assert first.joined(comparison("x", confirmed=1.0)) == first, "asking for less takes nothing away"
    more = first.joined(comparison("x", "z", confirmed=2.0)).joined(comparison("x", "z", seeds=3, confirmed=2.0))
    assert (more.widened, more.seeds) == (2, (0, 1, 2))
    assert {arm.name: arm.confirmed_value for arm in more.arms} == {"x": 2.0, "y": None, "z": 2.0}


@pytest.mark.parametrize("value", [True, 1, 1.0, "1"])
def test_a_setting_of_an_arm_stays_of_its_kind(value: object) -> None:
    arm = Arm(name="x", weights=(1.0,), settings={"s": value})
    again = Arm.model_validate_json(arm.model_dump_json())
    assert type(again.settings["s"]) is type(value) and again == arm


def test_a_name_is_looked_for_among_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    shutil.copy(assets.path("digits/teacher.safetensors"), folder / "teacher.safetensors")
    path = write(tmp_path, MINIMAL | {"method": {"kind": "sfd"}, "teacher": "mine"})
    assert load_study(path, models=tmp_path / "models").teacher.path == str(folder / "teacher.safetensors")
    with pytest.raises(CheckpointError, match=r"known by name: digits, .*mine; did you mean mine"):
        load_study(path, models=tmp_path / "models", overrides=("teacher=mime",))


def test_a_study_builds_on_another_one(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(yaml.safe_dump(MINIMAL | {"budget": {"trials": 3, "every_kimg": 4}}))
    study = load_study(write(tmp_path, {"base": "below.yaml", "name": "above", "budget": {"trials": 5}}))
    assert (study.name, study.spec.budget.trials, study.spec.budget.every_kimg) == ("above", 5, 4)
    for base in ("study.yaml", 3, "nowhere.yaml"):
        with pytest.raises(ConfigError, match=r"base|no study file"):
            load_study(write(tmp_path, {"base": base, "name": "above"}))


@pytest.mark.parametrize("override", ["noequals", "=3", "name.deeper=3"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(BadValue, match="--set"):
        load_study(write(tmp_path, MINIMAL), overrides=(override,))


def test_an_override_arrives_where_its_dotted_key_points(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, MINIMAL), overrides=("budget.trials=7", "space.a=[0, 1.5]"), name="other")
    assert (study.name, study.spec.budget.trials, study.spec.space.a) == ("other", 7, (0.0, 1.5))


@pytest.mark.parametrize("path", sorted(studies_folder().glob("*.yaml")), ids=lambda path: path.name)
def test_a_resolved_study_survives_being_stored(path: Path) -> None:
    study = load_study(path, tolerate_missing=True)
    assert Study.from_dict(study.to_dict()) == study
    assert Study.from_dict(study.to_dict()).sha256() == study.sha256()


def test_a_stored_study_reads_what_is_shipped_from_this_installation_and_the_rest_from_where_it_was():
    study = load_study(studies_folder() / "digits.yaml")
    stored = json.loads(json.dumps(study.to_dict()).replace(str(Path(assets.__file__).parent), "/another/installation"))
    assert stored["files"]["teacher"]["path"].startswith("/another/installation")
    assert Study.from_dict(stored) == study
    stored["files"]["dataset"] = None  # as the weights file's schema allows
    assert Study.from_dict(stored) == study
    stored["files"]["teacher"] = {"path": "/own/teacher.safetensors", "sha256": "0" * 64}
    assert Study.from_dict(stored).teacher == HashedFile(path="/own/teacher.safetensors", sha256="0" * 64)


def test_what_no_result_depends_on_may_change_and_all_else_may_not(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    first = load_study(path).to_dict()
    harmless = load_study(path, overrides=("budget.trials=99", "resources.cpus=2", "description=x"))
    assert differences(first, harmless.to_dict()) == []
    assert harmless.sha256() == load_study(path).sha256()
    changed = load_study(path, overrides=("method.noise=0.5", "space.b=[-4, 0]")).to_dict()
    assert [line.split(":")[0] for line in differences(first, changed)] == ["method.noise", "space.b"]


def test_every_key_of_a_resolved_study_is_known(tmp_path: Path) -> None:
    resolved = load_study(studies_folder() / "digits.yaml").to_dict()
    del resolved["files"]
    assert set(flatten(resolved)) <= set(known_keys("sfd"))


def test_what_may_touch_results_is_no_harmless_change(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    stored = load_study(path).to_dict()
    for override in ("resources.micro_batch=4", "resources.compile=true", "resources.gpus=0.5"):
        assert differences(stored, load_study(path, overrides=(override,)).to_dict()), override
    on_gpu = load_study(path, overrides=("resources.gpus=1",)).to_dict()
    assert differences(on_gpu, load_study(path, overrides=("resources.gpus=0.5",)).to_dict()) == []


def test_a_study_stored_before_float16_targets_is_read_as_what_it_meant() -> None:
    """The resolved study as it was stored in the database at that time."""
    stored = json.loads((Path(__file__).parent / "stored_study_before_float16_targets.json").read_text())
    old = Study.from_dict(stored)
    assert (old.name, old.spec.method.targets, old.spec.method.precision) == ("digits", "float32", "float32")
    now = load_study(studies_folder() / "digits.yaml")
    assert differences(old.to_dict(), now.to_dict()) == ["method.targets: stored 'float32', now 'float16'"]
