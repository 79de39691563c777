"""Networks against the numbers of NVlabs/edm (shared/vectors/sfd/README.md)."""

import json

import pytest
import torch
from torch import nn

from bdense_core.networks import NetworkConfig, build
from bdense_core.unets import BlockStyle, PositionalEmbedding, ResidualBlock

pytestmark = pytest.mark.golden


@pytest.mark.files("sfd/networks/*.safetensors")
def test_every_stored_network_block_and_embedding(path, read_vectors, stored_network):
    vectors = read_vectors(path)
    if "wrapper" in vectors.meta:
        check_network(vectors, stored_network)
    elif "blocks" in vectors.meta:
        check_blocks(vectors)
    else:
        check_embeddings(vectors)


def check_network(vectors, stored_network):
    denoiser, arrays = stored_network(vectors), vectors.arrays
    labels = arrays.get("class_labels")
    variants = {
        "": (arrays["sigma"], labels, None),
        "_scalar_sigma": (arrays["sigma_scalar"], labels, None),
        "_nolabel": (arrays["sigma"], None, None),
        "_aug": (arrays["sigma"], labels, arrays.get("augment_labels")),
    }
    results = {}
    with torch.no_grad():
        for suffix, (sigma, class_labels, augment_labels) in variants.items():
            if f"D{suffix}" in arrays:
                inputs = (arrays["x"], sigma, class_labels, augment_labels)
                results[f"D{suffix}"] = denoiser(*inputs)
                results[f"F{suffix}"] = denoiser.raw(*inputs)
                results[f"c_noise{suffix}"] = denoiser.c_noise(sigma)
    stored = {key for key, rule in vectors.meta["arrays"].items() if "tol_maxabs" in rule}
    assert set(results) == stored  # nothing stored was left out
    for key, value in results.items():
        vectors.check(key, value)


def check_blocks(vectors):
    assert vectors.meta["blocks"]
    for name, given in vectors.meta["blocks"].items():
        block = build_block(dict(given))
        block.load_state_dict(vectors.state(f"{name}/state."), strict=True)
        with torch.no_grad():
            out = block.eval()(vectors.arrays[f"{name}/x"], vectors.arrays[f"{name}/emb"])
        vectors.check(f"{name}/out", out)
        assert block.num_heads == given["num_heads_effective"]


def build_block(given):
    """The block that upstream's arguments describe; an argument not known here fails the test."""
    del given["num_heads_effective"]
    style = BlockStyle(
        emb_channels=given.pop("emb_channels"),
        dropout=0.0,
        eps=given.pop("eps", 1e-5),
        adaptive_scale=given.pop("adaptive_scale"),
        skip_scale=given.pop("skip_scale", 1.0),
        channels_per_head=None if given.pop("num_heads", None) == 1 else given.pop("channels_per_head", 64),
        project_resampled=given.pop("resample_proj", False),
        taps=tuple(given.pop("resample_filter", (1, 1))),
    )
    resampling = "up" if given.pop("up", False) else "down" if given.pop("down", False) else None
    channels = given.pop("in_channels"), given.pop("out_channels")
    attention = given.pop("attention")
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


@pytest.mark.files("sfd/networks/full_size_*.json")
def test_full_size_networks_have_the_published_layers(path):
    meta = json.loads(path.read_text())
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


@pytest.mark.files("sfd/dense/folded_head.safetensors")
def test_last_branch_equals_the_folded_ordinary_network(path, read_vectors):
    vectors = read_vectors(path)
    assert vectors.meta["cases"]
    for name, case in vectors.meta["cases"].items():
        arrays = {k.removeprefix(f"{name}/"): v for k, v in vectors.arrays.items() if k.startswith(f"{name}/")}
        inputs = (arrays["x"], arrays["sigma"], arrays.get("class_labels"))
        config = NetworkConfig.from_edm_kwargs(case["wrapper"], case["kwargs"])
        folded = build(config).eval()
        folded.load_state_dict(vectors.state(f"{name}/state."), strict=True)
        values = config.to_dict() | {"num_branches": case["K"]}
        dense = build(NetworkConfig.from_dict(values)).eval()
        assert dense.head_name == case["head"]
        head = {f"{dense.head_name}.{k}": arrays[f"dense_head.{k}"].float() for k in ("weight", "bias")}
        dense.load_state_dict(folded.state_dict() | head, strict=True)
        with torch.no_grad():
            vectors.check(f"{name}/D_folded", folded(*inputs))
            vectors.check(f"{name}/D_branch", dense.branches(*inputs).transpose(0, 1))
            vectors.check(f"{name}/F", dense.raw(*inputs))
            vectors.check(f"{name}/D_folded", dense(*inputs))
