"""DASH's noise schedule and U-Nets against the numbers of its authors' code (shared/vectors/dash/README.md)."""

import json

import pytest
import torch
from torch.nn import functional

from bdense_core import discrete
from bdense_core.ddpm_unet import time_features
from bdense_core.networks import NetworkConfig, build
from tests.golden import dash

pytestmark = pytest.mark.golden
in_both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def test_every_stored_schedule(vectors_root):
    stored = dash.read(vectors_root, "schedule")
    for case in stored.cases:
        assert set(case) == {"T", "s", "beta_min", "beta_max", "n_clipped_low", "n_clipped_high"}
        limits = {key: case[key] for key in ("s", "beta_min", "beta_max")}
        for num_steps, low, high in zip(case["T"], case["n_clipped_low"], case["n_clipped_high"], strict=True):
            schedule = discrete.cosine(num_steps, **limits)
            share = schedule.alphas_cumprod
            found = {
                "betas": schedule.betas,
                "alphas": 1 - schedule.betas,
                "alphas_cumprod": share,
                "alphas_cumprod_prev": schedule.alphas_cumprod_prev,
                "sqrt_alphas_cumprod": share.sqrt(),
                "sqrt_one_minus_alphas_cumprod": (1 - share).sqrt(),
                "snr": schedule.snr,
            }
            for name, values in found.items():
                stored.check(f"T{num_steps}.{name}", values)
            assert (schedule.betas == case["beta_min"]).sum() == low
            assert (schedule.betas == case["beta_max"]).sum() == high
        if case is stored.cases[0]:
            share = discrete.cosine(case["T"][0], **limits).alphas_cumprod[stored["q.t"]][:, None, None, None]
            stored.check("q.x_t", share.sqrt() * stored["q.x0"] + (1 - share).sqrt() * stored["q.eps"])
    assert not stored.unchecked()


@in_both_types
def test_every_stored_unet_and_its_gradients(vectors_root, dtype):
    weights, stored = dash.read(vectors_root, "unet_weights"), dash.read(vectors_root, "unet_io")
    x, t, y = stored["x"].to(dtype).requires_grad_(), stored["t"].to(dtype), stored["y"]
    for case in weights.cases:
        unet, prefix = stored_unet(weights, case, dtype), case["prefix"]
        assert sum(p.numel() for p in unet.parameters()) == case["n_params"]
        labels = functional.one_hot(y, case["ncls"] + 1)[:, :-1].to(dtype)  # the null token: a row of zeros
        out = unet(x, t, labels)
        stored.check(f"{prefix}temb_sin", time_features(t, case["ch"]))
        stored.check(f"{prefix}out", out)
        stored.check(f"{prefix}out_nolabel", unet(x, t))
        names = list(stored.below(f"{prefix}gradsum."))
        objective = (out * x.detach().flip(0)).sum()
        grad_x, *gradients = torch.autograd.grad(objective, [x, *(unet.get_parameter(name) for name in names)])
        stored.check(f"{prefix}grad_x", grad_x)
        for name, gradient in zip(names, gradients, strict=True):
            sums = [gradient.sum(), gradient.abs().sum(), gradient.square().sum()]
            stored.check(f"{prefix}gradsum.{name}", torch.stack(sums))
    assert not stored.unchecked()


def stored_unet(weights, case, dtype):
    """The network of a case, in evaluation mode; a setting that is not known here fails the test."""
    known = {"ch", "mult", "nrb", "attn", "size", "ncls", "dropout", "cfg_dropout"}
    assert set(case) == known | {"prefix", "n_params"}
    unet = build(config_of(case, case["ncls"], label_dropout=case["cfg_dropout"])).model
    scales = {name: weights.rules[f"{case['prefix']}{name}"].get("scale", 1) for name in unet.state_dict()}
    unet.load_state_dict({name: w * scales[name] for name, w in weights.below(case["prefix"]).items()}, strict=True)
    return unet.to(dtype).eval()


def config_of(case, label_dim, **others):
    """What this project calls upstream's settings."""
    return NetworkConfig.ddpm(
        img_resolution=case["size"],
        img_channels=case.get("in_channels", 3),
        label_dim=label_dim,
        preconditioning="cosine",
        model_channels=case["ch"],
        channel_mult=case["mult"],
        num_blocks=case["nrb"],
        attn_resolutions=case["attn"],
        dropout=case["dropout"],
        **others,
    )


@pytest.mark.files("dash/unet_params_*.json")
def test_the_full_networks_have_the_stored_parameters_in_their_order(path):
    stored = json.loads(path.read_text())
    case = stored["config"]
    assert case["in_channels"] == case["out_ch"]
    assert case["resamp_with_conv"] is True
    totals = {label_dim: meta_unet(case, int(label_dim)) for label_dim in stored["total_params"]}
    assert {n: sum(p.numel() for p in unet.parameters()) for n, unet in totals.items()} == stored["total_params"]
    unet = meta_unet(case, stored["num_classes"])
    listed = [[name, list(p.shape)] for name, p in unet.named_parameters()]
    assert listed == stored["parameters_in_registration_order"]
    assert [name for name, _ in unet.named_buffers()] == stored["buffers"]


def meta_unet(case, label_dim):
    """The layers without weights."""
    with torch.device("meta"):
        return build(config_of(case, label_dim)).model
