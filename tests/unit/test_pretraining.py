"""Training of a teacher: the loss of EDM, that a seed fixes the result, and that an interruption changes nothing."""

import contextlib
from dataclasses import replace

import pytest
import torch

from bdense_core import data, seeds
from bdense_core.errors import BadValue, CheckpointError, ShapeMismatch, TrainingDiverged
from bdense_core.networks import Denoiser, NetworkConfig, build
from bdense_core.precision import in_precision
from bdense_core.pretraining import Pretraining, denoising_loss, loss_weight, preset, pretrain
from bdense_core.snapshots import Snapshots

NETWORK = NetworkConfig.ddpmpp(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0
)
SHORT = Pretraining(budget_kimg=1.5, batch=32, warmup_kimg=0.1, ema_halflife_kimg=0.1)
WITH_DROPOUT = replace(NETWORK, dropout=0.2, label_dim=10, label_dropout=0.1)
TINY = replace(SHORT, budget_kimg=0.4, batch=8, snapshot_every_kimg=0.1)  # 50 iterations, a snapshot every 12


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny: several threads would only wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits():
    return data.load("digits")


def finish(training):
    """The trained network, and all events on the way."""
    events = []
    while True:
        try:
            events.append(next(training))
        except StopIteration as end:
            return end.value, events


def train(config, settings, **options):
    return finish(pretrain(*digits(), config, settings, **options))[0]


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# --- the loss -------------------------------------------------------------------------------------------


def test_the_loss_weight_is_edms():
    """By hand, sigma_data 0.5: (0.25 + 0.25) / (0.25)^2 = 8 and (4 + 0.25) / 1^2 = 4.25."""
    assert loss_weight(torch.tensor([0.5, 2.0]), 0.5).tolist() == pytest.approx([8, 4.25])


def test_half_precision_is_the_u_nets_alone():
    images, _ = digits()
    noise = torch.randn((64, 1, 8, 8), generator=seeds.generator(1))
    sigma = torch.linspace(0.1, 2, 64)
    torch.manual_seed(0)
    network = build(NETWORK)
    with torch.no_grad():
        network.get_parameter(f"{network.head_name}.weight").normal_(std=0.1)  # it begins as zeros
    types = []
    network.model.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    full, half = (denoising_loss(in_precision(network, p), images[:64], noise, sigma) for p in ("float32", "bfloat16"))
    assert types == [torch.float32, torch.bfloat16]
    assert full.dtype == half.dtype == torch.float32
    assert half.item() != full.item()
    assert half.item() == pytest.approx(full.item(), rel=0.02)  # bfloat16 has 8 bits: 2^-8 = 0.004 an operation


# --- training -------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_depends_on_its_seed_alone():
    images, _ = digits()
    noise = torch.randn((256, 1, 8, 8), generator=seeds.generator(1))
    sigma = torch.linspace(0.1, 2, 256)

    def loss(network: Denoiser) -> float:
        with torch.no_grad():
            return float(denoising_loss(network, images[:256], noise, sigma))

    trained = train(NETWORK, SHORT)
    torch.rand(5)
    again = train(NETWORK, SHORT)
    other = train(NETWORK, replace(SHORT, seed=1))
    barely = train(NETWORK, replace(SHORT, budget_kimg=0.03))
    assert loss(trained) < 0.7 * loss(barely)
    assert same(trained, again)
    assert loss(other) != loss(trained)
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_it_says_how_far_it_is():
    _, events = finish(pretrain(*digits(), NETWORK, TINY))
    assert [event.kimg for event in events] == pytest.approx([0.008 * n for n in (1, 9, 17, 25, 33, 41, 49, 50)])
    assert [event.done for event in events] == pytest.approx([event.kimg / 0.4 for event in events])
    assert {event.phase for event in events} == {"teacher"}
    assert all(0 < event.loss < 10 for event in events)


def test_what_happens_between_two_events_does_not_matter():
    training = pretrain(*digits(), WITH_DROPOUT, TINY)
    next(training)
    torch.manual_seed(5)
    assert same(finish(training)[0], train(WITH_DROPOUT, TINY))


def test_half_precision_and_mirrored_images_train_other_weights():
    trained = [train(NETWORK, replace(TINY, **changes)) for changes in ({}, {"precision": "bfloat16"}, {"flip": True})]
    assert not any(same(trained[0], other) for other in trained[1:])
    assert {p.dtype for network in trained for p in network.parameters()} == {torch.float32}


