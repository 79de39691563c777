"""Published weights of DDPM: each form gives the network that it is of, and nothing else is read."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bdense_core import discrete
from bdense_core.checkpoints import import_network, load_network, save_network
from bdense_core.ddpm_weights import holds_weights
from bdense_core.errors import CheckpointError
from bdense_core.integrity import read_metadata
from bdense_core.networks import NetworkConfig, build

# Of diffusers' own network: names, shapes and what it answers to `numbers`.
DIFFUSERS = json.loads(Path(__file__).with_name("diffusers_unet.json").read_text())
CONFIG = NetworkConfig.ddpm(
    img_resolution=32, model_channels=32, channel_mult=[1, 2, 2], num_blocks=1, attn_resolutions=[16]
)


def numbers(shape, seed):
    """Between -0.5 and 0.5, the same everywhere: made of whole numbers."""
    index = torch.arange(torch.Size(shape).numel())
    return (((7919 * index + 104729 * seed) % 2003).double() / 2003 - 0.5).float().reshape(shape)


def diffusers_state(column):
    state = {}
    for seed, row in enumerate(DIFFUSERS["parameters"]):
        shape = row[2]
        fan_in = torch.Size(shape[1:]).numel()
        state[row[column]] = numbers(shape, seed) * (4 / fan_in**0.5 if len(shape) > 1 else 1)
    return state


def shown_z(network, z, steps):
    """The answer of the U-Net that sees `z` at these steps of DDPM's schedule."""
    sigma = discrete.linear().sigmas[torch.tensor(steps)].float()
    with torch.no_grad():
        return network.raw(z * (1 + sigma**2).sqrt()[:, None, None, None], sigma)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build(CONFIG).eval()


@pytest.fixture
def original(network):
    """The network's weights by the original names, as in pytorch_diffusion."""
    return {name.removeprefix("model."): tensor.clone() for name, tensor in network.state_dict().items()}


def imported(path):
    return load_network(import_network(path, path.parent / "out" / "teacher.safetensors"))


def write(state, path, **options):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, **options)
    return path


@pytest.mark.parametrize("column", [0, 1], ids=["names of today", "names of before"])
@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_weights_of_diffusers_answer_as_diffusers_does(tmp_path, column, file):
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS["settings"]))
    found = imported(write(diffusers_state(column), tmp_path / file))
    assert found.config == CONFIG
    out = shown_z(found, 2 * numbers((2, 3, 32, 32), 1000), DIFFUSERS["timesteps"])
    assert out.flatten()[::191].tolist() == pytest.approx(DIFFUSERS["every_191st_output"], abs=2e-5)


