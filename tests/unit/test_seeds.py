"""Random numbers that are known by seed, use and row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bdense_core import seeds


@given(st.integers(0, 700), st.integers(1, 300))
def test_a_row_does_not_depend_on_the_batch_it_is_made_in(first: int, length: int) -> None:
    whole = seeds.noise_rows(3, "x", 0, 1000, (2, 2))
    assert torch.equal(seeds.noise_rows(3, "x", first, first + length, (2, 2)), whole[first : first + length])
    labels = seeds.label_rows(3, "x", 0, 1000, 10)
    part = seeds.label_rows(3, "x", first, first + length, 10)
    assert labels is not None and part is not None
    assert torch.equal(part, labels[first : first + length])


def test_seeds_and_uses_give_other_numbers() -> None:
    rows = {
        (seed, use): seeds.noise_rows(seed, use, 0, 512, (1,)).tolist()
        for seed in (0, 1)
        for use in ("latents", "evaluation")
    }
    assert len({str(numbers) for numbers in rows.values()}) == 4
    assert rows[0, "latents"][:256] != rows[0, "latents"][256:], "two blocks repeat each other"


def test_labels_are_one_hot_and_absent_without_classes() -> None:
    labels = seeds.label_rows(0, "x", 10, 600, 7)
    assert labels is not None
    assert labels.shape == (590, 7)
    assert labels.sum(1).eq(1).all()
    assert seeds.label_rows(0, "x", 0, 5, 0) is None


def test_the_numbers_of_a_seed_never_change() -> None:
    """Stored results name their seed: another derivation would silently make them another run."""
    assert seeds.derive(7, "latents", 3) == 4458971897073577958  # sha256("7/latents/3"), first 8 bytes, halved
    assert seeds.derive(0) != seeds.derive(1)
