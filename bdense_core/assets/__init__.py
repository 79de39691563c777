"""Networks and statistics that come with the package, each known by its sha256. Needs no torch.

The hashes stand in `<folder>/card.json`, which the script that made the files has written; so a damaged
file is noticed when it is loaded, whoever loads it.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from bdense_core.errors import BadValue, CheckpointError
from bdense_core.files import HashedFile

_ROOT = Path(__file__).parent


def path(name: str) -> Path:
    """Where an asset lies, such as `digits/teacher.safetensors`.

    Raises:
        BadValue: no such asset; the message lists the known ones.
    """
    if name not in names():
        raise BadValue(f"no asset {name!r} comes with this package; known are {', '.join(names())}")
    return _ROOT / name


def hashed(name: str) -> HashedFile:
    """An asset with the hash it must have. Loading it checks the hash.

    Raises:
        BadValue: no such asset.
    """
    folder, _, file = name.partition("/")
    return HashedFile(path=str(path(name)), sha256=card(folder)["files"][file]["sha256"])


def here(file: HashedFile) -> HashedFile:
    """The file as this installation has it, if it came with the package: its path is another on each machine."""
    return _by_hash().get(file.sha256, file)


def is_shipped(file: HashedFile) -> bool:
    """Whether the file came with the package."""
    return file.sha256 in _by_hash()


@lru_cache
def _by_hash() -> dict[str, HashedFile]:
    return {own.sha256: own for own in map(hashed, names())}


def names() -> tuple[str, ...]:
    """All assets."""
    folders = sorted(found.parent.name for found in _ROOT.glob("*/card.json"))
    return tuple(f"{folder}/{file}" for folder in folders for file in card(folder)["files"])


@lru_cache
def card(folder: str) -> dict[str, Any]:
    """How the assets of a folder were made, and the figures that describe them.

    Raises:
        CheckpointError: the card is missing or unreadable; the package is damaged.
    """
    file = _ROOT / folder / "card.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; install the package again") from error
    return found
