"""Feature networks: training, files and their hashes."""

from dataclasses import replace

import pytest
import torch

from bdense_core import data
from bdense_core.errors import CheckpointError
from bdense_core.features import DigitsFeatures, FeatureTraining, load_features, save_features, train_features


@pytest.fixture
def network():
    torch.manual_seed(0)
    return DigitsFeatures(width=8)


def test_a_saved_network_gives_the_same_features(network, tmp_path):
    images = data.to_uint8(data.load("digits")[0][:5])
    loaded = load_features(save_features(network, tmp_path / "f.safetensors", name="digits"))
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
    assert loaded(images).shape == (5, 8)
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_equal_networks_give_equal_bytes_and_their_identity_names_them(network, tmp_path):
    first = save_features(network, tmp_path / "a.safetensors", name="digits")
    second = save_features(network, tmp_path / "b.safetensors", name="digits")
    assert first.sha256 == second.sha256
    assert load_features(first).identity == f"digits@{first.sha256[:16]}"


def test_an_altered_file_is_refused_even_after_it_was_loaded(network, tmp_path):
    file = save_features(network, tmp_path / "f.safetensors", name="digits")
    load_features(file)
    path = tmp_path / "f.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or was altered"):
        load_features(file)


def test_a_teacher_is_no_feature_network(tmp_path):
    from bdense_core import assets

    with pytest.raises(CheckpointError, match="no feature network"):
        load_features(assets.hashed("digits/teacher.safetensors"))


def test_training_learns_and_depends_on_its_seed_alone():
    images, labels = data.load("digits")
    images, labels = data.to_uint8(images[:400]), labels[:400]
    settings = FeatureTraining(num_epochs=4)
    first, figures = train_features(images, labels, settings, width=8)
    torch.rand(3)
    second, _ = train_features(images, labels, settings, width=8)
    other, _ = train_features(images, labels, replace(settings, seed=1), width=8)
    assert figures.accuracy > 0.4  # chance is 0.1
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key])
    assert not torch.equal(first.classify.weight, other.classify.weight)
