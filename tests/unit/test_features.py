"""Feature networks: files and their hashes, imports, Inception behind its hash, and training."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdense_core import assets, data, protocol
from bdense_core.errors import BadValue, CheckpointError, EvaluationError
from bdense_core.feature_networks import CifarResNet, DigitsFeatures, Inception
from bdense_core.feature_training import FeatureTraining, train_features
from bdense_core.features import import_features, load_features, save_features
from bdense_core.files import HashedFile, sha256_of_file


@pytest.fixture
def network():
    torch.manual_seed(0)
    return DigitsFeatures(width=8)


def hashed(path):
    return HashedFile(path=str(path), sha256=sha256_of_file(path))


def random_bytes(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# --- files ----------------------------------------------------------------------------------------------


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


def test_the_shipped_features_are_saved_again_byte_for_byte(tmp_path):
    """Else a retrained set would differ from the shipped one, and every study's protocol with it."""
    shipped = assets.hashed("digits/features.safetensors")
    assert save_features(load_features(shipped).network, tmp_path / "f", name="digits").sha256 == shipped.sha256


def test_an_altered_file_is_refused_even_after_it_was_loaded(network, tmp_path):
    file = save_features(network, tmp_path / "f.safetensors", name="digits")
    load_features(file)
    path = tmp_path / "f.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or was altered"):
        load_features(file)


def test_a_teacher_is_no_feature_network():
    with pytest.raises(CheckpointError, match="no feature network"):
        load_features(assets.hashed("digits/teacher.safetensors"))


@pytest.mark.parametrize(
    "images",
    [
        random_bytes(2, 3, 8, 8),
        random_bytes(2, 1, 16, 16),
        random_bytes(1, 8, 8),
        torch.zeros(2, 1, 8, 8),
    ],
)
def test_images_of_another_shape_or_type_are_refused(images):
    network = load_features(assets.hashed("digits/features.safetensors"))
    with pytest.raises(EvaluationError, match=r"digits features read uint8 images \[B, 1, 8, 8\], but these are "):
        network(images)


def test_features_are_in_full_single_precision_and_settings_come_back(network, tmp_path):
    """TF32 and half precision would make a distance depend on the kind of GPU."""
    seen = []

    class Spy(DigitsFeatures):
        def forward(self, images):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(images)

    loaded = replace(load_features(save_features(network, tmp_path / "f", name="digits")), network=Spy(width=8))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loaded(random_bytes(2, 1, 8, 8)).dtype == torch.float32
    assert seen == [(False, False)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# --- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("inception", "'inception' is reserved"),
        ("cifar-resnet", "another kind of features"),
        ("Digits 2", "use small letters"),
        ("../digits", "use small letters"),
        ("", "use small letters"),
    ],
)
def test_names_that_would_mislead_are_refused(network, tmp_path, name, problem):
    with pytest.raises(BadValue, match=problem):
        save_features(network, tmp_path / "f.safetensors", name=name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_calls_itself_inception_is_refused(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "f", {"bdense_features": '{"name": "inception", "kind": "digits"}'})
    with pytest.raises(CheckpointError, match="'inception' is reserved"):
        load_features(hashed(tmp_path / "f"))


# --- imports --------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path):
    """Weights of a ResNet of depth 14 as others publish them, with counters of batches."""
    torch.manual_seed(0)
    state = CifarResNet(depth=14, num_classes=5).state_dict() | {"bn1.num_batches_tracked": torch.tensor(7)}
    save_file(state, tmp_path / "raw.safetensors", {"source": "elsewhere"})
    return tmp_path / "raw.safetensors"


def test_an_import_finds_the_depth_and_keeps_name_weights_and_origin(raw, tmp_path):
    file = import_features(raw, tmp_path / "new" / "resnet14.safetensors", name="resnet14")
    loaded = load_features(file)
    assert (loaded.name, loaded.identity) == ("resnet14", f"resnet14@{file.sha256[:16]}")
    assert loaded.network.settings == {"depth": 14, "num_classes": 5}
    assert sha256_of_file(raw).encode() in Path(file.path).read_bytes()
    assert loaded(random_bytes(3, 3, 32, 32)).shape == (3, 64)
    for key, tensor in loaded.network.state_dict().items():
        assert torch.equal(tensor, load_file(raw)[key])
    assert import_features(raw, tmp_path / "again", name="resnet14").sha256 == file.sha256


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("layer2.1.bn2.weight"), "has no tensor 'layer2.1.bn2.weight'"),
        (lambda state: state.update({"fc.weight": torch.zeros(2)}), "'fc.weight' has no place there"),
        (lambda state: state.update({"layer1.2.extra": torch.zeros(2)}), "has no tensor 'layer1.2.conv1.weight'"),
        (lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 7, 7)}), r"'conv1.weight' is \[64, 3, 7, 7\]"),
        (lambda state: state["bn1.bias"].fill_(torch.nan), "'bn1.bias' holds something else"),
        (lambda state: state.update({"bn1.bias": torch.zeros(16, dtype=torch.int32)}), "'bn1.bias' holds something"),
        (lambda state: state.update({"linear.weight": torch.tensor(0.0)}), r"'linear.weight' is \[\]"),
        (lambda state: state.clear(), "has no tensor 'conv1.weight'"),
    ],
)
def test_another_architecture_is_refused_and_its_tensor_named(raw, tmp_path, change, problem):
    state = load_file(raw)
    change(state)
    save_file(state, raw)
    with pytest.raises(CheckpointError, match=f"no CIFAR ResNet of depth .*{problem}"):
        import_features(raw, tmp_path / "f.safetensors", name="resnet14")
    assert not (tmp_path / "f.safetensors").exists()


