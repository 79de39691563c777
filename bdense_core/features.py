"""Feature networks: what a Fréchet distance looks at. They read bytes and give one row an image.

One entry of `FEATURE_NETWORKS` each. The name is part of the distance's: features "digits" make an
`fd-digits`. A file holds the weights and the entry's name and settings, and is known by its sha256.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from bdense_core import seeds
from bdense_core.errors import CheckpointError
from bdense_core.files import HashedFile, canonical_json, sha256_of_file, write_bytes_atomically
from bdense_core.integrity import check_file

_METADATA = "bdense_features"


class DigitsFeatures(nn.Module):
    """A small network for 8x8 grey images: its features tell the class and are enough to rebuild the image.

    Features of a classifier alone overlook strokes that do not change the class, such as blur.

    Args:
        width: number of features.
        num_classes: classes it is trained to tell apart.
    """

    def __init__(self, *, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.settings = {"width": width, "num_classes": num_classes}
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU(),  # 4 x 4
            nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU(),  # 2 x 2
            nn.Flatten(), nn.Linear(256, width), nn.SiLU(),
        )  # fmt: skip
        self.classify = nn.Linear(width, num_classes)
        self.rebuild = nn.Sequential(nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, 64))

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, width] of bytes [B, 1, 8, 8]."""
        features: Tensor = self.body(_unit(images))
        return features


def _unit(images: Tensor) -> Tensor:
    """Bytes as numbers in [-1, 1]."""
    return images.float() / 127.5 - 1


FEATURE_NETWORKS: dict[str, Callable[..., nn.Module]] = {"digits": DigitsFeatures}


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen feature network with its name and the hash of its file.

    `identity` is what statistics are marked with: features of other weights are other features.
    """

    name: str
    sha256: str
    network: nn.Module

    @property
    def identity(self) -> str:
        return f"{self.name}@{self.sha256[:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, d] of bytes [B, C, H, W]."""
        features: Tensor = self.network(images)
        return features


def save_features(network: DigitsFeatures, path: Path, *, name: str) -> HashedFile:
    """Write a feature network. Equal weights give equal bytes.

    Raises:
        CheckpointError: the file cannot be written.
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    # One entry: safetensors keeps no order among several, and the hash must not vary.
    metadata = {_METADATA: canonical_json({"name": name, "settings": network.settings})}
    try:
        write_bytes_atomically(path, save(state, metadata))
    except OSError as error:
        raise CheckpointError(f"cannot write the features {path}: {error.strerror or error}") from error
    return HashedFile(path=str(path), sha256=sha256_of_file(path))


def load_features(file: HashedFile, device: str = "cpu") -> FeatureNetwork:
    """The feature network in a file, frozen. The file is hashed each time, the network kept in memory.

    Raises:
        CheckpointError: the file is missing, altered, or no feature network.
    """
    check_file(file)
    return _load(file.path, file.sha256, device)


@lru_cache(maxsize=4)
def _load(path: str, sha256: str, device: str) -> FeatureNetwork:
    try:
        with safe_open(path, framework="pt") as opened:
            about: dict[str, Any] = json.loads((opened.metadata() or {})[_METADATA])
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        network = FEATURE_NETWORKS[about["name"]](**about["settings"])
        network.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no feature network of this project: {error}") from error
    network.eval().requires_grad_(False)
    return FeatureNetwork(name=about["name"], sha256=sha256, network=network.to(device))


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
        images: bytes, [N, 1, 8, 8].
        labels: classes, [N].
    """
    order = torch.randperm(len(images), generator=seeds.generator(settings.seed, "features", "split"))
    num_held_out = round(settings.held_out * len(images))
    held_out, training = order[:num_held_out], order[num_held_out:]
    torch.manual_seed(seeds.derive(settings.seed, "features", "weights"))
    network = DigitsFeatures(width=width, num_classes=int(labels.max()) + 1)
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
    return functional.mse_loss(network.rebuild(features), _unit(images).flatten(1))
