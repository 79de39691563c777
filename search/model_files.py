"""From the names in a study file to files known by their hash: shipped, in the models folder, or a path."""

import difflib
from pathlib import Path
from typing import Literal

from bdense_core import assets
from bdense_core.errors import CheckpointError, EvaluationError
from bdense_core.files import HashedFile, sha256_of_file
from bdense_core.integrity import FEATURES, STATISTICS, read_metadata
from bdense_core.protocol import INCEPTION, INCEPTION_SHA256
from search.catalogue import CATALOGUE
from search.errors import MissingFile

Role = Literal["teacher", "features", "reference"]

_FILES: dict[Role, tuple[str, ...]] = {
    "teacher": ("teacher.safetensors",),
    "features": ("features.safetensors", "features.pt"),
    "reference": ("reference.safetensors",),
}
"""What a name's folder among the models holds for each role."""
_MADE_BY: dict[Role, str] = {
    "teacher": "bdense-weights train-teacher --dataset DATA --name {name} (or import-teacher FILE --name {name})",
    "features": "bdense-weights import-features FILE.safetensors --name {name}",
    "reference": (
        "bdense-weights reference --dataset DATA --features FEATURES --name {name}; or name one that is there "
        "(evaluation.reference in a study file, --reference elsewhere)"
    ),
}
_CALLED: dict[Role, str] = {"teacher": "teacher", "features": "feature network", "reference": "reference"}


def find(name: str, role: Role, *, folder: Path, models: Path | None) -> HashedFile:
    """The file behind a name in a study file.

    Args:
        name: of a shipped asset, of a folder in `models`, or a path, relative to `folder`.
        models: where fetched and imported files are.

    Raises:
        MissingFile: there is no such file; the message says how to get it.
    """
    shipped = f"{name}/{role}.safetensors"
    if shipped in assets.names():
        return assets.hashed(shipped)
    in_models = [models / name / file for file in _FILES[role]] if models and _is_plain(name) else []
    path = next((path for path in in_models if path.is_file()), folder / Path(name).expanduser())
    try:
        return HashedFile(path=str(path.resolve()), sha256=sha256_of_file(path))
    except OSError as error:
        raise MissingFile(
            f"there is no {_CALLED[role]} {name!r}: {_advice(name, role, path, error, models)}"
        ) from error


def is_teacher(name: str, models: Path) -> bool:
    """Whether a teacher goes by that name; data sets may go by it too, and then the data is meant."""
    return _is_plain(name) and (models / name / "teacher.safetensors").is_file() and not Path(name).exists()


def features_name(file: HashedFile) -> str:
    """What a feature network is called, which names its distance.

    Raises:
        CheckpointError: it is no feature network of this project, nor the published Inception.
    """
    if file.sha256 == INCEPTION_SHA256:
        return INCEPTION
    if Path(file.path).suffix == ".pt":
        raise CheckpointError(
            f"{file.path} is not the published Inception: its sha256 is {file.sha256[:16]}..., expected "
            f"{INCEPTION_SHA256[:16]}...; fetch it with: bdense-weights fetch-teacher cifar10"
        )
    return str(read_metadata(file.path, FEATURES)["name"])


def check_reference(features: HashedFile, reference: HashedFile) -> None:
    """Whether reference statistics were made with these features.

    Raises:
        EvaluationError: they were made with others, and must not be compared.
    """
    mine = f"{features_name(features)}@{features.sha256[:16]}"
    theirs = read_metadata(reference.path, STATISTICS).get("features")
    if mine != theirs:
        raise EvaluationError(
            f"the reference {reference.path} was made with features {theirs}, but the evaluation uses {mine}; "
            "give the reference made with these features (bdense-weights reference makes one)"
        )


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name


def _advice(name: str, role: Role, path: Path, error: OSError, models: Path | None) -> str:
    if name in CATALOGUE:
        return f"get it with: bdense-weights fetch-teacher {name}"
    if name == INCEPTION:
        return f"it comes with any of: bdense-weights fetch-teacher {'|'.join(CATALOGUE)}"
    shipped = {asset.partition("/")[0] for asset in assets.names() if asset.endswith(f"/{role}.safetensors")}
    own = {p.parent.name for file in _FILES[role] for p in models.glob(f"*/{file}")} if models else set()
    near = difflib.get_close_matches(name, shipped | own, n=1)
    known = f"known by name: {', '.join(sorted(shipped | own))}" + (f"; did you mean {near[0]}?" if near else "")
    if _is_plain(name) and not Path(name).suffix:
        return f"make it with: {_MADE_BY[role].format(name=name)}; {known}"
    return f"{path} cannot be read ({error.strerror or error}); {known}"
