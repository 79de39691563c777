"""Datasets and the preparation of images."""

import pytest
import torch

from bdense_core import data
from bdense_core.errors import BadValue


def test_digits_are_the_1797_scans_of_scikit_learn_in_their_order():
    from sklearn.datasets import load_digits

    images, labels = data.load("digits")
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    raw = load_digits()
    assert torch.equal((images[:, 0] + 1) * 8, torch.from_numpy(raw.images).float())
    assert labels.tolist() == raw.target.tolist()


def test_digits_span_the_range_from_minus_one_to_one():
    images, labels = data.load("digits")
    assert (images.min(), images.max()) == (-1, 1)
    assert sorted(set(labels.tolist())) == list(range(10))


def test_a_misspelt_dataset_is_answered_with_the_nearest():
    with pytest.raises(BadValue, match="did you mean 'digits'"):
        data.load("digit")


def test_bytes_are_those_of_edm():
    """By hand: -1 gives 0.5, 0 gives 128, 1 gives 255.5 clipped to 255; beyond the range they saturate."""
    levels = torch.tensor([-3.0, -1.0, -0.996, 0.0, 0.5, 1.0, 3.0])
    assert data.to_uint8(levels).tolist() == [0, 0, 1, 128, 191, 255, 255]
