"""Real images in the order that a training seed draws them, as fast as a device takes them."""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

from bdense_core import data, seeds
from bdense_core.errors import BadValue, ShapeMismatch
from bdense_core.networks import NetworkConfig
from bdense_core.task import Task

_RESIDENT_BYTES = 4e9
"""A data set of at most so many bytes lives on the device whole: a batch is then one gather, and nothing is copied."""


def check_fit(images: Tensor, labels: Tensor, config: NetworkConfig, *, name: str) -> None:
    """Whether a network is for such images [N, C, H, W] and classes [N].

    Args:
        name: of the data set, for people.

    Raises:
        ShapeMismatch: images of another size.
        BadValue: labels that the network does not know.
    """
    wanted = [config.img_channels, config.img_resolution, config.img_resolution]
    if list(images.shape[1:]) != wanted:
        raise ShapeMismatch(
            f"images of {name} are {list(images.shape[1:])}, but the network is for {wanted}; "
            "name the data set that the teacher was trained on"
        )
    if config.label_dim and not 0 <= int(labels.min()) <= int(labels.max()) < config.label_dim:
        raise BadValue(
            f"{name} has labels {int(labels.min())} to {int(labels.max())}, but the network knows 0 to "
            f"{config.label_dim - 1}; name the data set that the teacher was trained on"
        )


def placed(images: Tensor, device: torch.device) -> Tensor:
    """Bytes of images on the device, if they are few enough to stay there."""
    return images.to(device) if images.numel() <= _RESIDENT_BYTES else images


class Images:
    """The images of a task's data set, drawn with replacement: row r of a training seed is the same in any batches.

    Args:
        config: of the teacher, which the images must fit.
        flip: mirror each drawn image with a chance of one half.

    Raises:
        BadValue: no data set, or labels that the teacher does not know.
        ShapeMismatch: images of another size than the teacher's.
        EvaluationError: damaged files.
    """

    def __init__(self, task: Task, config: NetworkConfig, device: torch.device, *, flip: bool = False) -> None:
        if task.dataset is None:
            raise BadValue("this method trains on images and the study names none; set dataset")
        images, labels = data.load_bytes(task.dataset)
        check_fit(images, labels, config, name=task.dataset)
        self._seed, self._flip, self._device = task.seed, flip, device
        self._num_classes = config.label_dim
        self._images, self._labels = placed(images, device), labels

    def __len__(self) -> int:
        return len(self._images)

    @property
    def digest(self) -> str:
        """The sha256 of images and labels: what whatever is made of them depends on."""
        content = hashlib.sha256(self._images.cpu().numpy().tobytes())
        content.update(self._labels.numpy().tobytes())
        return content.hexdigest()

    def rows(self, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Rows [first, end) of the training seed: images [B, C, H, W] in [-1, 1] and one-hot classes [B, L], if any.

        Both are on the device.
        """
        chosen = seeds.index_rows(self._seed, "images", first, end, len(self._images))
        taken = self._images[chosen.to(self._images.device)].to(self._device)
        images = taken.float() / 127.5 - 1
        if self._flip:
            mirrored = seeds.index_rows(self._seed, "flips", first, end, 2).bool().to(self._device)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if not self._num_classes:
            return images, None
        return images, functional.one_hot(self._labels[chosen], self._num_classes).float().to(self._device)
