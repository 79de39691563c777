"""Training of a teacher from data: the denoising loss of EDM, arXiv 2206.00364, section 5 and table 1."""

import copy
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bdense_core import seeds
from bdense_core.branches import freeze
from bdense_core.errors import TrainingDiverged
from bdense_core.networks import Denoiser, NetworkConfig, build

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining:
    """Settings of a teacher's training; noise levels are EDM's, the rest is sized for small data."""

    seed: int = 0
    budget_kimg: float = 500.0
    batch: int = 128
    lr: float = 2e-3
    warmup_kimg: float = 10.0
    ema_halflife_kimg: float = 20.0
    p_mean: float = -1.2
    p_std: float = 1.2


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, table 1."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoising_loss(
    network: Denoiser, images: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Weighted squared error of the denoised image, mean over pixels and batch: eq. 8 with table 1.

    Args:
        images: clean, [B, C, H, W].
        noise: standard normal, of the same shape.
        sigma: noise levels, [B].
    """
    denoised = network(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
    error = (denoised - images).square().mean(dim=(1, 2, 3))
    loss: Tensor = (loss_weight(sigma, network.config.sigma_data) * error).mean()
    return loss


def pretrain(
    images: Tensor, labels: Tensor, config: NetworkConfig, settings: Pretraining, device: str = "cpu"
) -> Denoiser:
    """A teacher trained on `images`: the moving average of the weights, frozen.

    Args:
        images: [N, C, H, W] in [-1, 1].
        labels: classes, [N]; unused by an unconditional network.

    Raises:
        TrainingDiverged: a loss that is not finite.
    """
    torch.manual_seed(seeds.derive(settings.seed, "teacher", "weights"))  # dropout too continues from here
    network = build(config).to(device).train()
    average = freeze(copy.deepcopy(network))
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)
    draws = seeds.generator(settings.seed, "teacher", "draws")
    last: float | None = None
    num_iterations = -(-round(settings.budget_kimg * 1000) // settings.batch)
    for iteration in range(num_iterations):
        seen_kimg = iteration * settings.batch / 1000
        rows = torch.randint(len(images), (settings.batch,), generator=draws)
        clean = images[rows].to(device)
        noise = torch.randn(clean.shape, generator=draws).to(device)
        sigma = (torch.randn(settings.batch, generator=draws) * settings.p_std + settings.p_mean).exp().to(device)
        classes = functional.one_hot(labels[rows], config.label_dim).float().to(device) if config.label_dim else None
        loss = denoising_loss(network, clean, noise, sigma, classes)
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (seen_kimg + 1e-3) / settings.warmup_kimg)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        # As EDM's: early on the half-life is a twentieth of what was seen, so that the start is forgotten.
        halflife = min(settings.ema_halflife_kimg, seen_kimg / 20)
        _follow(average, network, 0.5 ** (settings.batch / 1000 / max(halflife, 1e-8)))
        if iteration % 100 == 0 or iteration == num_iterations - 1:
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingDiverged(kimg=seen_kimg, interval=0, last_finite_loss=last)
            last = value
            log.info("teacher kimg %.1f of %g loss %.4f", seen_kimg, settings.budget_kimg, value)
    return average


@torch.no_grad()
def _follow(average: Denoiser, network: Denoiser, keep: float) -> None:
    """average = keep * average + (1 - keep) * network; buffers never change here."""
    for ours, theirs in zip(average.parameters(), network.parameters(), strict=True):
        ours.lerp_(theirs, 1 - keep)
