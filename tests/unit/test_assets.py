"""What comes with the package is whole, and is what its card says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdense_core import assets, data
from bdense_core.checkpoints import load_network
from bdense_core.errors import BadValue
from bdense_core.evaluation import Metric
from bdense_core.features import load_features
from bdense_core.files import sha256_of_file
from bdense_core.loops import sfd
from bdense_core.methods.sfd import SFD
from bdense_core.task import Evaluation
from search.study_file import load_study, studies_folder

FOLDERS = ("digits", "digits16")
FILES = ("features.safetensors", "reference.safetensors", "teacher.safetensors")
of_each_folder = pytest.mark.parametrize("folder", FOLDERS)


def metric_of(folder: str, n_samples: int) -> Metric:
    features, reference = (assets.hashed(f"{folder}/{file}") for file in FILES[:2])
    return Metric(
        Evaluation(features_name=folder, features=features, reference=reference, n_samples=n_samples, seed=0, batch=500)
    )


def test_all_assets_have_the_hashes_of_their_card():
    whole = [f"{folder}/{file}" for folder in FOLDERS for file in FILES]
    assert set(assets.names()) == {*whole, "digits-dash/teacher.safetensors"}
    for name in assets.names():
        assert sha256_of_file(assets.path(name)) == assets.hashed(name).sha256


def test_an_unknown_asset_is_answered_with_the_known():
    with pytest.raises(BadValue, match=r"known are digits/features\.safetensors"):
        assets.path("digits/student.safetensors")


@of_each_folder
def test_the_card_for_people_names_every_hash(folder):
    text = (Path(assets.__file__).parent / folder / "CARD.md").read_text()
    for file in assets.card(folder)["files"].values():
        assert file["sha256"] in text


@of_each_folder
def test_the_teacher_has_the_parameters_its_card_says(folder):
    teacher = load_network(assets.hashed(f"{folder}/teacher.safetensors"))
    assert sum(p.numel() for p in teacher.parameters()) == assets.card(folder)["figures"]["teacher_parameters"]


@of_each_folder
def test_the_classifier_reads_the_digits(folder):
    network = load_features(assets.hashed(f"{folder}/features.safetensors"))
    images, labels = data.load(folder)
    with torch.no_grad():
        guesses = network.network.classify(network(data.to_uint8(images))).argmax(1)
    assert (guesses == labels).float().mean() > 0.98


@pytest.mark.parametrize("folder", ["digits", pytest.param("digits16", marks=pytest.mark.long)])
def test_the_teacher_and_the_untrained_student_score_what_their_card_says(folder):
    """All 2000 samples of the card; 1 % is far above what rounding on another CPU moves."""
    figures = assets.card(folder)["figures"]
    teacher = load_network(assets.hashed(f"{folder}/teacher.safetensors"))
    grid, metric = sfd.make_grid(SFD()), metric_of(folder, 2000)
    of_images = (1, teacher.config.img_resolution, teacher.config.img_resolution), teacher.config.label_dim
    own = metric(lambda z, y: sfd.teacher_states(teacher, z, grid, y)[:, -1, -1], *of_images)
    untrained = metric(lambda z, y: sfd.sample(teacher, z, grid, y), *of_images)
    assert own == pytest.approx(figures["teacher_12_steps_fd"], rel=0.01)
    assert untrained == pytest.approx(figures["untrained_student_nfe2_fd"], rel=0.01)


@torch.no_grad()
def test_the_teacher_of_digits16_draws_the_class_it_is_told():
    """Read by its feature network, which has never seen a drawn image."""
    teacher = load_network(assets.hashed("digits16/teacher.safetensors"))
    features = load_features(assets.hashed("digits16/features.safetensors"))
    asked = torch.arange(10).repeat(20)
    noise = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    grid = sfd.make_grid(SFD())
    drawn = sfd.teacher_states(teacher, noise, grid, torch.nn.functional.one_hot(asked, 10).float())[:, -1, -1]
    read = features.network.classify(features(data.to_uint8(drawn))).argmax(1)
    assert (read == asked).float().mean() > 0.9


@of_each_folder
def test_the_shipped_study_uses_the_shipped_files_of_its_data_set(folder):
    study = load_study(studies_folder() / f"{folder}.yaml")
    assert study.metric == f"fd-{folder}"
    assert study.teacher == assets.hashed(f"{folder}/teacher.safetensors")
    assert study.evaluation.reference == assets.hashed(f"{folder}/reference.safetensors")


@pytest.mark.parametrize("role", ["teacher", "evaluation.features"])
def test_shipped_files_of_another_data_set_are_refused(role):
    with pytest.raises(BadValue, match=r"dataset is 'digits16', but .*'digits'"):
        load_study(studies_folder() / "digits16.yaml", overrides=(f"{role}=digits",))


def test_assets_are_found_without_torch():
    program = (
        "import sys; from bdense_core import assets; assets.hashed('digits/teacher.safetensors'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
