"""Datasets: images and labels in a fixed order, by name or from files.

Files are read as data only: no pickle is ever loaded, and a zip is never unpacked.

    digits                        scikit-learn's, which come with this package
    digits16                      the same, enlarged to 16x16
    FILE.npz                      uint8 `images`, and `labels` if it has any
    FOLDER or FILE.zip            PNG, JPEG or WebP; classes by folder, or by EDM's `dataset.json`
    FOLDER of data_batch_1.bin... CIFAR-10's binary version
    FOLDER of train.bin           CIFAR-100's, with its fine labels
"""

import difflib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bdense_core.errors import BadValue, EvaluationError
from bdense_core.images import SUFFIXES, read_image

_LABELS_FILE = "dataset.json"
_UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for files that are missing, damaged, encrypted, pickled, or of another kind."""


def load(name_or_path: str) -> tuple[Tensor, Tensor]:
    """Images, float32 [N, C, H, W] in [-1, 1], and labels, int64 [N], of a dataset.

    Bytes b become b / 127.5 - 1, which `to_uint8` turns back exactly. Without labels all are 0.

    Args:
        name_or_path: a name of `DATASETS`, or an npz file, folder or zip (see above). A name comes first.

    Raises:
        BadValue: no such dataset (the message names the nearest), or nothing of a known kind.
        EvaluationError: damaged images, images of several sizes, or labels that do not fit them.
    """
    if name_or_path in DATASETS:
        return DATASETS[name_or_path]()
    images, labels = load_bytes(name_or_path)
    return images.float().div_(127.5).sub_(1), labels  # in place: the floats may fill most of the memory


def load_bytes(name_or_path: str) -> tuple[Tensor, Tensor]:
    """`load` with images as bytes, uint8 [N, C, H, W], in a quarter of the memory; those of files are as stored.

    Raises:
        BadValue: as `load`.
        EvaluationError: as `load`.
    """
    if name_or_path in DATASETS:
        images, labels = DATASETS[name_or_path]()
        return to_uint8(images), labels
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        binary = next((version for version in _BINARY_VERSIONS if (path / version.files[0]).exists()), None)
        return _image_files(path) if binary is None else _cifar_binary(path, binary)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _npz(path)
    if path.suffix.lower() == ".zip" and path.is_file():
        return _image_files(path)
    raise BadValue(_unknown(name_or_path, path))


def _unknown(name: str, path: Path) -> str:
    if path.exists():
        return f"dataset {name!r} is a file of an unknown kind; give a folder, a .zip or a .npz"
    if os.sep in name or path.suffix in (".npz", ".zip"):
        return f"dataset {name!r} does not exist; correct the path"
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(DATASETS)}, or give a path"
    return f"dataset is {name!r}; {hint}"


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, rounded and clipped as EDM does before its FID: `protocol.UINT8` in words."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def digits() -> tuple[Tensor, Tensor]:
    """The 8x8 digits of scikit-learn, real scans that come inside its wheel.

    Returns:
        images [1797, 1, 8, 8], float32 in [-1, 1], and labels [1797], int64.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1) / 8 - 1  # levels are 0 to 16
    return images, torch.from_numpy(data.target.astype(np.int64))


def digits16() -> tuple[Tensor, Tensor]:
    """The digits enlarged to 16x16, in the same order: a data set of other size with the same ten classes.

    Pillow's bicubic filter (Catmull-Rom) on their bytes: integer arithmetic, so every machine gets the same images.

    Returns:
        images [1797, 1, 16, 16], float32 in [-1, 1], each one byte's level, and labels [1797], int64.
    """
    images, labels = digits()
    scans = (Image.fromarray(scan) for scan in to_uint8(images).squeeze(1).numpy())
    enlarged = np.stack([np.asarray(scan.resize((16, 16), Image.Resampling.BICUBIC)) for scan in scans])
    return torch.from_numpy(enlarged).unsqueeze(1).float() / 127.5 - 1, labels


DATASETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": digits, "digits16": digits16}


# --- arrays ---------------------------------------------------------------------------------------------