def test_about_half_of_the_images_are_mirrored_and_nothing_else_is_done_to_them(monkeypatch):
    images = torch.zeros(2, 1, 8, 8)
    images[:, :, :, 0] = 1  # one column on the left
    seen = []
    monkeypatch.setattr(
        "bdense_core.pretraining.denoising_loss",
        lambda network, clean, *rest: seen.append(clean) or denoising_loss(network, clean, *rest),
    )
    finish(pretrain(images, torch.zeros(2), NETWORK, replace(TINY, flip=True)))
    drawn = torch.cat(seen)
    left, right = drawn[:, 0, :, 0].mean(dim=1), drawn[:, 0, :, 7].mean(dim=1)
    assert torch.equal(left + right, torch.ones(400))
    assert 150 < right.sum() < 250  # five standard deviations of 400 coins
    assert drawn[:, :, :, 1:7].abs().sum() == 0


# --- interruptions --------------------------------------------------------------------------------------


def killed(training):
    """The end of a process: nothing is kept on the way out."""
    with contextlib.suppress(ZeroDivisionError):
        training.throw(ZeroDivisionError())


def test_a_closed_training_goes_on_from_the_very_iteration(tmp_path):
    """Ctrl-C closes a training, and whoever does may have used torch's generators in between."""
    whole = train(WITH_DROPOUT, TINY)
    training = pretrain(*digits(), WITH_DROPOUT, TINY, snapshots=Snapshots(tmp_path, identity={}))
    next(training)
    next(training)
    torch.rand(3)
    training.close()
    assert Snapshots(tmp_path, identity={}).latest().step == 9
    network, _ = finish(pretrain(*digits(), WITH_DROPOUT, TINY, snapshots=Snapshots(tmp_path, identity={})))
    assert same(network, whole)


@pytest.mark.parametrize("config", [NETWORK, WITH_DROPOUT], ids=["plain", "dropout and labels"])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, config):
    """Broken off in iteration 1, 17, 33 and 49, each time going on from the last of the snapshots 12, 24 and 48."""
    settings = replace(TINY, flip=True)
    whole = train(config, settings)
    for broken_off_after in (1, 3, 3, 4):
        training = pretrain(*digits(), config, settings, snapshots=Snapshots(tmp_path, identity={}))
        for _ in range(broken_off_after):
            next(training)
        killed(training)
        torch.rand(5)
    assert Snapshots(tmp_path, identity={}).latest().step == 48
    network, events = finish(pretrain(*digits(), config, settings, snapshots=Snapshots(tmp_path, identity={})))
    assert len(events) == 2  # the iterations 49 and 50
    assert same(network, whole)
    assert same(train(config, settings, snapshots=Snapshots(tmp_path, identity={})), whole)  # from the end


@pytest.mark.parametrize("events", [2, 5, 7])
def test_wherever_it_is_broken_off(tmp_path, events):
    training = pretrain(*digits(), WITH_DROPOUT, TINY, snapshots=Snapshots(tmp_path, identity={}))
    for _ in range(events):
        next(training)
    killed(training)
    resumed = train(WITH_DROPOUT, TINY, snapshots=Snapshots(tmp_path, identity={}))
    assert same(resumed, train(WITH_DROPOUT, TINY))


def test_how_often_snapshots_are_taken_changes_nothing(tmp_path):
    rarely = train(WITH_DROPOUT, replace(TINY, snapshot_every_kimg=50.0), snapshots=Snapshots(tmp_path, identity={}))
    assert same(rarely, train(WITH_DROPOUT, TINY, snapshots=Snapshots(tmp_path / "often", identity={})))
    assert TINY.to_dict() == replace(TINY, snapshot_every_kimg=50.0).to_dict()


def test_a_snapshot_of_another_training_is_refused(tmp_path):
    train(NETWORK, TINY, snapshots=Snapshots(tmp_path, identity={"seed": 0}))
    with pytest.raises(CheckpointError, match="differs in seed"):
        train(NETWORK, TINY, snapshots=Snapshots(tmp_path, identity={"seed": 1}))
    with pytest.raises(CheckpointError, match=r"another network's: Error.* in loading state_dict"):
        train(replace(NETWORK, model_channels=12), TINY, snapshots=Snapshots(tmp_path, identity={"seed": 0}))
    Snapshots(tmp_path / "empty", identity={}).save(1, {}, {})
    with pytest.raises(CheckpointError, match="another network"):
        train(NETWORK, TINY, snapshots=Snapshots(tmp_path / "empty", identity={}))


