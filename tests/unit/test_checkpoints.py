"""Network files: what comes back, and what is refused with the name of the file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdense_core import checkpoints
from bdense_core.branches import with_branches
from bdense_core.checkpoints import import_edm, load_network, save_network
from bdense_core.edm import EDMCheckpoint
from bdense_core.errors import CheckpointError
from bdense_core.files import HashedFile, sha256_of_file
from bdense_core.integrity import check_file, read_metadata
from bdense_core.networks import NetworkConfig, build

CONFIG = NetworkConfig.ddpmpp(
    img_resolution=8,
    img_channels=2,
    model_channels=8,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    label_dim=3,
    dropout=0.3,
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build(CONFIG)


@pytest.fixture
def saved(network, tmp_path):
    return save_network(network, tmp_path / "net.safetensors", {"origin": "a test"})


def rehashed(file):
    """The same file as if its present content were meant."""
    return HashedFile(path=file.path, sha256=sha256_of_file(Path(file.path)))


def rewrite(file, *, state=None, metadata=None):
    with safe_open(file.path, framework="pt") as opened:
        old = opened.metadata()
    save_file(load_file(file.path) if state is None else state, file.path, metadata or old)
    return rehashed(file)


def test_a_network_comes_back_with_its_weights_and_configuration_in_evaluation_mode(network, saved):
    loaded = load_network(saved)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert list(loaded.state_dict()) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_student_with_branches_comes_back_too(network, tmp_path):
    student = with_branches(network, 4)
    loaded = load_network(save_network(student, tmp_path / "student.safetensors"))
    assert loaded.config.num_branches == 4
    assert torch.equal(
        loaded.get_parameter(f"{loaded.head_name}.weight"),
        student.get_parameter(f"{student.head_name}.weight"),
    )


def test_equal_networks_give_equal_bytes_and_others_do_not(network, saved, tmp_path):
    again = save_network(load_network(saved), tmp_path / "again.safetensors", {"origin": "a test"})
    assert again.sha256 == saved.sha256
    with torch.no_grad():
        network.get_parameter(f"{network.head_name}.bias")[0] += 1
    other = save_network(network, tmp_path / "other.safetensors", {"origin": "a test"})
    assert other.sha256 != saved.sha256


def test_the_origin_stands_in_the_file(saved):
    with safe_open(saved.path, framework="pt") as opened:
        (note,) = opened.metadata().values()
    assert json.loads(note)["about"] == {"origin": "a test"}


def test_a_missing_file_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*gone\.safetensors: No such file"):
        load_network(replace(saved, path=str(tmp_path / "gone.safetensors")))


@pytest.mark.parametrize("position", [3, 200, -1])
def test_one_flipped_bit_anywhere_is_refused(saved, tmp_path, position):
    path = tmp_path / "net.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\.safetensors is damaged or was altered"):
        load_network(saved)
    with pytest.raises(CheckpointError, match=r"net\.safetensors is damaged or was altered"):
        check_file(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_whether_or_not_its_hash_was_known(saved, tmp_path, keep):
    path = tmp_path / "net.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"net\.safetensors is damaged"):
        load_network(saved)
    with pytest.raises(CheckpointError, match=r"net\.safetensors is no network"):
        load_network(rehashed(saved))


@pytest.mark.parametrize("content", [b"", b"not a network", b"\xff" * 64, b"PK\x03\x04pickle"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    file = HashedFile(path=str(path), sha256=sha256_of_file(path))
    with pytest.raises(CheckpointError, match=r"other\.bin is no network"):
        load_network(file)


@pytest.mark.parametrize(
    "metadata",
    [
        {"other": "note"},
        {"bdense_network": "no json"},
        {"bdense_network": "[]"},
        {"bdense_network": "{}"},
        {"bdense_network": '{"config": 3}'},
        {"bdense_network": '{"config": {"architecture": "song"}}'},
        {"bdense_network": '{"config": {"colour": "red"}}'},
    ],
)
def test_tensors_without_a_sound_configuration_are_no_network(saved, metadata):
    file = rewrite(saved, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"net\.safetensors is no network"):
        load_network(file)


def drop_a_tensor(state):
    del state["model.map_layer0.weight"]


def add_a_tensor(state):
    state["model.more"] = torch.zeros(1)


def widen_a_tensor(state):
    state["model.map_layer0.bias"] = torch.zeros(1 + len(state["model.map_layer0.bias"]))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (drop_a_tensor, r"model\.map_layer0\.weight \[32, 8\] is missing"),
        (add_a_tensor, r"model\.more \[1\] is no part of its configuration"),
        (widen_a_tensor, r"model\.map_layer0\.bias is \[33\], but its configuration means \[32\]"),
    ],
)
def test_weights_of_another_architecture_are_refused_with_the_parameter_and_both_shapes(saved, change, difference):
    state = load_file(saved.path)
    change(state)
    file = rewrite(saved, state=state)
    with pytest.raises(
        CheckpointError, match=rf"net\.safetensors holds another architecture than it says: {difference}; "
    ) as refusal:
        load_network(file)
    assert "\n" not in str(refusal.value)


def redescribed(saved, **changes):
    config = CONFIG.to_dict() | changes
    return rewrite(saved, metadata={"bdense_network": json.dumps({"config": config})})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_blocks": 2}, r"holds another architecture.*model\.enc\."),
        ({"num_blocks": 10**9}, r"holds another architecture.*2 levels of 1000000000 blocks"),
        ({"model_channels": 10**12}, r"(holds another architecture|describes a network that cannot be built)"),
        ({"model_channels": 10**30}, r"(holds another architecture|describes a network that cannot be built)"),
        ({"model_channels": 6}, r"(holds another architecture|describes a network that cannot be built)"),
        ({"architecture": "dhariwal"}, r"holds another architecture"),
    ],
)
def test_a_description_of_another_network_is_refused_before_memory_is_taken_for_it(saved, changes, reason):
    with pytest.raises(CheckpointError, match=rf"net\.safetensors {reason}") as refusal:
        load_network(redescribed(saved, **changes))
    assert "\n" not in str(refusal.value)


def test_another_safetensors_file_under_a_networks_name_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"mean": torch.zeros(2)}, path)
    file = HashedFile(path=str(path), sha256=sha256_of_file(path))
    with pytest.raises(CheckpointError, match=r"is no network of this project: it has no entry bdense_network"):
        load_network(file)


def test_loading_leaves_the_random_numbers_of_building_as_they_were(saved):
    torch.manual_seed(5)
    load_network(saved)
    after_loading = torch.rand(3)
    torch.manual_seed(5)
    build(CONFIG)
    assert torch.equal(after_loading, torch.rand(3))


# --- EDM's pickles (what is in them is tested in test_edm_pickle.py) -------------------------------------


def imported(monkeypatch, tmp_path, state, config=CONFIG):
    read = EDMCheckpoint(config=config, state=state, class_name="EDMPrecond", key="ema", sha256="ab" * 32)
    monkeypatch.setattr(checkpoints, "read_edm_pickle", lambda _: read)
    return import_edm(tmp_path / "edm.pkl", tmp_path / "out" / "teacher.safetensors")


def test_an_imported_network_has_the_pickles_weights_and_origin(network, monkeypatch, tmp_path):
    file = imported(monkeypatch, tmp_path, network.state_dict())
    loaded = load_network(file)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert read_metadata(file.path)["about"] == {
        "source": "edm.pkl",
        "source_sha256": "ab" * 32,
        "format": "EDM pickle, EDMPrecond",
    }


@pytest.mark.parametrize("change", [drop_a_tensor, add_a_tensor, widen_a_tensor])
def test_a_pickle_with_other_parameters_is_refused_by_their_name_and_nothing_is_written(
    network, monkeypatch, tmp_path, change
):
    state = network.state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=r"edm\.pkl holds another architecture.*model\.m"):
        imported(monkeypatch, tmp_path, state)
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_is_named(network, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write the network .*net\.safetensors: "):
        save_network(network, tmp_path / "file" / "net.safetensors")
    assert (tmp_path / "file").read_text() == "in the way"