@pytest.mark.parametrize("file", ["model-790000.ckpt", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_by_the_original_names_give_the_same_network(tmp_path, network, original, file, prefix):
    assert {"temb.dense.1.bias", "down.1.attn.0.q.weight", "mid.attn_1.proj_out.bias"} <= set(original)
    assert {"down.0.downsample.conv.weight", "up.2.block.1.nin_shortcut.weight", "norm_out.bias"} <= set(original)
    found = imported(write({prefix + name: tensor for name, tensor in original.items()}, tmp_path / file))
    assert (found.config, found.training) == (network.config, False)
    z = numbers((2, 3, 32, 32), 7)
    assert torch.equal(shown_z(found, z, [0, 999]), shown_z(network, z, [0, 999]))


def test_files_from_before_torchs_zip_format_are_read_too(tmp_path, network, original):
    path = write(original, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(imported(path).model.conv_out.weight, network.model.conv_out.weight)


def test_half_precision_weights_become_single_precision(tmp_path, original):
    found = imported(write({name: t.half() for name, t in original.items()}, tmp_path / "fp16.safetensors"))
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert torch.equal(found.model.conv_in.weight, original["conv_in.weight"].half().float())


def test_the_file_says_where_its_weights_came_from(tmp_path, original):
    path = write(original, tmp_path / "model.ckpt")
    made = import_network(path, tmp_path / "teacher.safetensors")
    about = read_metadata(made.path)["about"]
    assert (about["source"], about["format"]) == ("model.ckpt", "DDPM weights, original names")
    assert len(about["source_sha256"]) == 64


def test_larger_images_have_their_attention_deeper_and_no_dropout(tmp_path):
    config = NetworkConfig.ddpm(
        img_resolution=64, model_channels=32, channel_mult=[1, 1, 1], num_blocks=1, attn_resolutions=[16], dropout=0
    )
    state = {name.removeprefix("model."): tensor for name, tensor in build(config).state_dict().items()}
    assert imported(write(state, tmp_path / "model.pt")).config == config


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"config\.json cannot be read .*put the config\.json that was published"),
        ("no json", r"config\.json cannot be read"),
        ("3", r"config\.json cannot be read"),
        ("{}", "flip_sin_to_cos is 'not given'"),
        (json.dumps(DIFFUSERS["settings"] | {"freq_shift": 0}), "freq_shift is 0 in .*, not 1"),
        (json.dumps(DIFFUSERS["settings"] | {"attention_head_dim": 8}), "attention_head_dim is 8 in .*, not None"),
    ],
)
def test_a_network_of_diffusers_that_computes_otherwise_is_refused(tmp_path, content, reason):
    """It has the same names and shapes, and would answer nonsense."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    path = write(diffusers_state(0), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors .*{reason}"):
        imported(path)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_something_is_refused_and_does_not(tmp_path, original, zipped):
    content = original | {"bomb": Bomb(tmp_path / "went-off")}
    path = write(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model\.ckpt is refused: .*nothing of it was run.*mkdir") as refusal:
        imported(path)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "went-off").exists()


def without_a_layer(state):
    del state["mid.block_1.conv1.bias"]
    return state


def with_classes(state):
    return state | {"class_embed.weight": torch.zeros(11, 128)}


def attending_twice(state):
    return state | {"down.0.attn.0.q.weight": torch.zeros(32, 32, 1, 1)}


def without_a_stem(state):
    del state["conv_in.weight"]
    return state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_a_layer, r"model\.mid\.block_1\.conv1\.bias \[64\] is missing"),
        (with_classes, r"class_embed\.weight \[11, 128\] is no part"),
        (attending_twice, "attends at 2 resolutions, DDPM's at one"),
        (without_a_stem, r"lacks 'conv_in\.weight'"),
        (lambda state: state | {"conv_in.weight": torch.zeros(32)}, r"its conv_in\.weight is \[32\]"),
        (lambda state: state | {"conv_in.weight": torch.zeros(0, 3, 3, 3)}, r"its conv_in\.weight is \[0, 3"),
        (lambda state: state | {"conv_in.weight": torch.zeros(31, 3, 3, 3)}, "model_channels is 31"),
        (lambda state: {"fc.weight": torch.zeros(2, 2)}, r"lacks 'conv_in\.weight'; give the weights of its U-Net"),
        (lambda state: {"model": state, "epoch": 3}, r"more than the weights of one network; .*\(EMA\)"),
        (lambda state: [state, state], "more than the weights of one network"),
        (lambda state: {1: torch.zeros(1)}, "more than the weights of one network"),
        (lambda state: {"steps": torch.arange(3)}, "more than the weights of one network"),
        (lambda state: {"sparse": torch.eye(3).to_sparse()}, "more than the weights of one network"),
        (lambda state: state | {"w": torch.zeros(1).expand(10**9)}, r"is damaged: it claims \d{10} numbers in"),
    ],
)
def test_what_is_no_network_of_ddpm_is_refused_with_its_reason(tmp_path, original, change, reason):
    path = write(change(original), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=rf"model\.pt .*{reason}") as refusal:
        imported(path)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["model.ckpt", "old.ckpt", "model.safetensors"])
@pytest.mark.parametrize("keep", [20, 200, 5000, 0.5, -1])
def test_a_file_that_was_cut_short_is_refused_in_one_line(tmp_path, original, file, keep):
    options = {"_use_new_zipfile_serialization": False} if file == "old.ckpt" else {}
    path = write(original, tmp_path / file, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])
    with pytest.raises(CheckpointError, match=rf"{path.stem}\S* is (damaged|refused)") as refusal:
        imported(path)
    assert "\n" not in str(refusal.value)


def test_a_network_of_this_project_needs_no_import(tmp_path, network):
    made = save_network(network, tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match="a network of this project needs no import"):
        imported(Path(made.path))


def test_pickles_of_edm_and_missing_files_are_left_to_their_reader(tmp_path):
    pickle = tmp_path / "edm.pkl"
    pickle.write_bytes(b"\x80\x03}q\x00X\x03\x00\x00\x00emaq\x01c")
    assert not holds_weights(pickle)
    with pytest.raises(CheckpointError, match=r"edm\.pkl"):
        imported(pickle)
    with pytest.raises(CheckpointError, match=r"cannot read .*gone\.pkl"):
        imported(tmp_path / "gone.pkl")


def test_import_teacher_takes_them(tmp_path, monkeypatch, capsys, original):
    from search.cli import main

    monkeypatch.setenv("BDENSE_HOME", str(tmp_path / "home"))
    path = write(original, tmp_path / "ddpm.ckpt")
    with pytest.raises(SystemExit) as ended:
        main(["import-teacher", str(path), "--name", "ddpm", "--format", "json"])
    said = json.loads(capsys.readouterr().out)
    assert (ended.value.code, said["teacher"], said["config"]["architecture"]) == (0, "ddpm", "ddpm")
    assert Path(said["path"]).is_file()
