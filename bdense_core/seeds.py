"""Every random choice derives from a stored seed and the name of its use.

Two runs with one seed share noise, data order and targets whatever else differs between them: the pairing
that makes small differences visible.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BLOCK = 256
"""Rows that one generator makes: any row can be had without all the rows before it."""


def derive(seed: int, *use: str | int) -> int:
    """A 63-bit seed for one use of `seed`, for example `derive(7, "latents", 3)`."""
    text = "/".join(str(part) for part in (seed, *use))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *use: str | int) -> torch.Generator:
    """A CPU generator for one use of `seed`: the same numbers whatever device the run is on."""
    return torch.Generator().manual_seed(derive(seed, *use))


def noise_rows(seed: int, use: str, first: int, end: int, shape: Sequence[int]) -> Tensor:
    """Standard normal rows [first, end) of one use of a seed, [end - first, *shape]; the same in any batches."""
    return _rows(seed, use, first, end, lambda source: torch.randn((_BLOCK, *shape), generator=source))


def label_rows(seed: int, use: str, first: int, end: int, num_classes: int) -> Tensor | None:
    """Uniform one-hot classes of rows [first, end), [end - first, num_classes]; None where there are no classes."""
    if num_classes == 0:
        return None
    classes = index_rows(seed, use, first, end, num_classes)
    return torch.nn.functional.one_hot(classes, num_classes).float()


def index_rows(seed: int, use: str, first: int, end: int, count: int) -> Tensor:
    """Uniform whole numbers below `count` for rows [first, end) of one use of a seed, int64 [end - first]."""
    return _rows(seed, use, first, end, lambda source: torch.randint(count, (_BLOCK,), generator=source))


def evaluation_rows(
    seed: int, first: int, end: int, shape: Sequence[int], num_classes: int
) -> tuple[Tensor, Tensor | None]:
    """What images [first, end) of an evaluation seed are made from: noise, and classes if there are any."""
    return (
        noise_rows(seed, "evaluation", first, end, shape),
        label_rows(seed, "evaluation labels", first, end, num_classes),
    )


def _rows(seed: int, use: str, first: int, end: int, make: Callable[[torch.Generator], Tensor]) -> Tensor:
    blocks = range(first // _BLOCK, (end - 1) // _BLOCK + 1)
    rows = torch.cat([make(generator(seed, use, block)) for block in blocks])
    offset = blocks.start * _BLOCK
    return rows[first - offset : end - offset]
