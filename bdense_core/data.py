"""Datasets: images and labels in a fixed order, by name."""

import difflib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bdense_core.errors import BadValue


def digits() -> tuple[Tensor, Tensor]:
    """The 8x8 digits of scikit-learn, real scans that come inside its wheel.

    Returns:
        images [1797, 1, 8, 8], float32 in [-1, 1], and labels [1797], int64.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1) / 8 - 1  # levels are 0 to 16
    return images, torch.from_numpy(data.target.astype(np.int64))


DATASETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": digits}


def load(name: str) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] in [-1, 1] and labels [N] of a dataset.

    Raises:
        BadValue: no such dataset; the message names the nearest.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(DATASETS)}"
        raise BadValue(f"dataset is {name!r}; {hint}")
    return DATASETS[name]()


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, rounded and clipped as EDM does before its FID: `protocol.UINT8` in words."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
