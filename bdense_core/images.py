"""Image files: one image decoded, a grid or single images written. Pixels are bytes, [C, H, W].

PNG, JPEG and WebP are read, grey or RGB; PNG is written.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bdense_core.errors import BadValue, EvaluationError, ShapeMismatch
from bdense_core.files import write_bytes_atomically

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Names by which image files are known, in small letters."""

READABLE = 32
"""Pixels of a side that people can make something out on."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_AS_THEY_ARE = ("L", "RGB")
_CONVERTED = {"1": "L", "P": "RGB"}
"""Black and white, and palettes: the same colours stored otherwise. Converting others, such as alpha, loses some."""


def read_image(content: bytes, name: str) -> Tensor:
    """The image in a PNG, JPEG or WebP file, uint8 [C, H, W], C being 1 or 3.

    Args:
        content: the file's bytes.
        name: what to call it in messages.

    Raises:
        EvaluationError: damaged, of another format, or neither grey nor RGB.
    """
    try:
        # Only these decoders look at the file, whatever its name says.
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            opaque = "transparency" not in opened.info
            mode = _CONVERTED.get(opened.mode, opened.mode) if opaque else f"{opened.mode} with transparency"
            pixels = np.array(opened.convert(mode) if mode in _AS_THEY_ARE else opened)
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as cause:
        raise EvaluationError(
            f"image {name} is damaged or no PNG, JPEG or WebP ({type(cause).__name__}); replace it"
        ) from cause
    if mode not in _AS_THEY_ARE:
        raise EvaluationError(f"image {name} is {mode}; convert it to 8-bit grey or RGB without transparency")
    image = torch.from_numpy(pixels)
    return image.unsqueeze(0) if mode == "L" else image.permute(2, 0, 1)


def write_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write `grid_png` to a file, whole or not at all.

    Raises:
        EvaluationError: the file cannot be written; else as `grid_png`.
    """
    _write(grid_png(images, columns), path)


def grid_png(images: Tensor, columns: int) -> bytes:
    """One PNG of images side by side, row by row. Cells left over are black.

    Args:
        images: bytes, [N, C, H, W], C being 1 or 3.

    Raises:
        BadValue: fewer than one column.
        ShapeMismatch: not such images, or none.
    """
    if columns < 1:
        raise BadValue(f"columns is {columns}; a grid has 1 or more")
    _require_bytes(images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    _, channels, height, width = images.shape
    cells = images.new_zeros(rows * columns, channels, height, width)
    cells[: len(images)] = images
    grid = cells.view(rows, columns, *cells.shape[1:]).permute(2, 0, 3, 1, 4)  # [C, rows, H, columns, W]
    return _png(grid.reshape(channels, rows * height, columns * width))


def readable(images: Tensor) -> Tensor:
    """Images [..., H, W] of at least 32 pixels a side, for people: smaller ones with each pixel repeated."""
    scale = max(1, -(-READABLE // images.shape[-1]))
    return images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def write_pngs(images: Tensor, folder: Path, first: int) -> list[Path]:
    """Write each image to `folder/NNNNNN.png`, numbered from `first`, and return the files' paths.

    Each is there whole or not at all, so an interrupted run can go on where it stopped.

    Args:
        images: bytes, [N, C, H, W], C being 1 or 3.

    Raises:
        BadValue: `first` is negative.
        ShapeMismatch: not such images, or none.
        EvaluationError: a file cannot be written.
    """
    if first < 0:
        raise BadValue(f"first is {first}; images are numbered from 0")
    _require_bytes(images)
    paths = [folder / f"{first + offset:06d}.png" for offset in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        _write(_png(image), path)
    return paths


def _require_bytes(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ShapeMismatch(
            f"images are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}; "
            "give uint8 [N, 1 or 3, H, W] with at least one image"
        )


def _png(image: Tensor) -> bytes:
    pixels = image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0)
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy())).save(content, format="PNG")
    return content.getvalue()


def _write(content: bytes, path: Path) -> None:
    try:
        write_bytes_atomically(path, content)
    except OSError as error:
        raise EvaluationError(f"cannot write the image {path}: {error.strerror or error}") from error
