"""CIFAR-10 for tests, from the strips beside the checkout. They are not part of this repository.

They lie in `data/cifar10` beside the vectors (tests/golden/conftest.py says where those are). Tests skip without:

    pytestmark = pytest.mark.skipif(cifar10.folder() is None, reason=cifar10.MISSING)
"""

import io
import os
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

_VECTORS = Path(os.environ.get("BDENSE_VECTORS", Path(__file__).resolve().parents[2] / "shared" / "vectors"))
_FOLDER = _VECTORS.parent / "data" / "cifar10"
_STRIP = 100  # images of 32x32, one below the other

MISSING = f"{_FOLDER} does not exist; set BDENSE_VECTORS to the folder `vectors` beside `data`"


def folder() -> Path | None:
    """Where the strips and classifiers lie, or None."""
    return _FOLDER if _FOLDER.is_dir() else None


@lru_cache(maxsize=2)
def read(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [10000, 32, 32, 3], and labels, uint8 [10000], of `test` or `train-1` to `train-5`; read only."""
    with zipfile.ZipFile(_FOLDER / f"cifar10-{part}.zip") as archive:
        labels = np.load(io.BytesIO(archive.read("labels.npy")), allow_pickle=False)
        strips = [_strip(archive.read(f"{number:03d}.webp")) for number in range(len(labels) // _STRIP)]
    images = np.concatenate(strips)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def _strip(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as opened:
        return np.asarray(opened.convert("RGB")).reshape(_STRIP, 32, 32, 3)