def _npz(path: Path) -> tuple[Tensor, Tensor]:
    """Bytes and labels of an npz file.

    The last axis holds the channels if it is 1 or 3 long, otherwise the second does: an image one or three pixels
    wide is the only one for which that is wrong.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays.get("labels")
    except _UNREADABLE as cause:
        raise EvaluationError(f"{path} cannot be read as an npz file with 'images' ({cause}); replace it") from cause
    if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0 or not {*images.shape[1::2]} & {1, 3}:
        raise EvaluationError(
            f"'images' of {path} is {images.dtype} {list(images.shape)}; "
            "give uint8 [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
        )
    pixels = torch.from_numpy(images)
    if images.shape[3] in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels, _labels(labels, len(images), str(path))


def _labels(labels: np.ndarray | None, count: int, where: str) -> Tensor:
    """Labels as int64 [count]; zeros where there are none.

    Raises:
        EvaluationError: not one whole number from 0 for each image.
    """
    if labels is None:
        return torch.zeros(count, dtype=torch.int64)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise EvaluationError(
            f"labels of {where} are {labels.dtype} {list(labels.shape)} for {count} images; "
            "give one whole number for each image"
        )
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise EvaluationError(f"labels of {where} go from {labels.min()} to {labels.max()}; number the classes from 0")
    return torch.from_numpy(labels.astype(np.int64))


# --- CIFAR's binary versions (https://www.cs.toronto.edu/~kriz/cifar.html) --------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _BinaryVersion:
    """Training images as records: one byte for each kind of label, then the red, the green and the blue plane.

    Attributes:
        files: the records, in this order; the first one tells the version.
        classes: how many of each kind there are. The last kind is used.
    """

    name: str
    files: tuple[str, ...]
    classes: tuple[int, ...]


_BINARY_VERSIONS = (
    _BinaryVersion(name="CIFAR-10", files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)), classes=(10,)),
    _BinaryVersion(name="CIFAR-100", files=("train.bin",), classes=(20, 100)),  # coarse and fine
)
_PLANES = (3, 32, 32)


def _cifar_binary(folder: Path, version: _BinaryVersion) -> tuple[Tensor, Tensor]:
    """Bytes and labels of the training images."""
    kinds = len(version.classes)
    records = np.concatenate([_records(folder / name, kinds, version.name) for name in version.files])
    largest = records[:, :kinds].max(0)
    if (largest >= version.classes).any():
        raise EvaluationError(
            f"{folder} has labels up to {largest.tolist()}, but {version.name} has {list(version.classes)} classes; "
            f"unpack {version.name} again"
        )
    images = torch.from_numpy(records[:, kinds:].copy()).view(-1, *_PLANES)
    return images, _labels(records[:, kinds - 1], len(records), str(folder))


def _records(file: Path, kinds: int, version: str) -> np.ndarray:
    size = kinds + math.prod(_PLANES)
    try:
        content = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    except OSError as cause:
        raise EvaluationError(f"{file} cannot be read ({cause}); unpack {version} again") from cause
    if content.size == 0 or content.size % size:
        raise EvaluationError(
            f"{file} has {content.size} bytes, which are no records of {size}; unpack {version} again"
        )
    return content.reshape(-1, size)


# --- image files ----------------------------------------------------------------------------------------

_Read = Callable[[str], bytes]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], _Read]]:
    """The names in a folder or zip, and how to read one."""
    if path.is_dir():
        yield list(_files_below(path)), lambda name: (path / name).read_bytes()
        return
    try:
        opened = zipfile.ZipFile(path)
    except _UNREADABLE as cause:
        raise EvaluationError(f"{path} cannot be read as a zip file ({cause}); replace it") from cause
    with opened:
        yield [info.filename for info in opened.infolist() if not info.is_dir()], opened.read


def _files_below(folder: Path) -> Iterator[str]:
    """The files in a folder and all below it, relative to it, with slashes."""
    for parent, _, names in os.walk(folder):
        shelf = Path(parent).relative_to(folder)
        yield from ((shelf / name).as_posix() for name in names)


def _image_files(path: Path) -> tuple[Tensor, Tensor]:
    """Bytes and labels of the image files in a folder or zip, in the order of their names."""
    with _opened(path) as (names, read):
        files = sorted(name for name in names if name.lower().endswith(SUFFIXES) and not _hidden(name))
        if not files:
            raise BadValue(f"dataset {str(path)!r} holds no image ({', '.join(SUFFIXES)}); give another folder or zip")
        labels = _labels_of_file(read, files, path) if _LABELS_FILE in names else _labels_of_folders(files, path)
        first = _pixels(read, files[0], path)
        images = first.new_empty(len(files), *first.shape)
        for row, name in enumerate(files):
            image = _pixels(read, name, path)
            if image.shape != first.shape:
                raise EvaluationError(
                    f"images of {path} differ in size: {files[0]} is {list(first.shape)}, {name} "
                    f"{list(image.shape)} [channels, height, width]; make them alike"
                )
            images[row] = image
    return images, _labels(labels, len(files), str(path))


def _hidden(name: str) -> bool:
    """Is it one of the files that desktops leave behind, such as `.thumbnails/1.png`?"""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _pixels(read: _Read, name: str, path: Path) -> Tensor:
    return read_image(_content(read, name, path), f"{name} of {path}")


def _content(read: _Read, name: str, path: Path) -> bytes:
    try:
        return read(name)
    except _UNREADABLE as cause:
        raise EvaluationError(f"{name} of {path} cannot be read ({cause}); replace it") from cause


def _labels_of_folders(files: list[str], path: Path) -> np.ndarray:
    """The place of each file's folder among all, in the order of their names.

    Raises:
        EvaluationError: images both in folders and beside them, whose class nobody can tell.
    """
    folders = [str(PurePosixPath(name).parent) for name in files]
    classes = sorted(set(folders))
    if len(classes) > 1 and "." in classes:
        loose = files[folders.index(".")]
        raise EvaluationError(f"{path} has images in folders and {loose} beside them; move it into its class's folder")
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[folder] for folder in folders])


def _labels_of_file(read: _Read, files: list[str], path: Path) -> np.ndarray | None:
    """The labels in `dataset.json`, {"labels": [[file, label], ...]}, or None if it says null.

    Raises:
        EvaluationError: it is no such file, or has no label for an image.
    """
    try:
        listed = json.loads(_content(read, _LABELS_FILE, path))["labels"]
        if listed is None:
            return None
        by_name = {str(name): label for name, label in listed}
    except (KeyError, TypeError, ValueError) as cause:
        raise EvaluationError(
            f'{_LABELS_FILE} of {path} does not say {{"labels": [[file, label], ...]}} ({cause}); correct it'
        ) from cause
    for name in files:
        label = by_name.get(name)
        if not isinstance(label, int) or isinstance(label, bool):
            raise EvaluationError(f"{_LABELS_FILE} of {path} gives {name} the label {label}; give a whole number")
    return np.array([by_name[name] for name in files])
