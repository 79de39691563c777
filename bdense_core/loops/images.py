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
        wanted = [config.img_channels, config.img_resolution, config.img_resolution]
        if list(images.shape[1:]) != wanted:
            raise ShapeMismatch(
                f"images of {task.dataset} are {list(images.shape[1:])}, but the teacher makes {wanted}; name the data "
                "set that the teacher was trained on"
            )
        if config.label_dim and int(labels.max()) >= config.label_dim:
            raise BadValue(
                f"{task.dataset} has labels up to {int(labels.max())}, the teacher knows {config.label_dim} classes; "
                "name the data set that the teacher was trained on"
            )
        self._seed, self._flip, self._device = task.seed, flip, device
        self._num_classes = config.label_dim
        self._images, self._labels = images, labels
        if device.type == "cuda":
            small = self._images.numel() <= _RESIDENT_BYTES
            self._images = self._images.to(device) if small else self._images.pin_memory()

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
        taken = self._images[chosen.to(self._images.device)].to(self._device, non_blocking=True)
        images = taken.float() / 127.5 - 1
        if self._flip:
            mirrored = seeds.index_rows(self._seed, "flips", first, end, 2).bool().to(self._device)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if not self._num_classes:
            return images, None
        return images, functional.one_hot(self._labels[chosen], self._num_classes).float().to(self._device)
