"""Networks against the numbers of NVlabs/edm (shared/vectors/sfd/README.md)."""

import json
import re

import pytest
import torch
from torch import nn

from bdense_core.networks import NetworkConfig, build
from bdense_core.unets import BlockStyle, PositionalEmbedding, ResidualBlock

pytestmark = pytest.mark.golden


@pytest.mark.files("sfd/networks/*.safetensors", "sfd/networks/full_size_*.json")
def test_every_stored_network_block_and_embedding(path, read_vectors, stored_network):
    if path.suffix == ".json":
        check_full_size(json.loads(path.read_text()))
        return
    vectors = read_vectors(path)
    if "wrapper" in vectors.meta:
        check_network(vectors, stored_network)
    elif "blocks" in vectors.meta:
        check_blocks(vectors)
    else:
        check_embeddings(vectors)


def check_network(vectors, stored_network):
    denoiser, arrays = stored_network(vectors), vectors.arrays
    assert sum(p.numel() for p in denoiser.parameters()) == vectors.meta["n_params"]
    outputs = {"D": denoiser, "F": denoiser.raw, "c_noise": lambda x, sigma, *labels: denoiser.c_noise(sigma)}
    for key in arrays:
        if found := re.fullmatch(r"(D|F|c_noise)((?:_scalar_sigma|_nolabel|_aug)*)", key):
            inputs = (
                arrays["x"],
                arrays["sigma_scalar" if "_scalar_sigma" in found[2] else "sigma"],
                None if "_nolabel" in found[2] else arrays.get("class_labels"),
                arrays["augment_labels"] if "_aug" in found[2] else None,
            )
            with torch.no_grad():
                vectors.check(key, outputs[found[1]](*inputs))
    assert {"D", "F", "c_noise"} <= vectors.checked
    assert not vectors.unchecked("state.", "x", "sigma", "sigma_scalar", "class_labels", "augment_labels")


def check_blocks(vectors):
    assert vectors.meta["blocks"]
    for name, given in vectors.meta["blocks"].items():
        block = build_block(dict(given))
        block.load_state_dict(vectors.state(f"{name}/state."), strict=True)
        with torch.no_grad():
            out = block.eval()(vectors.arrays[f"{name}/x"], vectors.arrays[f"{name}/emb"])
        vectors.check(f"{name}/out", out)
        assert block.num_heads == given["num_heads_effective"]
    inputs = [f"{name}/{key}" for name in vectors.meta["blocks"] for key in ("state.", "x", "emb")]
    assert not vectors.unchecked(*inputs)


def build_block(given):
    """The block that upstream's arguments describe; an argument not known here fails the test."""
    del given["num_heads_effective"]
    channels = given.pop("in_channels"), given.pop("out_channels")
    num_heads, channels_per_head = given.pop("num_heads", None), given.pop("channels_per_head", 64)
    style = BlockStyle(
        emb_channels=given.pop("emb_channels"),
        dropout=given.pop("dropout", 0.0),
        eps=given.pop("eps", 1e-5),
        adaptive_scale=given.pop("adaptive_scale", True),
        skip_scale=given.pop("skip_scale", 1.0),
        channels_per_head=channels[1] // num_heads if num_heads else channels_per_head,
        project_resampled=given.pop("resample_proj", False),
        taps=tuple(given.pop("resample_filter", (1, 1))),
    )
    resampling = "up" if given.pop("up", False) else "down" if given.pop("down", False) else None
    attention = given.pop("attention", False)
    assert not given, f"arguments not covered: {given}"
    return ResidualBlock(*channels, style, resampling=resampling, attention=attention)


def check_embeddings(vectors):
    cases = [key for key in vectors.arrays if key != "c_noise"]
    assert cases
    for case in cases:
        kind, channels, *endpoint = case.split("_")
        assert (kind, endpoint) in [("positional", []), ("positional", ["endpoint"])]
        embed = PositionalEmbedding(int(channels), endpoint=bool(endpoint))
        vectors.check(case, embed(vectors.arrays["c_noise"]))


def check_full_size(meta):
    """The published layers, worked out without weights."""
    with torch.device("meta"):
        denoiser = build(NetworkConfig.from_edm_kwargs(meta["wrapper"], meta["kwargs"]))
    parameters = {name: list(p.shape) for name, p in denoiser.named_parameters()}
    assert parameters == meta["parameters"]
    assert list(parameters) == list(meta["parameters"])
    assert {name: list(b.shape) for name, b in denoiser.named_buffers()} == meta["buffers"]
    assert sum(p.numel() for p in denoiser.parameters()) == meta["n_params"]
    blocks = {n: m for n, m in denoiser.named_modules() if isinstance(m, ResidualBlock) and m.num_heads}
    assert {name: block.num_heads for name, block in blocks.items()} == meta["attention_blocks"]
    norms = {n: [m.num_groups, m.eps] for n, m in denoiser.named_modules() if isinstance(m, nn.GroupNorm)}
    assert not meta["group_norms"] or norms == meta["group_norms"]
