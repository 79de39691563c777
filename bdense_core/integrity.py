"""Is a file what it is known as? Answered before anything is started, and without torch."""

import contextlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bdense_core.errors import CacheError, CheckpointError
from bdense_core.files import HashedFile, sha256_of_file

METADATA = "bdense_network"
"""The entry of a network file that holds its configuration and origin."""
FEATURES = "bdense_features"
"""The entry of a feature network's file that holds its name and settings."""
STATISTICS = "bdense"
"""The entry of reference statistics that says which features they are of."""
_KINDS = {METADATA: "network", FEATURES: "feature network", STATISTICS: "statistics"}
TENSOR = "targets"
"""The one tensor of a cache's shard."""


def check_file(file: HashedFile) -> None:
    """Compare a file with the hash it is known by.

    Raises:
        CheckpointError: the file is missing, unreadable or altered.
    """
    try:
        digest = sha256_of_file(Path(file.path))
    except OSError as error:
        raise CheckpointError(f"cannot read {file.path}: {error.strerror or error}") from error
    if digest != file.sha256:
        raise CheckpointError(
            f"{file.path} is damaged or was altered: its sha256 is {digest[:16]}..., expected "
            f"{file.sha256[:16]}...; restore the file, or start a new study if the change was intended"
        )


def read_metadata(path: str, entry: str = METADATA) -> dict[str, Any]:
    """What a file says of itself: of a network, its configuration and origin.

    Raises:
        CheckpointError: the file is damaged, or nothing of the kind that has such an entry.
    """
    try:
        with safe_open(path, framework="numpy") as opened:
            content = json.loads((opened.metadata() or {})[entry])
    except KeyError as error:
        raise CheckpointError(f"{path} is no {_KINDS[entry]} of this project: it says nothing of one") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no {_KINDS[entry]} of this project: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no {_KINDS[entry]} of this project: its description is no object")
    return content


def check_shard(path: Path) -> None:
    """Compare a shard's content with the hash in its name.

    Raises:
        CacheError: they differ, or the file cannot be read.
    """
    expected = path.stem.rsplit("-", 1)[-1]
    try:
        intact = sha256_of_file(path) == expected
        if intact:
            with safe_open(path, framework="numpy") as file:
                intact = TENSOR in file.keys()  # noqa: SIM118  (safe_open is no mapping)
    except (OSError, SafetensorError):
        intact = False
    if not intact:
        raise CacheError(f"the teacher cache's shard {path} is damaged; delete that file and it is computed anew")


def cache_bytes(root: Path) -> int:
    """What all caches below `root` take on the disk."""
    total = 0
    for path in root.glob("*/shard-*-*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # somebody makes room just now
            total += path.stat().st_size
    return total


def check_cache(root: Path, *, at_most_bytes: float = float("inf")) -> int:
    """Check the shards below `root` until so many bytes are read; returns how many there were.

    Raises:
        CacheError: the first damaged shard.
    """
    read = checked = 0
    for path in sorted(root.glob("*/shard-*-*.safetensors")):
        read += path.stat().st_size
        if read > at_most_bytes:
            break
        check_shard(path)
        checked += 1
    return checked
