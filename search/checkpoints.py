"""Where trials keep their state: folders that all nodes see, or a store behind a URL that fsspec knows.

A location is a plain string: nothing of fsspec is pickled. A run itself keeps its state in a local folder
(`Task.snapshots`); for a URL that folder is a private one, and a thread copies what is new to the URL.
"""

import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from bdense_core.errors import BadValue, CheckpointError
from bdense_core.remote import errand, open_place
from search.places import check_writable, told
from search.settings import mask

FETCH_WITHIN_S = 120.0
"""How long a trial waits for its earlier state: less than it may be silent (`lease.grace_s`)."""
LAST_COPY_WITHIN_S = 20.0
"""How long a trial that is stopped waits for the last copy of its state."""
SWEEP_WITHIN_S = 120.0
"""How long a sweep may take before people are told that the storage hangs."""
LAST_SWEEP_WITHIN_S = 20.0
"""How long a launch that has nothing left to do waits for its last sweep."""

_STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TRIAL = re.compile(r"trial-(\d{5,})")
_STATE = re.compile(r"(seed-\d+/)?snapshot-\d+-[^/]*\.(safetensors|json)")
"""What a run writes into `Task.snapshots`; locks and half-written files are nobody else's business."""

log = logging.getLogger(__name__)


class Checkpoints:
    """The launcher's side: which trials of which studies have a state, below one root.

    Args:
        root: a path, or a URL of a protocol that fsspec knows (`s3://bucket/folder`). Credentials come from the
            driver's own configuration on each node.
    """

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        self.root = text.rstrip("/") if "://" in text else str(Path(text).absolute())

    def prepare(self) -> None:
        """Make the root, and find out early that nothing could be written there.

        Raises:
            BadValue: an unknown protocol, or a driver that is not installed.
            CheckpointError: the storage cannot be reached or written.
        """
        check_writable(self.root)

    def location(self, study: str, first: int) -> str:
        """Where a trial keeps its state, for the way to a worker.

        Args:
            study: a key of the study, of letters, digits, `.`, `_` and `-`; unlike that of any other study.
            first: the number of the first trial of its chain of retries.
        """
        return f"{self._below(study)}/trial-{first:05d}"

    def trials(self, study: str) -> list[int]:
        """The trials that have a state, by the numbers that `location` was given.

        Raises:
            BadValue, CheckpointError: as for `prepare`.
        """
        with told("listed", self.root):
            files, path = open_place(self._below(study))
            try:
                names = [PurePosixPath(entry).name for entry in files.ls(path, detail=False)]
            except FileNotFoundError:
                return []
        return sorted(int(found[1]) for name in names if (found := _TRIAL.fullmatch(name)))

    def remove(self, study: str, trials: Collection[int]) -> None:
        """Remove the state of these trials, by the numbers that `location` was given.

        Raises:
            BadValue, CheckpointError: as for `prepare`, the first of them; the other trials' state was removed.
        """
        tried = [self._remove(self.location(study, first)) for first in trials]
        if wrong := [error for error in tried if error is not None]:
            raise wrong[0]

    def remove_study(self, study: str) -> None:
        """Remove the state of all trials of a study. What goes wrong is only logged."""
        if (error := self._remove(self._below(study))) is not None:
            log.warning("%s", error)

    def _below(self, study: str) -> str:
        if not _STUDY.fullmatch(study):
            raise ValueError(f"{study!r} names no folder of a study")
        return f"{self.root}/{study}"

    def _remove(self, location: str) -> BadValue | CheckpointError | None:
        """What went wrong, if anything."""
        try:
            with told("removed", location), suppress(FileNotFoundError):
                files, path = open_place(location)
                files.rm(path, recursive=True)
        except (BadValue, CheckpointError) as error:
            return error
        return None


class Sweeper:
    """Removes the state of trials that have ended, beside everything else: a store may be slow, or hang for ever.

    At most one errand is under way, however long it takes. Trouble is logged once until it is over: running trials
    have the same, and say so.
    """

    def __init__(self, kept_at: Checkpoints, study: str, done_with: Callable[[list[int]], list[int]]) -> None:
        """
        Args:
            study: as for `Checkpoints.location`.
            done_with: which of the trials that have a state need it no more. It is asked by whoever calls `step`, and
                after the storage was listed, so that no new trial is hit.
        """
        self._kept_at = kept_at
        self._study = study
        self._done_with = done_with
        self._errand: Future[list[int]] | None = None
        self._begun = 0.0
        self._is_told = False

    def step(self) -> None:
        """Begin to remove what needs to be of what was listed last, and to list anew; waits for nothing."""
        if self._errand is not None and not self._errand.done():
            if time.monotonic() - self._begun > SWEEP_WITHIN_S:
                self._tell_late()
            return
        ended = self._done_with(self._listed())
        self._begun = time.monotonic()
        self._errand = errand(lambda: self._sweep(ended))

    def finish(self) -> None:
        """Remove all that needs to be now, and wait for that, but not for ever."""
        until = time.monotonic() + LAST_SWEEP_WITHIN_S
        self._wait(until)
        for _ in range(2):  # to list, and to remove
            self.step()
            self._wait(until)
        if self._errand is not None and not self._errand.done():
            self._tell_late()
        else:
            self._listed()

    def _sweep(self, ended: list[int]) -> list[int]:
        self._kept_at.remove(self._study, ended)
        return self._kept_at.trials(self._study)

    def _wait(self, until: float) -> None:
        if self._errand is not None:
            wait([self._errand], max(0.0, until - time.monotonic()))

    def _listed(self) -> list[int]:
        """What the errand that is done has found; nothing if it failed."""
        if self._errand is None:
            return []
        if (error := self._errand.exception()) is not None:
            self._tell(str(error))
            return []
        self._is_told = False
        return self._errand.result()

    def _tell_late(self) -> None:
        where = mask(self._kept_at.root)
        self._tell(f"the checkpoints at {where} do not answer; what trials that have ended left there stays for now")

    def _tell(self, what: str) -> None:
        if not self._is_told:
            log.warning("%s", what)
        self._is_told = True


