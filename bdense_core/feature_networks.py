"""The feature networks themselves: bytes in, one row of features an image out.

Digits are this project's own; the CIFAR ResNet is that of He et al. (arXiv 1512.03385, section 4.2); Inception
is the published TorchScript behind clean-fid. Each is one class with the kind and the images it reads.
"""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdense_core import protocol
from bdense_core.errors import CheckpointError
from bdense_core.files import sha256_of_file
from bdense_core.protocol import INCEPTION


class ByteNetwork(nn.Module):
    """What all feature networks have in common.

    Attributes:
        kind: names the class in files.
        image_shape: [C, H, W] of the images it reads; None where any size will do.
        settings: what its constructor needs to build it again.
    """

    kind: ClassVar[str]
    image_shape: tuple[int, int | None, int | None]
    settings: dict[str, Any]


class DigitsFeatures(ByteNetwork):
    """A small network for small grey images: its features tell the class and are enough to rebuild the image.

    Features of a classifier alone overlook strokes that do not change the class, such as blur.

    Args:
        width: number of features.
        num_classes: classes it is trained to tell apart.
        side: of the images, a multiple of 4.
    """

    kind = "digits"

    def __init__(self, *, width: int = 64, num_classes: int = 10, side: int = 8) -> None:
        super().__init__()
        self.image_shape = (1, side, side)
        # Files of the 8x8 network do not say its side: they were made before there was another.
        self.settings = {"width": width, "num_classes": num_classes} | ({} if side == 8 else {"side": side})
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU(),  # half the side
            nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU(),  # a quarter
            nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, width), nn.SiLU(),
        )  # fmt: skip
        self.classify = nn.Linear(width, num_classes)
        self.rebuild = nn.Sequential(nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, side**2))

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, width] of bytes [B, 1, side, side]."""
        features: Tensor = self.body(unit(images))
        return features


def unit(images: Tensor) -> Tensor:
    """Bytes as numbers in [-1, 1]."""
    return images.float() / 127.5 - 1


# --- CIFAR ResNet ---------------------------------------------------------------------------------------


class CifarResNet(ByteNetwork):
    """The ResNet of depth 6 n + 2 that He et al. use for CIFAR-10; its features are those before the classifier.

    The names of its tensors are those of the files it is imported from. It is only ever read, not trained.

    Args:
        depth: 20, 32, 44 or 56 in the paper; any 6 n + 2 will do.
        num_classes: outputs of `classify`.
    """

    kind = "cifar-resnet"
    image_shape = (3, 32, 32)
    width = 64

    def __init__(self, *, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}; a CIFAR ResNet has depth 6 n + 2")
        self.settings = {"depth": depth, "num_classes": num_classes}
        num_blocks = (depth - 2) // 6
        self.conv1 = _convolution(3, 16)
        self.bn1 = FrozenNorm(16)
        self.layer1 = _stage(16, 16, num_blocks)  # 32 x 32
        self.layer2 = _stage(16, 32, num_blocks)  # 16 x 16
        self.layer3 = _stage(32, self.width, num_blocks)  # 8 x 8
        self.linear = nn.Linear(self.width, num_classes)
        # The mean and spread of ImageNet's colours, with which the published weights were trained.
        self.register_buffer("_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 64] of bytes [B, 3, 32, 32]."""
        x = (images.float() / 255 - self.get_buffer("_mean")) / self.get_buffer("_std")
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 64, 8, 8]
        features: Tensor = x.mean(dim=(2, 3))
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, num_classes] of features [B, 64]."""
        logits: Tensor = self.linear(features)
        return logits


class FrozenNorm(nn.Module):
    """Batch normalisation by stored statistics, and nothing else: it counts no batches and cannot be trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x, [B, C, H, W]."""
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return functional.batch_norm(x, mean, variance, self.weight, self.bias, training=False)


class _Block(nn.Module):
    """Two convolutions beside a shortcut without weights (option A of He et al.)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, channels - channels_in
        self.conv1 = _convolution(channels_in, channels, stride)
        self.bn1 = FrozenNorm(channels)
        self.conv2 = _convolution(channels, channels)
        self.bn2 = FrozenNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.added:
            half = self.added // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return functional.relu(x + y)


def _stage(channels_in: int, channels: int, num_blocks: int) -> nn.Sequential:
    """Blocks of one width; where the width grows, the first halves the image."""
    first = _Block(channels_in, channels, stride=1 if channels == channels_in else 2)
    return nn.Sequential(first, *(_Block(channels, channels, stride=1) for _ in range(num_blocks - 1)))


def _convolution(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)


# --- Inception ------------------------------------------------------------------------------------------


class Inception(ByteNetwork):
    """Inception-v3 as TensorFlow has it, with its own resizing to 299x299: clean-fid's `legacy_tensorflow`.

    The file is TorchScript, which is code: the caller has checked its hash (`features.load_features`).

    Args:
        path: the published file, under any name.

    Raises:
        CheckpointError: it cannot be loaded.
    """

    kind = INCEPTION
    image_shape = (3, None, None)
    at_once = 250
    """Images resized at a time: a thousand of 299x299 need some 10 GB for two layers."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.settings = {}
        self.network = _torchscript(path)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 2048] of bytes [B, 3, H, W]."""
        return torch.cat([self.network(part.float()) for part in torch.split(images, self.at_once)])


def _torchscript(path: Path) -> nn.Module:
    """The file behind clean-fid's interface, with its resizing."""
    # Not cleanfid.features: it imports torchvision, whose build for another torch fails at import.
    from cleanfid.inception_torchscript import InceptionV3W

    with tempfile.TemporaryDirectory(prefix="bdense-") as folder, warnings.catch_warnings():
        # torch 2.13 says of each use of TorchScript that it will be gone one day.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        # clean-fid looks for this name in a folder. A copy, so that what runs is what was hashed.
        copy = Path(folder) / "inception-2015-12-05.pt"
        try:
            shutil.copyfile(path, copy)
            if sha256_of_file(copy) != protocol.INCEPTION_SHA256:
                raise CheckpointError(f"{path} has changed while it was read; fetch it again")
            network: nn.Module = InceptionV3W(folder, download=False, resize_inside=True)
        except (AttributeError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be loaded as Inception: {error}; fetch it again") from error
    return network
