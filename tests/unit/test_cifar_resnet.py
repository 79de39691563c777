"""The CIFAR ResNet against what is known of the published weights: their accuracy, and a Fréchet distance."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from bdense_core import seeds
from bdense_core.data import to_uint8
from bdense_core.feature_networks import CifarResNet
from bdense_core.features import import_features, load_features
from bdense_core.frechet import frechet_distance, statistics_of
from tests import cifar10

pytestmark = pytest.mark.skipif(cifar10.folder() is None, reason=cifar10.MISSING)


def images(part, count):
    return torch.from_numpy(cifar10.read(part)[0][:count].copy()).permute(0, 3, 1, 2)


def features(network, pixels):
    return torch.cat([network(part) for part in pixels.split(250)])


@pytest.fixture(scope="module")
def resnet56(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "resnet56.safetensors"
    return load_features(import_features(cifar10.folder() / "cifar10-resnet56.safetensors", path, name="resnet56"))


@pytest.fixture(scope="module")
def features_of_test(resnet56):
    """Of the first 2000 test images."""
    return features(resnet56, images("test", 2000))


def test_the_strips_decode_to_the_pixels_their_card_names():
    pixels, labels = cifar10.read("test")
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert digest == "4674ac8c77f372061aaf9216c8857c99599d5df0bb9f6b16a3de613ef8eb348a"
    assert labels.shape == (10_000,)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_every_published_depth_loads_as_it_is_and_has_the_parameters_published(depth, parameters):
    network = CifarResNet(depth=depth)
    network.load_state_dict(load_file(cifar10.folder() / f"cifar10-resnet{depth}.safetensors"), strict=True)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_resnet56_reaches_its_published_accuracy_on_the_first_thousand_test_images(resnet56, features_of_test):
    with torch.no_grad():
        guesses = resnet56.network.classify(features_of_test[:1000]).argmax(1)
    labels = torch.from_numpy(cifar10.read("test")[1][:1000].copy())
    assert float((guesses == labels).float().mean()) == pytest.approx(0.9339, abs=0.02)  # of all 10,000


@pytest.mark.long
def test_test_and_train_images_are_near_each_other_and_noisy_ones_far(resnet56, features_of_test):
    """The card names 0.074 for 10,000 images of each; fewer bias it upwards."""
    noise = torch.randn(2000, 3, 32, 32, generator=seeds.generator(0))
    noisy = to_uint8(images("test", 2000).float() / 127.5 - 1 + 0.1 * noise)
    real = statistics_of(features(resnet56, images("train-1", 2000)), resnet56.identity)
    near = frechet_distance(statistics_of(features_of_test, resnet56.identity), real)
    far = frechet_distance(statistics_of(features(resnet56, noisy), resnet56.identity), real)
    assert 0.074 < near < 0.5
    assert far > 20 * near
