import json
import math

import pytest
import torch
from torch import nn

from bdense_core import assets, discrete
from bdense_core.errors import BadValue, ShapeMismatch, UnknownKey
from bdense_core.integrity import read_metadata
from bdense_core.networks import NetworkConfig, build, coefficients

SONG = NetworkConfig.ddpmpp(
    img_resolution=8,
    img_channels=2,
    model_channels=8,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    label_dim=3,
    augment_dim=2,
)
ADM = NetworkConfig.adm(
    img_resolution=8,
    img_channels=2,
    model_channels=16,
    channel_mult=[1, 4],
    num_blocks=1,
    attn_resolutions=[4],
    label_dim=3,
)
NCSN = NetworkConfig.ncsnpp(  # three levels, so that its image path widens twice
    img_resolution=8,
    img_channels=2,
    model_channels=8,
    channel_mult=[1, 2, 2],
    num_blocks=1,
    attn_resolutions=[4],
)
DDPM = NetworkConfig.ddpm(
    img_resolution=8,
    img_channels=2,
    model_channels=8,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    label_dim=3,
    preconditioning="v",
    norm_groups=4,
)
CONFIGS = {"song": SONG, "adm": ADM, "ncsn": NCSN, "ddpm": DDPM}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
edm_configs = pytest.mark.parametrize("config", [SONG, ADM, NCSN], ids=["song", "adm", "ncsn"])


def changed(config, **values):
    return NetworkConfig.from_dict(config.to_dict() | values)


def randomised(config, seed=0):
    """A network whose every weight is drawn, so that no layer hides behind its zero start."""
    torch.manual_seed(seed)
    denoiser = build(config).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(0, 0.2)
    return denoiser


def batch(config, n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, config.img_channels, 8, 8, generator=generator)
    labels = torch.eye(config.label_dim)[[i % config.label_dim for i in range(n)]] if config.label_dim else None
    return x, torch.linspace(0.5, 3.0, n), labels


@configs
def test_equal_groups_of_the_head_give_equal_branches_and_the_ordinary_output(config):
    plain, dense = randomised(config), build(changed(config, num_branches=4)).eval()
    state = plain.state_dict()
    for name in ("weight", "bias"):
        key = f"{plain.head_name}.{name}"
        state[key] = torch.cat([state[key]] * 4)
    dense.load_state_dict(state, strict=True)
    inputs = batch(config)
    with torch.no_grad():
        expected, branches = plain(*inputs), dense.branches(*inputs)
        assert branches.shape == (3, 4, 2, 8, 8)
        assert dense.raw(*inputs).shape == (3, 8, 8, 8)
        for k in range(4):
            assert torch.equal(branches[:, k], branches[:, 0])
            # Kernels may sum 8 output channels in another order than 2.
            assert torch.allclose(branches[:, k], expected, atol=1e-5, rtol=1e-5)


@configs
def test_branches_are_consecutive_channel_groups_and_the_last_one_samples(config):
    dense = randomised(changed(config, num_branches=3))
    x, sigma, labels = batch(config)
    with torch.no_grad():
        raw, branches = dense.raw(x, sigma, labels), dense.branches(x, sigma, labels)
        at = coefficients(config.preconditioning, sigma[:, None, None, None])
        for k in range(3):
            expected = at.skip * x + at.out * raw[:, 2 * k : 2 * k + 2]
            assert torch.allclose(branches[:, k], expected, atol=1e-6)
        assert not torch.allclose(branches[:, 0], branches[:, 2], atol=1e-2)
        assert torch.equal(dense(x, sigma, labels), branches[:, 2])


@configs
def test_one_branch_has_the_layers_of_the_ordinary_network(config):
    assert changed(config, num_branches=1) == config
    shapes = {k: v.shape for k, v in build(config).state_dict().items()}
    dense = build(changed(config, num_branches=4))
    wider = {k: v.shape for k, v in dense.state_dict().items()}
    assert shapes.keys() == wider.keys()
    assert {k for k in shapes if shapes[k] != wider[k]} == {
        f"{dense.head_name}.weight",
        f"{dense.head_name}.bias",
    }


