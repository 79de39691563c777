"""The state of a long run, kept so that a run that was broken off goes on where it was.

A snapshot is one safetensors file, named by its step and by the sha256 of its content: a damaged one cannot
be mistaken for a good one, and the run goes back to the one before it. Whoever writes into the folder holds
its lock, so that two workers on one run (the first was taken for dead) cannot sweep up each other's files.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bdense_core.errors import CheckpointError
from bdense_core.files import canonical_json, sha256_of, write_bytes_atomically

METADATA = "bdense_snapshot"
"""The entry of a snapshot that holds its step, its values and its run's identity."""
_NAME = re.compile(r"snapshot-(\d{8,})-([0-9a-f]{64})\.safetensors")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state after `step` steps: tensors on the CPU, and values as JSON gives them back (tuples as lists)."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Snapshots:
    """The snapshots of one run in one folder.

    Args:
        folder: made if it is missing; for this run alone.
        identity: all that the run's state depends on, JSON-able; another run's snapshots are refused.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, *, identity: dict[str, Any], keep: int = 2) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(canonical_json(identity))
        self.keep = keep
        self._damaged: set[Path] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write a snapshot; once it is in place, remove the ones that are too old or damaged.

        Args:
            step: how far the run is; a newer snapshot has a higher step.
            tensors: of any types and shapes, on any device; no two of them may share memory.
            values: JSON-able; floats come back exactly, NaN is a ValueError.

        Raises:
            CheckpointError: the folder cannot be written, or the disk is full; the older snapshots stay.
        """
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {
            "step": step,
            "values": dict(values),
            "identity": self.identity,
            "identity_sha256": sha256_of(self.identity),
        }
        content = save(state, {METADATA: canonical_json(about)})  # one entry: see checkpoints.py
        path = self.folder / f"snapshot-{step:08d}-{hashlib.sha256(content).hexdigest()}.safetensors"
        with self._locked("written"):
            self._remove_temporaries()
            write_bytes_atomically(path, content)
            self._damaged.discard(path)  # a step computed anew may well have the name of the file it replaces
            intact = [found for found in self._paths() if found not in self._damaged]
            for old in {*self._damaged, *intact[self.keep :]}:
                old.unlink(missing_ok=True)
            self._damaged.clear()

    def latest(self) -> Snapshot | None:
        """The newest intact snapshot; None if there is none. Damaged ones are logged, and go with the next `save`.

        Called before a run begins, it also finds out early that nothing could be saved.

        Raises:
            CheckpointError: it is another run's, or the folder cannot be read and written.
        """
        with self._locked("read"):
            for path in self._paths():
                snapshot = self._read(path)
                if snapshot is not None:
                    return snapshot
                log.warning("the snapshot %s is damaged; looking for an older one", path)
                self._damaged.add(path)
        return None

    def clear(self) -> None:
        """Remove all snapshots: the run has ended.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        with self._locked("cleared"):
            self._remove_temporaries()
            for path in self._paths():
                path.unlink(missing_ok=True)
            self._damaged.clear()

    @contextmanager
    def _locked(self, purpose: str) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "snapshots.lock"):
                yield
        except OSError as error:
            raise CheckpointError(
                f"the snapshots in {self.folder} cannot be {purpose}: {error.strerror or error}; "
                "free some space, make the folder writable or choose another one; run again to go on from the last "
                "snapshot there"
            ) from error

    def _paths(self) -> list[Path]:
        """All snapshots, newest first."""
        paths = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(paths, key=lambda path: (-int(path.name.split("-")[1]), path.name))

    def _remove_temporaries(self) -> None:
        for left in self.folder.glob(".snapshot-*.tmp"):
            left.unlink(missing_ok=True)  # by a writer that was killed: a living one would hold the lock

    def _read(self, path: Path) -> Snapshot | None:
        """The snapshot in a file; None if the file is damaged. Its content is read once, hash and all."""
        content = path.read_bytes()
        match = _NAME.fullmatch(path.name)
        if match is None or hashlib.sha256(content).hexdigest() != match[2]:
            return None
        try:
            length = int.from_bytes(content[:8], "little")  # of the header of a safetensors file, which is JSON
            about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])
            tensors, step, values = load(content), about["step"], about["values"]
            theirs, digest = about["identity"], about["identity_sha256"]
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            return None
        if digest != sha256_of(self.identity):
            raise CheckpointError(
                f"the snapshot {path} is of another run: it differs in "
                f"{', '.join(_differences(theirs, self.identity))}; choose another folder or remove {self.folder}"
            )
        return Snapshot(step=step, tensors=tensors, values=values)


def _differences(one: Any, other: Any, name: str = "") -> list[str]:
    """The dotted names of the entries that two identities do not share."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [name]
    found: list[str] = []
    for key in sorted({*one, *other}):
        below = f"{name}.{key}" if name else key
        found += _differences(one[key], other[key], below) if key in one and key in other else [below]
    return found
