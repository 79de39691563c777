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
_LOCK_WITHIN_S = 30.0
"""How long a frozen writer may keep others waiting: less than a trial may be silent."""
_NAME = re.compile(r"snapshot-(\d{8,})-([0-9a-f]{64})\.safetensors")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state after `step` steps: tensors on the CPU, and values as JSON gives them back (tuples as lists)."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class _Damaged(Exception):
    """A file is not what was written."""


class Snapshots:
    """The snapshots of one run in one folder.

    Args:
        folder: made if it is missing; for this run alone.
        identity: all that the run's state depends on, JSON-able; another run's snapshots are refused.
        keep: how many of the newest stay.
        required: whether the run stops where it cannot be kept. If not, it goes on without: what is wrong is told by
            `take_note` instead of an error, and another run's snapshots are as damaged ones.
    """

    def __init__(self, folder: Path, *, identity: dict[str, Any], keep: int = 2, required: bool = True) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(canonical_json(identity))
        self.keep = keep
        self.required = required
        self._unusable: set[Path] = set()
        self._notes: list[str] = []
        self._failing = False

    def take_note(self) -> str | None:
        """One line for people about what went wrong since the last call. Of errors that recur the first is told."""
        notes, self._notes = self._notes, []
        return "; ".join(notes) or None

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bool:
        """Write a snapshot; once it is in place, remove the ones that are too old or unusable.

        Args:
            step: how far the run is; a newer snapshot has a higher step.
            tensors: of any types and shapes, on any device; no two of them may share memory.
            values: JSON-able; floats come back exactly, NaN is a ValueError.

        Returns:
            Whether it was written.

        Raises:
            CheckpointError: the folder cannot be written, or the disk is full; the older snapshots stay. Only where
                snapshots are required.
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
        try:
            with self._locked("written"):
                self._remove_temporaries()
                write_bytes_atomically(path, content)
                self._unusable.discard(path)  # a step computed anew may well have the name of the file it replaces
                intact = [found for found in self._paths() if found not in self._unusable]
                for old in {*self._unusable, *intact[self.keep :]}:
                    old.unlink(missing_ok=True)
                self._unusable.clear()
        except CheckpointError as error:
            self._tolerate(error)
            return False
        return True

    def latest(self) -> Snapshot | None:
        """The newest usable snapshot; None if there is none. Damaged ones are noted, and go with the next `save`.

        Called before a run begins, it also finds out early that nothing could be saved, where that matters.

        Raises:
            CheckpointError: it is another run's, or the folder cannot be read and written. Only where snapshots are
                required.
        """
        try:
            # Files are whole or they are not there: to read them needs no lock, which a frozen writer might hold.
            with self._locked("read") if self.required else self._reporting("read"):
                return self._newest()
        except CheckpointError as error:
            self._tolerate(error)
            return None

    def _newest(self) -> Snapshot | None:
        for path in self._paths():
            try:
                return self._read(path)
            except FileNotFoundError:
                continue  # another writer has newer ones
            except _Damaged:
                self._say(f"the snapshot {path} is damaged; looking for an older one")
            except CheckpointError as error:
                if self.required:
                    raise
                self._say(f"{error}; looking for an older one")
            self._unusable.add(path)
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
            self._unusable.clear()

    def _say(self, text: str) -> None:
        log.warning("%s", text)
        self._notes.append(text)

    def _tolerate(self, error: CheckpointError) -> None:
        if self.required:
            raise error
        if self._failing:
            log.warning("%s", error)
        else:
            self._say(str(error))
        self._failing = True

    @contextmanager
    def _locked(self, purpose: str) -> Iterator[None]:
        with self._reporting(purpose), FileLock(self.folder / "snapshots.lock", timeout=_LOCK_WITHIN_S):
            yield

    @contextmanager
    def _reporting(self, purpose: str) -> Iterator[None]:
        """The folder, made if it is missing; what goes wrong in it is a `CheckpointError`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            after = "run again to go on from the last snapshot there" if self.required else "the run goes on without"
            raise CheckpointError(
                f"the snapshots in {self.folder} cannot be {purpose}: {getattr(error, 'strerror', None) or error}; "
                f"free some space, make the folder writable or choose another one; {after}"
            ) from error

    def _paths(self) -> list[Path]:
        """All snapshots, newest first."""
        paths = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(paths, key=lambda path: (-int(path.name.split("-")[1]), path.name))

    def _remove_temporaries(self) -> None:
        for left in self.folder.glob(".snapshot-*.tmp"):
            left.unlink(missing_ok=True)  # by a writer that was killed: a living one would hold the lock

    def _read(self, path: Path) -> Snapshot:
        """The snapshot in a file, whose content is read once, hash and all.

        Raises:
            _Damaged: it is not what was written.
            CheckpointError: it is another run's.
        """
        content = path.read_bytes()
        match = _NAME.fullmatch(path.name)
        if match is None or hashlib.sha256(content).hexdigest() != match[2]:
            raise _Damaged
        try:
            length = int.from_bytes(content[:8], "little")  # of the header of a safetensors file, which is JSON
            about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])
            tensors, step, values = load(content), about["step"], about["values"]
            theirs, digest = about["identity"], about["identity_sha256"]
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise _Damaged from error
        if digest != sha256_of(self.identity):
            advice = f"; choose another folder or remove {self.folder}" if self.required else ""
            raise CheckpointError(
                f"the snapshot {path} is of another run: it differs in "
                f"{', '.join(_differences(theirs, self.identity))}{advice}"
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
