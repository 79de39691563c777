"""DDPM's U-Net: its sizes, its null token, its head. Its numbers are checked in tests/golden/test_dash_networks.py."""

import dataclasses

import pytest
import torch
from torch import nn

from bdense_core.branches import with_branches, without_branches
from bdense_core.ddpm_unet import Attention, DDPMUNet, Downsample, Upsample, time_features
from bdense_core.errors import BadValue
from bdense_core.networks import NetworkConfig, build, forward_flops
from bdense_core.precision import in_precision

SMALL = NetworkConfig.ddpm(
    img_resolution=8,
    img_channels=2,
    label_dim=3,
    preconditioning="cosine",
    model_channels=8,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    dropout=0.0,
    norm_groups=4,
)


def changed(**values):
    return dataclasses.replace(SMALL, **values)


def randomised(config=SMALL):
    """A network in evaluation mode whose every weight is drawn."""
    torch.manual_seed(0)
    network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    return network


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 8, 8, generator=generator), torch.linspace(0.05, 20.0, n)


def test_the_network_of_ddpm_on_cifar_10_has_its_published_size():
    with torch.device("meta"):
        network = build(NetworkConfig.ddpm(img_resolution=32))
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    assert forward_flops(network.config) / 2e9 == pytest.approx(6.1, rel=0.03)  # multiplications of one image


def test_attention_is_where_asked_and_always_in_the_middle():
    def attending(**values):
        model = build(changed(**values)).model
        return [name for name, layer in model.named_modules() if isinstance(layer, Attention)]

    assert attending(attn_resolutions=[]) == ["mid.attn_1"]
    assert attending(attn_resolutions=[8], num_blocks=2) == [
        *("down.0.attn.0", "down.0.attn.1", "mid.attn_1"),
        *("up.0.attn.0", "up.0.attn.1", "up.0.attn.2"),
    ]


def test_time_features_are_sines_then_cosines_from_frequency_one_down_to_a_ten_thousandth():
    features = time_features(torch.tensor([0.5, 100.0], dtype=torch.float64), 6)
    angles = torch.tensor([[0.5], [100.0]]) * torch.tensor([1.0, 0.01, 0.0001], dtype=torch.float64)
    assert torch.allclose(features, torch.cat([angles.sin(), angles.cos()], dim=1), atol=1e-12)


def test_halving_pads_at_the_far_ends_and_doubling_repeats_pixels():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    down, up = Downsample(1), Upsample(1)
    with torch.no_grad():
        for layer in (down, up):
            layer.conv.bias.zero_()
            layer.conv.weight.zero_()
        down.conv.weight[0, 0, 0, 2] = 1  # one row of taps from the left: reads two pixels to the right
        assert down(image)[0, 0].tolist() == [[2, 0], [10, 0]]
        up.conv.weight[0, 0, 1, 1] = 1
        assert torch.equal(up(image), image.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_an_absent_label_is_the_null_token():
    """That is the embedding's last row: with it as the row of class 1, label 1 changes nothing."""
    network, (x, sigma) = randomised(), inputs()
    with torch.no_grad():
        unlabelled = network(x, sigma)
        assert torch.equal(network(x, sigma, torch.zeros(3, 3)), unlabelled)
        ones = torch.eye(3)[[1, 1, 1]]
        assert not torch.allclose(network(x, sigma, ones), unlabelled, atol=1e-2)
        table = network.model.class_embed.weight
        assert table.shape == (4, 32)
        table[1] = table[3]
        assert torch.allclose(network(x, sigma, ones), unlabelled, atol=1e-6)


def test_each_label_reads_its_own_row():
    network, (x, sigma) = randomised(), inputs()
    network.zero_grad()
    network(x, sigma, torch.eye(3)[[0, 2, 2]]).sum().backward()
    assert network.model.class_embed.weight.grad.abs().sum(1).gt(0).tolist() == [True, False, True, False]


def test_labels_are_dropped_in_training_sample_by_sample_at_the_configured_rate():
    network = randomised(changed(label_dropout=0.25)).train()
    x, sigma = (tensor[:1].expand(400, *tensor.shape[1:]) for tensor in inputs())
    labels = torch.eye(3)[:1].expand(400, 3)
    torch.manual_seed(0)
    with torch.no_grad():
        told = network.eval()(x[:1], sigma[:1], labels[:1])
        untold = network(x[:1], sigma[:1])
        out = network.train()(x, sigma, labels)
    dropped = (out - untold).abs().flatten(1).amax(1) < 1e-4
    heard = (out - told).abs().flatten(1).amax(1) < 1e-4
    assert bool((dropped ^ heard).all())
    assert 70 <= int(dropped.sum()) <= 130  # 100 expected, with a standard deviation of 8.7


def test_without_label_dropout_every_label_is_heard_in_training():
    x, sigma = inputs()
    network = randomised(changed(label_dropout=0.0))
    with torch.no_grad():
        assert torch.equal(network.train()(x, sigma, torch.eye(3)), network.eval()(x, sigma, torch.eye(3)))


@pytest.mark.parametrize("preconditioning", ["eps", "both"])
def test_the_head_is_repeated_and_dropped_in_whole_groups(preconditioning):
    """Where image and noise are predicted, a group is both of them."""
    teacher, (x, sigma) = randomised(changed(preconditioning=preconditioning)), inputs()
    student = with_branches(teacher, 3)
    size = 2 if preconditioning == "eps" else 4
    assert student.model.conv_out.out_channels == 3 * size
    with torch.no_grad():
        expected = teacher(x, sigma)
        for k in range(3):
            assert torch.allclose(student.branches(x, sigma)[:, k], expected, atol=1e-5)
        student.model.conv_out.bias[-size:] += torch.arange(size) + 1.0  # the last branch alone
        branches = student.branches(x, sigma)
        assert torch.allclose(branches[:, 1], expected, atol=1e-5)
        assert not torch.allclose(branches[:, 2], expected, atol=1e-2)
        assert torch.allclose(without_branches(student)(x, sigma), branches[:, 2], atol=1e-5)


def test_in_half_precision_the_embedding_stays_in_single_precision():
    network, (x, sigma) = randomised(), inputs()
    half = in_precision(network, "bfloat16")
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    told = ("temb", "class_embed")
    assert kept == {name for name, _ in network.named_parameters() if any(part in name for part in told)}
    assert {p.dtype for name, p in half.named_parameters() if name not in kept} == {torch.bfloat16}
    with torch.no_grad():
        single, out = network(x, sigma, torch.eye(3)), half(x, sigma, torch.eye(3))
    assert out.dtype == torch.float32
    assert (out - single).abs().max() < 0.1 * single.abs().max()


def test_every_normalisation_has_the_configured_groups():
    norms = [layer for layer in build(SMALL).modules() if isinstance(layer, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(4, 1e-6)}


def test_an_unconditional_network_has_no_class_embedding():
    model = build(changed(label_dim=0)).model
    assert isinstance(model, DDPMUNet)
    assert not any("class_embed" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"norm_groups": 3}, "model_channels is 8; .*norm_groups"),
        ({"norm_groups": 0}, "norm_groups is 0"),
        ({"model_channels": 9, "norm_groups": 9}, "an even number"),
        ({"augment_dim": 9}, "augment_dim is 9; the ddpm architecture wants 0"),
        ({"encoder_type": "residual"}, "encoder_type"),
        ({"embedding_type": "fourier"}, "embedding_type"),
        ({"architecture": "song"}, "norm_groups is 4; the song architecture wants 32"),
    ],
)
def test_impossible_values_are_named(values, named):
    with pytest.raises(BadValue, match=named):
        changed(**values)