@edm_configs
def test_a_fresh_network_outputs_almost_nothing(config):
    torch.manual_seed(0)
    with torch.no_grad():
        assert build(config).eval().raw(*batch(config)).abs().max() < 1e-3


def test_ddpmpp_starts_with_variances_that_fit_the_width_of_each_layer():
    torch.manual_seed(0)
    fresh = build(NetworkConfig.ddpmpp(img_resolution=8, model_channels=64, channel_mult=[1], num_blocks=1))
    weights = {k.removeprefix("model."): p for k, p in fresh.named_parameters()}
    expected = {  # variance 2 / (fan in + fan out), and 0.1 / C for the attention
        "map_layer1.weight": 2 / (256 + 256),
        "enc.8x8_block0.conv0.weight": 2 / (9 * 64 + 9 * 64),
        "dec.8x8_in0.qkv.weight": 0.1 / 64,
    }
    for name, variance in expected.items():
        assert weights[name].var().item() == pytest.approx(variance, rel=0.05), name
    assert not any(p.any() for k, p in weights.items() if k.endswith("bias"))


@configs
def test_every_parameter_that_takes_part_learns(config):
    denoiser = randomised(config)
    augment = torch.ones(3, config.augment_dim) if config.augment_dim else None
    denoiser(*batch(config), augment).square().sum().backward()
    # A bias of attention's keys changes no share, so its gradient is rounding noise or nothing.
    without = [k for k, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()]
    assert [k for k in without if not k.endswith(".k.bias")] == []


@configs
def test_each_image_has_its_own_noise_level_and_label(config):
    denoiser = randomised(config)
    x, sigma, labels = batch(config)
    with torch.no_grad():
        together = denoiser(x, sigma, labels)
        for i in range(len(x)):
            label = None if labels is None else labels[i : i + 1]
            assert torch.allclose(denoiser(x[i : i + 1], sigma[i], label), together[i : i + 1], atol=1e-5)
        assert torch.allclose(denoiser(x, 0.5, labels)[0], together[0], atol=1e-5)


def test_channels_last_gives_the_same_image():
    denoiser, (x, sigma, labels) = randomised(SONG), batch(SONG)
    with torch.no_grad():
        expected = denoiser(x, sigma, labels)
        denoiser = denoiser.to(memory_format=torch.channels_last)
        found = denoiser(x.to(memory_format=torch.channels_last), sigma, labels)
    assert torch.allclose(found, expected, atol=1e-5)


def test_double_precision_reaches_the_output():
    denoiser, (x, sigma, labels) = randomised(SONG), batch(SONG)
    with torch.no_grad():
        single = denoiser(x, sigma, labels)
        double = denoiser.double()(x.double(), sigma.double(), labels)
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4)


def test_half_precision_weights_answer_in_single_precision():
    denoiser, (x, sigma, labels) = randomised(SONG), batch(SONG)
    with torch.no_grad():
        single = denoiser(x, sigma, labels)
        half = denoiser.to(torch.bfloat16)(x, sigma, labels)
    assert half.dtype == torch.float32
    assert (half - single).abs().max() < 0.1 * single.abs().max()


@pytest.mark.parametrize("rate", ["dropout", "label_dropout"])
@pytest.mark.parametrize("config", [SONG, ADM, DDPM], ids=["song", "adm", "ddpm"])
def test_dropout_acts_in_training_only(config, rate):
    without = {"dropout": 0.0, "label_dropout": 0.0}
    denoiser, inputs = randomised(changed(config, **(without | {rate: 0.5}))), batch(config, n=8)
    with torch.no_grad():
        assert torch.equal(denoiser(*inputs), denoiser(*inputs))
        denoiser.train()
        assert not torch.equal(denoiser(*inputs), denoiser(*inputs))


def test_a_dropped_label_is_an_absent_label():
    denoiser = randomised(changed(SONG, dropout=0.0, label_dropout=0.999))
    x, sigma, labels = batch(SONG)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(denoiser.train()(x, sigma, labels), denoiser(x, sigma))