def test_missing_and_damaged_sources_are_refused(raw, tmp_path):
    raw.write_bytes(raw.read_bytes()[:-9])
    for source in (raw, tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            import_features(source, tmp_path / "f.safetensors", name="resnet14")


def test_nothing_imported_is_called_inception(raw, tmp_path):
    with pytest.raises(BadValue, match="'inception' is reserved"):
        import_features(raw, tmp_path / "f.safetensors", name="inception")


# --- Inception ------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 683)[:, :2048]


class StandIn(torch.nn.Module):
    """What clean-fid knows of the published TorchScript."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return self.layers(x.to(torch.float32))


def save_script(module, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch 2.13 warns of all of TorchScript
        torch.jit.script(module).save(str(path))


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pt"
    save_script(StandIn(), path)
    return hashed(path)


@pytest.fixture
def inception(torchscript, monkeypatch):
    """The stand-in, as if it were the published file."""
    monkeypatch.setattr(protocol, "INCEPTION_SHA256", torchscript.sha256)
    return load_features(torchscript)


def test_the_known_torchscript_is_called_inception_and_reads_bytes_of_any_size(inception, torchscript):
    images = random_bytes(5, 3, 20, 24)
    assert inception.identity == f"inception@{torchscript.sha256[:16]}"
    features = inception(images)
    assert (features.shape, features.dtype) == ((5, 2048), torch.float32)
    assert torch.allclose(features[:, 1], images[:, 1].float().mean(dim=(1, 2)))


def test_large_batches_are_split_and_keep_their_order(inception, monkeypatch):
    monkeypatch.setattr(Inception, "at_once", 2)
    images = random_bytes(5, 3, 8, 8)
    assert torch.equal(inception(images)[:, 0], images[:, 0].float().mean(dim=(1, 2)))


@pytest.mark.parametrize("images", [random_bytes(2, 1, 8, 8), random_bytes(3, 8, 8), torch.zeros(2, 3, 8, 8)])
def test_inception_reads_only_colour_images_of_bytes(inception, images):
    with pytest.raises(EvaluationError, match=r"inception features read uint8 images \[B, 3, any, any\]"):
        inception(images)


def test_other_torchscript_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    save_script(StandIn(), tmp_path / "inception-2015-12-05.pt")

    def loaded(*_):
        raise AssertionError("code from outside was loaded")

    monkeypatch.setattr(torch.jit, "load", loaded)
    with pytest.raises(CheckpointError, match=f"TorchScript, which is code, .*{protocol.INCEPTION_SHA256}"):
        load_features(hashed(tmp_path / "inception-2015-12-05.pt"))


def test_the_folder_made_for_clean_fid_is_gone_afterwards(torchscript, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(protocol, "INCEPTION_SHA256", torchscript.sha256)
    Inception(Path(torchscript.path))
    assert list(tmp_path.iterdir()) == []


def test_what_runs_is_what_was_hashed(torchscript):
    """A file that is another by the time it is loaded is never run."""
    with pytest.raises(CheckpointError, match="has changed"):
        Inception(Path(torchscript.path))


def test_a_known_file_without_inception_inside_is_a_checkpoint_error(tmp_path, monkeypatch):
    path = tmp_path / "f.pt"
    save_script(Layers(), path)
    monkeypatch.setattr(protocol, "INCEPTION_SHA256", hashed(path).sha256)
    with pytest.raises(CheckpointError, match="cannot be loaded as Inception"):
        Inception(path)


@pytest.mark.skipif("BDENSE_INCEPTION" not in os.environ, reason="BDENSE_INCEPTION does not name the Inception file")
def test_the_published_inception_tells_images_apart():
    network = load_features(HashedFile(path=os.environ["BDENSE_INCEPTION"], sha256=protocol.INCEPTION_SHA256))
    assert network.name == "inception"
    images = random_bytes(3, 3, 32, 32)
    features = network(images)
    assert features.shape == (3, 2048)
    assert bool(features.isfinite().all())
    assert bool((features >= 0).all())  # means of rectified values
    assert not torch.allclose(features[0], network(255 - images)[0], atol=0.01)


# --- training -------------------------------------------------------------------------------------------


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
