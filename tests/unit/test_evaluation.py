"""The score of a student: pairing, determinism and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdense_core import data, seeds
from bdense_core.errors import EvaluationError
from bdense_core.evaluation import Metric, reference_statistics
from bdense_core.features import DigitsFeatures, load_features, save_features
from bdense_core.files import HashedFile
from bdense_core.frechet import frechet_distance, save_statistics
from bdense_core.protocol import UINT8
from bdense_core.task import Evaluation

SHAPE = (1, 8, 8)


def _evaluation(folder: Path, seed: int = 0) -> Evaluation:
    """An evaluation with features of random weights: a distance all the same."""
    torch.manual_seed(seed)
    features = save_features(DigitsFeatures(width=8), folder / f"features-{seed}.safetensors", name="digits")
    path = folder / f"reference-{seed}.safetensors"
    digest = save_statistics(reference_statistics(data.load("digits")[0], load_features(features)), path)
    reference = HashedFile(path=str(path), sha256=digest)
    return Evaluation(features_name="digits", features=features, reference=reference, n_samples=600, seed=5, batch=250)


@pytest.fixture
def evaluation(tmp_path):
    return _evaluation(tmp_path)


def soft(noise, labels):
    return torch.tanh(noise)


def test_the_real_images_are_at_distance_zero_and_worse_ones_farther(evaluation):
    features = load_features(evaluation.features)
    images = data.load("digits")[0]
    real = reference_statistics(images, features)
    noise = torch.randn(images.shape, generator=seeds.generator(0))
    distances = [
        frechet_distance(reference_statistics(images + level * noise, features), real) for level in (0.0, 0.2, 0.4, 0.8)
    ]
    shuffled = images.flatten(1)[:, torch.randperm(64, generator=seeds.generator(1))].view_as(images)
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)
    assert distances[1] > 0
    assert frechet_distance(reference_statistics(shuffled, features), real) > 10 * distances[1]


def test_the_same_sampler_scores_the_same_whatever_the_global_generator_did(evaluation):
    first = Metric(evaluation)(soft, SHAPE, 0)
    torch.rand(7)
    assert Metric(evaluation)(soft, SHAPE, 0) == first
    assert Metric(replace(evaluation, seed=6))(soft, SHAPE, 0) != first


def test_the_sampler_is_given_every_image_once_and_no_labels_without_classes(evaluation):
    asked = []

    def sample(noise, labels):
        asked.append((len(noise), labels))
        return soft(noise, labels)

    Metric(evaluation)(sample, SHAPE, 0)
    assert asked == [(250, None), (250, None), (100, None)]


def test_fewer_images_are_the_first_ones_and_another_seed_is_another_evaluation(evaluation):
    def value(metric, **how):
        measuring = metric.measure(soft, SHAPE, 0, **how)
        counts = []
        while True:
            try:
                counts.append(next(measuring))
            except StopIteration as end:
                return end.value, counts

    metric = Metric(evaluation)
    few = Metric(replace(evaluation, n_samples=300))(soft, SHAPE, 0)
    assert value(metric, count=300) == (few, [250, 300])
    assert value(metric, seed=6) == (Metric(replace(evaluation, seed=6))(soft, SHAPE, 0), [250, 500, 600])
    assert value(metric)[0] == metric(soft, SHAPE, 0) not in (few, value(metric, seed=6)[0])


def test_the_protocol_says_what_the_value_is_made_of(evaluation):
    protocol = Metric(evaluation).protocol
    assert protocol.metric == "fd-digits"
    assert protocol.features_sha256 == evaluation.features.sha256
    assert protocol.reference_sha256 == evaluation.reference.sha256
    assert protocol.n_samples == 600
    assert protocol.image_preparation == UINT8


def test_an_altered_reference_is_refused(evaluation):
    path = Path(evaluation.reference.path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match="hash to"):
        Metric(evaluation)


def test_a_reference_made_with_other_features_is_refused(evaluation, tmp_path):
    other = _evaluation(tmp_path, seed=1)
    with pytest.raises(EvaluationError, match="was made with features"):
        Metric(replace(evaluation, reference=other.reference))


def test_only_inception_features_may_be_called_fid(evaluation):
    with pytest.raises(EvaluationError, match="holds those called 'digits'"):
        Metric(replace(evaluation, features_name="inception"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_an_error_not_a_score(evaluation, bad):
    def sample(noise, labels):
        images = soft(noise, labels)
        images[0, 0, 3, 3] = bad
        return images

    with pytest.raises(EvaluationError, match="images 0 to 249 of evaluation seed 5 are not all finite"):
        Metric(evaluation)(sample, SHAPE, 0)


def test_one_image_is_too_few(evaluation):
    with pytest.raises(EvaluationError, match="at least 2 images"):
        Metric(replace(evaluation, n_samples=1))


@pytest.mark.parametrize("early", [1, 601])
def test_early_scores_need_two_images_and_no_more_than_the_last(evaluation, early):
    with pytest.raises(EvaluationError, match=f"early_samples is {early}; give 2 to 600"):
        Metric(replace(evaluation, early_samples=early))