class LocalState:
    """The worker's side: a local folder for the state of one run, where that is all there is to it."""

    def __init__(self, folder: Path | None, note: str | None = None) -> None:
        self.folder = folder
        """For `Task.snapshots`; None: nothing is kept."""
        self.finished = False
        """Set by whoever has the run's result: its state is of no use any more."""
        self._note = note

    def follow(self) -> str | None:
        """Called now and then while the run goes on; one line for people if something went wrong, told once."""
        note, self._note = self._note, None
        return note


@contextmanager
def local_state(location: str | None) -> Iterator[LocalState]:
    """A local folder with the state that is at a location, and what comes to be in it is brought there.

    Trouble with the storage ends no trial: it is told by `LocalState.follow`.
    """
    if location is None:
        yield LocalState(None)
    elif (folder := _local_path(location)) is not None:
        yield LocalState(folder)
    else:
        try:
            scratch = Path(tempfile.mkdtemp(prefix="bdense-state-"))
        except OSError as error:
            note = f"there is no room for a trial's state in {tempfile.gettempdir()}: {error.strerror}"
            yield LocalState(None, f"{note}; the trial goes on without; free some space, or set TMPDIR")
            return
        try:
            mirror = _Mirror(location, scratch)
            try:
                yield mirror
            finally:
                mirror.close()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


class _Mirror(LocalState):
    """A private folder and its copy at a URL. Another worker's files there stay untouched."""

    def __init__(self, location: str, scratch: Path) -> None:
        super().__init__(scratch / "run")
        self._location = location
        self._local = scratch / "run"
        self._copied: dict[str, int] = {}
        self._copying: Future[None] | None = None
        self._tried: dict[str, int] = {}
        self._failing = False
        self._fetch(scratch / "incoming")

    def follow(self) -> str | None:
        if self._copying is not None and self.finished:
            wait([self._copying], LAST_COPY_WITHIN_S)  # nothing may come after the launcher has removed the state
        if self._copying is not None and self._copying.done():
            self._ended(self._copying)
        if self._copying is None and not self.finished and (state := self._state()) != self._tried:
            self._copy(state)
        return super().follow()

    def close(self) -> None:
        """Wait a while for the last copy, unless the run has its result."""
        if self.finished:
            return
        for _ in range(2):  # the one under way, and one of what has come since
            if self._copying is not None:
                wait([self._copying], LAST_COPY_WITHIN_S / 2)
                if not self._copying.done():
                    log.warning("the last state of a trial was not copied to %s in time", mask(self._location))
                    return
            self.follow()

    def _copy(self, state: dict[str, int]) -> None:
        self._tried = state
        self._copying = errand(lambda: self._bring(state))

    def _ended(self, copying: Future[None]) -> None:
        self._copying = None
        error = copying.exception()
        if error is not None:
            log.warning("%s", error)
            if not self._failing:
                self._note = f"{error}; the trial goes on without"
        self._failing = error is not None

    def _state(self) -> dict[str, int]:
        """The files of the run, each with the time of its last change."""
        names = {path.relative_to(self._local).as_posix(): path for path in self._local.glob("**/snapshot-*")}
        return {name: path.stat().st_mtime_ns for name, path in names.items() if _STATE.fullmatch(name)}

    def _bring(self, state: dict[str, int]) -> None:
        """First what is new, then away with what went: at each moment the URL has a whole state."""
        with told("copied", self._location):
            files, root = open_place(self._location)
            for name, changed in state.items():
                if self._copied.get(name) == changed:
                    continue
                files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                try:
                    files.put_file(str(self._local / name), f"{root}/{name}")
                except FileNotFoundError:
                    if (self._local / name).exists():
                        raise
                    return  # the run has newer ones by now, which are brought next
                self._copied[name] = changed
            for name in self._copied.keys() - state.keys():
                with suppress(FileNotFoundError):
                    files.rm_file(f"{root}/{name}")
                del self._copied[name]

    def _fetch(self, incoming: Path) -> None:
        fetching = errand(lambda: self._get(incoming))
        wait([fetching], FETCH_WITHIN_S)
        if not fetching.done():
            reason = f"the state at {mask(self._location)} did not come within {FETCH_WITHIN_S:.0f} s"
            self._note = f"{reason}; the trial begins anew"
        elif (error := fetching.exception()) is not None:
            self._note = f"{error}; the trial begins anew"
        elif incoming.exists():
            incoming.rename(self._local)
            self._copied = self._tried = self._state()
        if self._note:
            log.warning("%s", self._note)

    def _get(self, incoming: Path) -> None:
        with told("read", self._location):
            files, root = open_place(self._location)
            try:
                found = files.find(root)
            except FileNotFoundError:
                return
            for path in found:
                name = path.removeprefix(root).lstrip("/")
                if _STATE.fullmatch(name):
                    (incoming / name).parent.mkdir(parents=True, exist_ok=True)
                    with suppress(FileNotFoundError):  # another worker of this trial has newer ones
                        files.get_file(path, str(incoming / name))


def _local_path(location: str) -> Path | None:
    """The folder that a location is; None where it is none of this machine."""
    protocol, separator, _ = location.partition("://")
    if not separator:
        return Path(location)
    return Path(open_place(location)[1]) if protocol in ("file", "local") else None
