"""Training of a teacher: the loss of EDM, and that a seed fixes the result."""

from dataclasses import replace

import pytest
import torch

from bdense_core import data, seeds
from bdense_core.errors import TrainingDiverged
from bdense_core.networks import Denoiser, NetworkConfig
from bdense_core.pretraining import Pretraining, denoising_loss, loss_weight, pretrain

NETWORK = NetworkConfig.ddpmpp(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0
)
SHORT = Pretraining(budget_kimg=1.5, batch=32, warmup_kimg=0.1, ema_halflife_kimg=0.1)


def test_the_loss_weight_is_edms():
    """By hand, sigma_data 0.5: (0.25 + 0.25) / (0.25)^2 = 8 and (4 + 0.25) / 1^2 = 4.25."""
    assert loss_weight(torch.tensor([0.5, 2.0]), 0.5).tolist() == pytest.approx([8, 4.25])


def test_training_lowers_the_loss_and_depends_on_its_seed_alone():
    images, labels = data.load("digits")
    noise = torch.randn((256, 1, 8, 8), generator=seeds.generator(1))
    sigma = torch.linspace(0.1, 2, 256)

    def loss(network: Denoiser) -> float:
        with torch.no_grad():
            return float(denoising_loss(network, images[:256], noise, sigma))

    trained = pretrain(images, labels, NETWORK, SHORT)
    torch.rand(5)
    again = pretrain(images, labels, NETWORK, SHORT)
    other = pretrain(images, labels, NETWORK, replace(SHORT, seed=1))
    barely = pretrain(images, labels, NETWORK, replace(SHORT, budget_kimg=0.03))
    assert loss(trained) < 0.7 * loss(barely)
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), again.parameters(), strict=True))
    assert loss(other) != loss(trained)
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_a_loss_that_is_not_finite_ends_the_training():
    images, labels = data.load("digits")
    with pytest.raises(TrainingDiverged, match=r"not finite at 0\.000 kimg"):
        pretrain(images * float("nan"), labels, NETWORK, SHORT)
