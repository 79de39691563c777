"""The DASH teacher of the digits is what its card says, and the shipped studies of DASH are as their papers'."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from bdense_core import assets, data, seeds
from bdense_core.checkpoints import load_network
from bdense_core.evaluation import Metric
from bdense_core.features import load_features
from bdense_core.files import sha256_of_file
from bdense_core.guidance import GuidedSampler
from bdense_core.integrity import read_metadata
from bdense_core.sampling import sampler_of
from bdense_core.task import Evaluation
from search.study_file import load_study, studies_folder

TEACHER = "digits-dash/teacher.safetensors"


def test_the_card_is_of_this_file():
    card, text = assets.card("digits-dash"), assets.path(TEACHER).with_name("CARD.md").read_text()
    digest = sha256_of_file(assets.path(TEACHER))
    assert digest == card["files"]["teacher.safetensors"]["sha256"]
    assert digest in text
    parameters = sum(p.numel() for p in load_network(assets.hashed(TEACHER)).parameters())
    assert parameters == card["figures"]["teacher_parameters"]
    about = read_metadata(str(assets.path(TEACHER)))["about"]
    assert len(about["tirt"]) == 1000
    assert (min(about["tirt"]), max(about["tirt"])) == (card["figures"]["tirt_lowest"], card["figures"]["tirt_highest"])


def test_the_teacher_scores_what_its_card_says():
    """All 2000 samples of the card, without guidance; 1 % is far above what rounding on another CPU moves."""
    features, reference = (assets.hashed(f"digits/{name}.safetensors") for name in ("features", "reference"))
    evaluation = Evaluation(
        features_name="digits", features=features, reference=reference, n_samples=2000, seed=0, batch=500
    )
    sampler = GuidedSampler(num_steps=20)
    found = Metric(evaluation)(sampler.bind(load_network(assets.hashed(TEACHER))), (1, 8, 8), 10)
    assert found == pytest.approx(assets.card("digits-dash")["figures"]["unguided_20_steps_fd"], rel=0.01)


def test_its_own_sampler_draws_the_class_that_it_is_told():
    """Read by the feature network of the digits, which has never seen a drawn image."""
    sampler = sampler_of(str(assets.path(TEACHER)))
    assert sampler == GuidedSampler(num_steps=20, guidance=1.5)
    asked = torch.arange(10).repeat(10)
    noise = seeds.noise_rows(0, "classes", 0, 100, (1, 8, 8))
    drawn = sampler.bind(load_network(assets.hashed(TEACHER)))(noise, functional.one_hot(asked, 10).float())
    features = load_features(assets.hashed("digits/features.safetensors"))
    read = features.network.classify(features(data.to_uint8(drawn))).argmax(1)
    assert (read == asked).float().mean() > 0.9


def test_its_curriculum_turned_away_from_the_hard_timesteps():
    """The direction that follows from the formulas: the noise is hardest to see in images that are almost clean."""
    logits = read_metadata(str(assets.path(TEACHER)))["about"]["tirt"]
    clean, noisy = logits[:200], logits[600:950]
    assert max(clean) < 0 < min(noisy)


def test_the_study_of_the_digits_searches_between_the_authors_ranges():
    study = load_study(studies_folder() / "digits-dash.yaml")
    assert study.teacher == assets.hashed(TEACHER)
    assert study.metric == "fd-digits"
    weights = study.spec.space.weights({"u1": math.log(0.1), "u2": 0.0}, 3)
    assert [weight / weights[-1] for weight in weights] == pytest.approx([0.1, 1.0, 1.0])
    assert set(study.spec.method.controls()) == {"scratch", "conditional_only", "composite", "no_anchor", "authors"}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_studies_at_full_size_have_the_authors_settings(name):
    """spec/methods.md 3: 234k iterations are 300 epochs of 50,000 images."""
    study = load_study(studies_folder() / f"{name}-dash.yaml", tolerate_missing=True)
    method = study.spec.method
    assert study.spec.dataset == name
    assert method.num_iterations == 234_375
    assert (method.lr, method.lr_min, method.weight_decay, method.ema) == (2e-4, 1e-6, 1e-3, 0.9995)
    assert (method.gamma, method.dropout, method.grad_clip, method.batch) == (5, 0.1, 1.0, 64)
    assert (method.student_channels, method.student_blocks) == (64, 1)
    assert (method.guidance, method.tag_min, method.tag_beta, method.nfe) == (4, 1.0, 5.0, 100)
    assert study.spec.axes == {"u1": (-4.605, 0.0), "u2": (-2.303, 2.303)}


def test_the_asset_s_files_are_small():
    assert sum(path.stat().st_size for path in Path(assets.path(TEACHER).parent).iterdir()) < 1.5e6
