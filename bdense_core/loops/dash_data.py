"""The data set of a run of DASH: what is trained on, in which order, and what is held out."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from bdense_core import data, seeds
from bdense_core.errors import BadValue, ShapeMismatch
from bdense_core.loops.dash import Batch
from bdense_core.loops.images import check_fit, placed
from bdense_core.network_config import NetworkConfig

_PAIRS = 256
"""Pairs that are drawn together."""


class Examples:
    """Images and their classes for one kind of network.

    Which images are held out depends on their number alone: a student and its teacher hold out the same ones.

    Args:
        images: [N, C, H, W], bytes or in [-1, 1].
        labels: classes, whole numbers, [N].
        held_out: the share that is not trained on.
        device: where the batches go.

    Raises:
        ShapeMismatch: images of another size than the network's, or another number of labels.
        BadValue: a network without classes, labels it does not know, or too few images.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, config: NetworkConfig, *, held_out: float, device: torch.device
    ) -> None:
        _check(images, labels, config)
        self._labels, self._label_dim, self._device = labels, config.label_dim, device
        self._images = placed(images if images.dtype == torch.uint8 else data.to_uint8(images), device)
        shuffled = torch.randperm(len(images), generator=seeds.generator(0, "held out"))
        num_held = round(len(images) * held_out)
        self._held, self._trained = shuffled[:num_held].sort().values, shuffled[num_held:].sort().values
        if not len(self._trained):
            raise BadValue(f"of {len(images)} images method.held_out {held_out} leaves none to train on; lower it")

    def epoch(self, num_images: int) -> int:
        """Which pass through the trained images begins, or goes on, after so many images."""
        return num_images // len(self._trained)

    def batch(self, seed: int, iteration: int, *, size: int, num_times: int) -> Batch:
        """The batch of an iteration: each epoch goes through all trained images in an order of its own."""
        first = iteration * size
        places = [divmod(place, len(self._trained)) for place in range(first, first + size)]
        order = torch.stack([_order(seed, epoch, len(self._trained))[place] for epoch, place in places])
        source = seeds.generator(seed, "dash", iteration)
        return self._drawn(self._trained[order], num_times, source)

    def pairs(self, seed: int, count: int, *, num_times: int) -> list[Batch]:
        """Noisy images to measure on, `count` in all: held-out ones, at random timesteps; of all images if none is."""
        pool = self._held if len(self._held) else self._trained
        batches = []
        for first in range(0, count, _PAIRS):
            source = seeds.generator(seed, "guidance gap", first)
            rows = pool[torch.randint(len(pool), (_PAIRS,), generator=source)]
            batches.append(self._drawn(rows, num_times, source)[: count - first])
        return batches

    def _drawn(self, rows: Tensor, num_times: int, source: torch.Generator) -> Batch:
        """Drawn on the CPU, so that they are the same on any device."""
        clean = self._images[rows.to(self._images.device)].to(self._device).float() / 127.5 - 1
        t = torch.randint(num_times, (len(rows),), generator=source)
        noise = torch.randn(clean.shape, generator=source)
        labels = functional.one_hot(self._labels[rows], self._label_dim).float()
        return Batch(clean, *(part.to(self._device) for part in (noise, t, labels)))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    """In which an epoch goes through so many images. Kept here: kept by `Examples`, it would keep them alive."""
    return torch.randperm(count, generator=seeds.generator(seed, "epoch", epoch))


def _check(images: Tensor, labels: Tensor, config: NetworkConfig) -> None:
    if labels.shape != (len(images),):
        raise ShapeMismatch(f"the labels are {list(labels.shape)}, but there are {len(images)} images; give one each")
    if not config.label_dim:
        raise BadValue("the network knows no classes, and DASH is about guidance by class; take a conditional one")
    check_fit(images, labels, config, name="the data set")