# --- settings and input ---------------------------------------------------------------------------------


def test_settings_that_came_later_leave_no_trace_where_they_do_nothing():
    """The shipped teacher's file holds the settings: it must stay reproducible to the byte."""
    assert set(Pretraining().to_dict()) == {
        "seed", "budget_kimg", "batch", "lr", "warmup_kimg", "ema_halflife_kimg", "p_mean", "p_std"
    }  # fmt: skip
    assert Pretraining(flip=True, precision="bfloat16").to_dict()["precision"] == "bfloat16"
    assert Pretraining(flip=True).to_dict()["flip"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is 0; give a positive"),
        ({"lr": float("nan")}, "lr is nan; give a positive"),
        ({"snapshot_every_kimg": -1.0}, "snapshot_every_kimg is -1.0; give a positive"),
        ({"precision": "half"}, "precision is 'half'; choose one of float32, bfloat16"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(BadValue, match=message):
        Pretraining(**changes)


def test_bad_images_and_labels_are_named():
    images, labels = digits()
    conditional = replace(NETWORK, label_dim=8)
    for arguments, error, message in (
        ((images[:, :, :4], labels, NETWORK), ShapeMismatch, r"\[1797, 1, 4, 8\], but .* \[N, 1, 8, 8\]"),
        ((images.expand(-1, 3, -1, -1), labels, NETWORK), ShapeMismatch, r"\[1797, 3, 8, 8\]"),
        ((images[:0], labels[:0], NETWORK), BadValue, "no images"),
        ((images, labels, conditional), BadValue, "unknown labels 8, 9; the network knows 0 to 7"),
        ((images, labels - 7, conditional), BadValue, "unknown labels -7, -6, -5, -4, -3, ...;"),
        ((images, labels[:5], conditional), ShapeMismatch, r"labels are \[5\], but there are 1797"),
    ):
        with pytest.raises(error, match=message):
            next(pretrain(*arguments, SHORT))


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    images, labels = digits()
    with pytest.raises(TrainingDiverged, match=r"not finite at 0\.000 kimg"):
        next(pretrain(images * float("nan"), labels, NETWORK, SHORT))
    snapshots = Snapshots(tmp_path, identity={})
    with pytest.raises(TrainingDiverged) as caught:
        train(NETWORK, replace(TINY, lr=1e30, snapshot_every_kimg=0.001), snapshots=snapshots)
    assert caught.value.last_finite_loss < 10
    assert 0 < caught.value.kimg < 0.4


# --- presets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "img_channels", "resolutions", "channel_mult", "attends", "num_blocks"),
    [
        (8, 1, (8, 4, 2), (1, 2, 2), (), 1),
        (16, 1, (16, 8, 4), (1, 2, 2), (16,), 1),
        (28, 1, (28, 14, 7), (2, 2, 2), (14,), 4),
        (32, 3, (32, 16, 8), (2, 2, 2), (16,), 4),
        (64, 3, (64, 32, 16, 8), (1, 2, 2, 2), (16,), 4),
        (9, 3, (9,), (1,), (9,), 1),
    ],
)
def test_a_preset_fits_its_images(side, img_channels, resolutions, channel_mult, attends, num_blocks):
    images = torch.zeros(2, img_channels, side, side)
    config = preset(images, 10, 32)
    assert config.resolutions == resolutions
    assert (config.channel_mult, config.attn_resolutions, config.num_blocks) == (channel_mult, attends, num_blocks)
    assert (config.img_channels, config.label_dim, config.model_channels) == (img_channels, 10, 32)
    with torch.device("meta"):
        network = build(config)
        assert network(torch.empty(2, img_channels, side, side), torch.ones(2)).shape == images.shape


def test_presets_of_128_channels_are_edms_networks():
    """Figures of arXiv 2206.00364: 55.7M parameters on CIFAR-10, 61.8M on FFHQ 64, both without labels."""

    def millions(side):
        config = preset(torch.zeros(1, 3, side, side), 0, 128)
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build(config).parameters()) / 1e6

    assert millions(32) == pytest.approx(55.7, abs=0.1)
    assert millions(64) == pytest.approx(61.8, abs=0.1)


def test_a_preset_of_impossible_images_or_channels_is_refused():
    with pytest.raises(ShapeMismatch, match=r"\[2, 3, 8, 16\]"):
        preset(torch.zeros(2, 3, 8, 16), 0, 32)
    with pytest.raises(BadValue, match="model_channels is 2"):
        preset(torch.zeros(2, 3, 8, 8), 0, 2)
