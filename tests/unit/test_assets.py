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

DIGITS = ("digits/features.safetensors", "digits/reference.safetensors", "digits/teacher.safetensors")


def digits_metric(n_samples: int) -> Metric:
    features, reference, _ = (assets.hashed(name) for name in DIGITS)
    return Metric(
        Evaluation(
            features_name="digits", features=features, reference=reference, n_samples=n_samples, seed=0, batch=500
        )
    )


def test_all_assets_have_the_hashes_of_their_card():
    assert assets.names() == DIGITS
    for name in DIGITS:
        assert sha256_of_file(assets.path(name)) == assets.hashed(name).sha256


def test_an_unknown_asset_is_answered_with_the_known():
    with pytest.raises(BadValue, match=r"known are digits/features\.safetensors"):
        assets.path("digits/student.safetensors")


def test_the_card_for_people_names_every_hash():
    text = (Path(assets.__file__).parent / "digits" / "CARD.md").read_text()
    for file in assets.card("digits")["files"].values():
        assert file["sha256"] in text


def test_the_teacher_has_the_parameters_its_card_says():
    teacher = load_network(assets.hashed("digits/teacher.safetensors"))
    assert sum(p.numel() for p in teacher.parameters()) == assets.card("digits")["figures"]["teacher_parameters"]


def test_the_classifier_reads_the_digits():
    network = load_features(assets.hashed("digits/features.safetensors"))
    images, labels = data.load("digits")
    with torch.no_grad():
        guesses = network.network.classify(network(data.to_uint8(images))).argmax(1)
    assert (guesses == labels).float().mean() > 0.98


def test_the_teacher_and_the_untrained_student_score_what_their_card_says():
    """All 2000 samples of the card; 1 % is far above what rounding on another CPU moves."""
    figures = assets.card("digits")["figures"]
    teacher = load_network(assets.hashed("digits/teacher.safetensors"))
    grid, metric = sfd.make_grid(SFD()), digits_metric(2000)
    own = metric(lambda z, y: sfd.teacher_states(teacher, z, grid, y)[:, -1, -1], (1, 8, 8), 0)
    untrained = metric(lambda z, y: sfd.sample(teacher, z, grid, y), (1, 8, 8), 0)
    assert own == pytest.approx(figures["teacher_12_steps_fd"], rel=0.01)
    assert untrained == pytest.approx(figures["untrained_student_nfe2_fd"], rel=0.01)


def test_assets_are_found_without_torch():
    program = (
        "import sys; from bdense_core import assets; assets.hashed('digits/teacher.safetensors'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