@pytest.mark.parametrize("kind", ["edm", "vp", "ve"])
def test_preconditioning_gives_the_unet_unit_variance_and_denoises_nothing_at_no_noise(kind):
    at = coefficients(kind, torch.tensor([1e-4, 80.0], dtype=torch.float64))
    assert at.skip[0].item() == pytest.approx(1.0, abs=1e-6)
    assert abs(at.out[0].item()) < 2e-4
    if kind == "edm":
        assert (at.scale**2 * (torch.tensor([1e-8, 6400.0]) + 0.25)).tolist() == pytest.approx([1, 1])


class Oracle(nn.Module):
    """Stands for the U-Net: answers with `output` and remembers what it was shown."""

    head_name = "conv_out"

    def __init__(self, output):
        super().__init__()
        self.output = output
        self.conv_out = nn.Conv2d(1, 1, 1, dtype=output.dtype)

    def forward(self, x, c_noise, class_labels, augment_labels):
        self.x, self.c_noise = x, c_noise
        return self.output


# In the terms of Progressive Distillation: z = alpha image + spread noise, with alpha = cos(pi u / 2).
TRUTHS = {
    "x": lambda image, noise, alpha, spread: image,
    "eps": lambda image, noise, alpha, spread: noise,
    "v": lambda image, noise, alpha, spread: alpha * noise - spread * image,
    "both": lambda image, noise, alpha, spread: torch.cat([image, noise], dim=1),
    "linear": lambda image, noise, alpha, spread: noise,
    "cosine": lambda image, noise, alpha, spread: noise,
}


def in_double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", TRUTHS)
def test_a_network_that_predicts_the_truth_is_shown_z_and_denoises_exactly(kind):
    torch.manual_seed(0)
    image, noise = in_double(4, 2, 8, 8), in_double(4, 2, 8, 8)
    u = torch.tensor([0.01, 0.3, 0.77, 0.99], dtype=torch.float64)
    angle = (math.pi / 2 * u)[:, None, None, None]
    denoiser = build(changed(DDPM, preconditioning=kind, label_dim=0))
    denoiser.model = Oracle(TRUTHS[kind](image, noise, angle.cos(), angle.sin()))
    sigma = angle.tan()
    assert torch.allclose(denoiser(image + sigma * noise, sigma.flatten()), image, atol=1e-11)
    assert torch.allclose(denoiser.model.x, angle.cos() * image + angle.sin() * noise, atol=1e-12)
    if kind in ("linear", "cosine"):
        levels = getattr(discrete, kind)().sigmas
        step = denoiser.model.c_noise.floor().long()
        assert ((levels[step] <= sigma.flatten()) & (sigma.flatten() <= levels[step + 1])).all()
    else:
        assert torch.allclose(denoiser.model.c_noise, 1000 * u, atol=1e-9)


def test_image_and_noise_are_blended_by_the_variance_of_the_noise():
    """arXiv 2202.00512, section 4: sigma'^2 times the image part plus alpha^2 times the image of the noise part."""
    torch.manual_seed(0)
    x, parts = in_double(1, 2, 8, 8), in_double(1, 4, 8, 8)
    denoiser = build(changed(DDPM, preconditioning="both", label_dim=0))
    denoiser.model = Oracle(parts)
    sigma = 0.75  # alpha = 0.8, sigma' = 0.6, z = 0.8 x
    of_noise = (0.8 * x - 0.6 * parts[:, 2:]) / 0.8
    assert torch.allclose(denoiser(x, sigma), 0.36 * parts[:, :2] + 0.64 * of_noise, atol=1e-12)


def test_branches_of_image_and_noise_are_consecutive_pairs_of_groups():
    torch.manual_seed(0)
    x, raw = in_double(2, 2, 8, 8), in_double(2, 12, 8, 8)
    dense = build(changed(DDPM, preconditioning="both", label_dim=0, num_branches=3))
    single = build(changed(DDPM, preconditioning="both", label_dim=0))
    dense.model = Oracle(raw)
    for k in range(3):
        single.model = Oracle(raw[:, 4 * k : 4 * k + 4])
        assert torch.equal(dense.branches(x, 1.3)[:, k], single(x, 1.3))


