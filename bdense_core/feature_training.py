"""Training of the digits' feature network."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bdense_core import seeds
from bdense_core.feature_networks import DigitsFeatures, unit


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTraining:
    """How a feature network is trained: AdamW in one cycle, cross-entropy plus squared error of the image."""

    seed: int = 0
    num_epochs: int = 25
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.01
    rebuild_weight: float = 4.0
    """Factor of the squared error, mean over pixels in [-1, 1]."""
    held_out: float = 0.2
    """Share of the images, drawn by the seed, that only measure the result."""


@dataclass(frozen=True)
class FeatureFigures:
    """What a feature network does on images it was not trained on."""

    accuracy: float
    rebuild_mse: float


def train_features(
    images: Tensor, labels: Tensor, settings: FeatureTraining, *, width: int = 64
) -> tuple[DigitsFeatures, FeatureFigures]:
    """A trained feature network and its figures on the images held out.

    Args:
        images: bytes, [N, 1, S, S], S a multiple of 4.
        labels: classes, [N].
    """
    order = torch.randperm(len(images), generator=seeds.generator(settings.seed, "features", "split"))
    num_held_out = round(settings.held_out * len(images))
    held_out, training = order[:num_held_out], order[num_held_out:]
    torch.manual_seed(seeds.derive(settings.seed, "features", "weights"))
    network = DigitsFeatures(width=width, num_classes=int(labels.max()) + 1, side=images.shape[-1])
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    steps_per_epoch = -(-len(training) // settings.batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.num_epochs * steps_per_epoch)
    shuffle = seeds.generator(settings.seed, "features", "order")
    for _ in range(settings.num_epochs):
        shuffled = training[torch.randperm(len(training), generator=shuffle)]
        for first in range(0, len(shuffled), settings.batch):
            rows = shuffled[first : first + settings.batch]
            optimizer.zero_grad(set_to_none=True)
            features = network(images[rows])
            loss = functional.cross_entropy(network.classify(features), labels[rows])
            loss = loss + settings.rebuild_weight * _rebuild_error(network, features, images[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cycle.step()
    network.eval()
    with torch.no_grad():
        features = network(images[held_out])
        accuracy = (network.classify(features).argmax(1) == labels[held_out]).float().mean()
        error = _rebuild_error(network, features, images[held_out])
    return network, FeatureFigures(accuracy=float(accuracy), rebuild_mse=float(error))


def _rebuild_error(network: DigitsFeatures, features: Tensor, images: Tensor) -> Tensor:
    return functional.mse_loss(network.rebuild(features), unit(images).flatten(1))
