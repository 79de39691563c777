"""Which data set a name in a study file means: a shipped one, a published one that was fetched, or a path. No torch.

models/<name>/<name>.npz    the training set of a published one: uint8 `images` [N, H, W, C], and `labels` [N]
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from bdense_core.dataset_names import DATASET_NAMES
from bdense_core.errors import BadValue
from search.errors import MissingFile

__all__ = ["PUBLISHED", "Published", "fetched_file", "find_dataset", "published"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A data set that its authors publish as an archive, whose training set `bdense_core.data` can read unpacked.

    Attributes:
        url: of the archive, a .tar.gz.
        sha256: of the archive.
        folder: the one in the archive that holds the images.
    """

    name: str
    url: str
    sha256: str
    folder: str

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return self.url.rpartition("/")[2]


PUBLISHED = {
    made.name: made
    for made in (
        # The binary versions: the python ones are pickles. Hashes as TensorFlow Datasets records them.
        Published(
            name="cifar10",
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            folder="cifar-10-batches-bin",
        ),
        Published(
            name="cifar100",
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            folder="cifar-100-binary",
        ),
    )
}


def published(name: str) -> Published:
    """What is known about a published data set.

    Raises:
        BadValue: none of that name; the message names the nearest.
    """
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(PUBLISHED)}"
        raise BadValue(f"no data set {name!r} can be fetched; {hint}")
    return PUBLISHED[name]


def fetched_file(name: str, models: Path) -> Path:
    """Where a published data set is, once it was fetched."""
    return models / name / f"{name}.npz"


def find_dataset(name: str, *, folder: Path, models: Path | None) -> str:
    """What `bdense_core.data.load` is to be given for a name in a study file.

    Args:
        name: of a shipped data set, of a published one that was fetched, or a path, relative to `folder`.
        models: where fetched files are.

    Returns:
        a shipped name as it is, else an absolute path.

    Raises:
        MissingFile: there is no such data set; the message says how to get it.
    """
    if name in DATASET_NAMES:
        return name
    if models is not None and name in PUBLISHED and (file := fetched_file(name, models)).is_file():
        return str(file.resolve())
    path = folder / Path(name).expanduser()
    if name and path.exists():
        return str(path.resolve())
    raise MissingFile(f"there is no data set {name!r}: {_advice(name, path)}")


def _advice(name: str, path: Path) -> str:
    if name in PUBLISHED:
        return f"get it with: bdense-weights fetch-dataset {name}"
    if os.sep in name or path.suffix in (".npz", ".zip"):
        return f"{path} does not exist; correct the path"
    known = [*DATASET_NAMES, *PUBLISHED]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known by name are {', '.join(known)}; or give a path"