@pytest.mark.parametrize("name", ["digits", "digits16"])
def test_files_from_before_a_key_came_are_described_as_they_were(name):
    stored = read_metadata(assets.hashed(f"{name}/teacher.safetensors").path)["config"]
    assert NetworkConfig.from_dict(stored).to_dict() == stored


@configs
def test_a_configuration_survives_json(config):
    assert NetworkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_chanels": 8}, "did you mean network.model_channels"),
        ({"colour": 8}, "known are architecture"),
    ],
)
def test_unknown_keys_name_the_nearest(values, named):
    with pytest.raises(UnknownKey, match=named):
        changed(SONG, **values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"architecture": "unet"}, "architecture is 'unet'; choose one of song, dhariwal, ddpm"),
        ({"preconditioning": "iddpm"}, "preconditioning"),
        ({"img_resolution": 9}, "img_resolution is 9"),
        ({"model_channels": 8.0}, "model_channels is 8.0"),
        ({"num_blocks": True}, "num_blocks is True"),
        ({"channel_mult": []}, "channel_mult"),
        ({"channel_mult": [1, 0]}, "channel_mult"),
        ({"channel_mult": 2}, "channel_mult is 2; give a list"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"sigma_data": 0}, "sigma_data is 0"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter"),
        ({"num_branches": 0}, "num_branches is 0"),
        ({"num_branches": 2, "decoder_type": "skip"}, "skip decoder"),
        ({"architecture": "dhariwal", "embedding_type": "fourier"}, "embedding_type is 'fourier'"),
    ],
)
def test_impossible_values_are_named(values, named):
    with pytest.raises(BadValue, match=named):
        changed(SONG, **values)


def test_missing_keys_are_all_named():
    with pytest.raises(BadValue, match="lacks architecture, img_channels"):
        NetworkConfig.from_dict({k: v for k, v in SONG.to_dict().items() if k not in ("architecture", "img_channels")})


def test_channels_that_cannot_be_grouped_are_refused():
    with pytest.raises(BadValue, match="cannot be split"):
        build(changed(SONG, model_channels=150, channel_mult=[1]))


@pytest.mark.parametrize(
    ("class_name", "kwargs", "error"),
    [
        ("iDDPMPrecond", {}, BadValue),
        ("EDMPrecond", {"model_type": "UViT"}, BadValue),
        ("VPPrecond", {"beta_d": 20.0}, BadValue),
        ("EDMPrecond", {"unheard_of": 1}, UnknownKey),
    ],
)
def test_checkpoints_of_other_networks_are_refused(class_name, kwargs, error):
    with pytest.raises(error):
        NetworkConfig.from_edm_kwargs(class_name, {"img_resolution": 32, "img_channels": 3, **kwargs})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(3, 3, 8, 8)}, r"x is \[3, 3, 8, 8\]"),
        ({"x": torch.zeros(3, 2, 8, 4)}, r"x is \[3, 2, 8, 4\]"),
        ({"sigma": torch.ones(2)}, r"sigma is \[2\] for 3 images"),
        ({"sigma": torch.ones(3, 1, 1, 1)}, "sigma"),
        ({"class_labels": torch.zeros(3, 4)}, r"class_labels are \[3, 4\]"),
        ({"class_labels": torch.zeros(3, dtype=torch.long)}, "class_labels"),
        ({"augment_labels": torch.zeros(3, 9)}, "augment_labels"),
    ],
)
def test_tensors_of_another_shape_are_named(change, named):
    x, sigma, labels = batch(SONG)
    with pytest.raises(ShapeMismatch, match=named):
        build(SONG)(**({"x": x, "sigma": sigma, "class_labels": labels} | change))


def test_a_label_for_an_unconditional_network_is_refused():
    x, sigma, _ = batch(NCSN)
    with pytest.raises(BadValue, match="class_labels"):
        build(NCSN)(x, sigma, torch.zeros(3, 10))
