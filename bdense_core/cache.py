"""Teacher trajectories, computed once and shared by all trials and workers.

The targets of SFD depend on the teacher, the grid and the seed, never on the student or its weights
(spec: a cache leaves 6 of 18 forward-equivalents per trajectory). A cache is a folder of shards; the folder
is named by everything the targets depend on, each shard by the sha256 of its content, so a damaged shard
cannot be mistaken for a good one. Shards are always whole, so a longer run goes on where a shorter one ended.
Several workers fill one cache together: whoever holds a shard's lock computes it, the others go on with the next.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bdense_core.errors import CacheError
from bdense_core.files import (
    canonical_json,
    sha256_of,
    write_bytes_atomically,
    write_text_atomically,
)
from bdense_core.integrity import TENSOR, cache_bytes, check_shard
from bdense_core.shared_cache import SharedShards

Compute = Callable[[int, int], Iterable[Tensor]]
_WAIT_S = 0.05
_SPARE = 1.02
"""Room for the shards' headers and the file system's own needs."""


class TrajectoryCache:
    """The targets of a run's trajectories, in shards of `shard_rows`.

    Args:
        root: the folder that holds all caches.
        identity: all that the targets depend on, JSON-able; its hash names the folder.
        num_rows: trajectories that this run wants; no shard beyond them is computed.
        shard_rows: trajectories in one file.
        compute: the targets of rows [first, end), piece by piece: [some rows, ...] each.
        shared_url: where machines that share no folder find each other's shards; None: nowhere.
    """

    def __init__(
        self,
        root: Path,
        *,
        identity: dict[str, Any],
        num_rows: int,
        shard_rows: int,
        compute: Compute,
        shared_url: str | None = None,
    ) -> None:
        self.identity = {**identity, "shard_rows": shard_rows}
        self.root = root
        self.folder = root / sha256_of(self.identity)[:24]
        self.num_rows = num_rows
        self.shard_rows = shard_rows
        self.computed = 0
        self._compute = compute
        self._verified: dict[int, Path] = {}
        self._shared = SharedShards(shared_url, self.folder.name) if shared_url else None

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    def reserve(self, row_bytes: int, *, budget_bytes: float = float("inf")) -> None:
        """Check, before anything is computed, that what is missing has room on the disk and in the budget.

        Args:
            row_bytes: size of one trajectory's targets.
            budget_bytes: what all caches below the root may take together.

        Raises:
            CacheError: it does not; the message says how much is missing where.
        """
        missing = (self.num_shards - len(self._present())) * self.shard_rows * row_bytes * _SPARE
        if missing <= 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._unwritable(error) from error
        if missing > free:
            raise CacheError(
                f"the teacher cache needs {missing / 1e9:.3g} GB more, but {self.folder} has {free / 1e9:.3g} GB free; "
                "free some, choose another folder with BDENSE_HOME, or do without: cache.enabled: false"
            )
        used = cache_bytes(self.root)
        if used + missing > budget_bytes:
            raise CacheError(
                f"the teacher cache needs {missing / 1e9:.3g} GB more and {self.root} holds {used / 1e9:.3g} GB, more "
                f"than cache.budget_gb ({budget_bytes / 1e9:g}) allows; raise it, delete folders there that no study "
                "needs any more, or do without: cache.enabled: false"
            )

    def fill(self, first: int, end: int) -> Iterator[int]:
        """Make rows [first, end) readable.

        Yields the shard that is wanted after each piece of work and each short wait for another worker; nothing if
        there is nothing to do.

        Raises:
            CacheError: a shard is damaged, or the folder cannot be written.
        """
        for shard in _shards_of(first, min(end, self.num_rows), self.shard_rows):
            while shard not in self._verified and not self._open(shard):
                for _ in self._work_on_any(shard):
                    yield shard

    def is_readable(self, first: int, end: int) -> bool:
        """Whether rows [first, end) can be read without computing or waiting."""
        wanted = _shards_of(first, end, self.shard_rows)
        return all(shard in self._verified or self._open(shard) for shard in wanted)

    def rows(self, first: int, end: int) -> Tensor:
        """Targets of rows [first, end), read from the memory-mapped shards. `fill` comes before.

        Raises:
            CacheError: a shard that was there has gone.
        """
        parts = []
        for shard in _shards_of(first, end, self.shard_rows):
            offset = shard * self.shard_rows
            path = self._verified[shard]
            try:
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_slice(TENSOR)[max(first - offset, 0) : end - offset])
            except (OSError, SafetensorError) as error:
                raise CacheError(
                    f"the teacher cache's shard {path} cannot be read any more: {error}; run again"
                ) from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _work_on_any(self, wanted: int) -> Iterator[None]:
        """Get the wanted shard, or, while another worker does, the next one that nobody works on."""
        present = self._present()
        for shard in range(wanted, self.num_shards):
            if shard not in present and (lock := self._lock(shard)) is not None:
                try:
                    if self._find(shard) is None:
                        yield from self._get(shard)
                        return
                finally:
                    lock.release()
        time.sleep(_WAIT_S)
        yield

    def _lock(self, shard: int) -> FileLock | None:
        """The held lock of a shard; None if another worker holds it."""
        lock = FileLock(self.folder / f"shard-{shard:05d}.lock", timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            return None
        except OSError as error:
            raise self._unwritable(error) from error
        return lock

    def _get(self, shard: int) -> Iterator[None]:
        """Take a shard from where other machines offer theirs, else compute it and offer it."""
        for left in self.folder.glob(f".shard-{shard:05d}-*.tmp"):  # by a worker that was killed: we hold the lock
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if self._shared is None:
            yield from self._make(shard)
        elif not (yield from self._shared.fetch(shard, self.folder)):
            yield from self._shared.offer((yield from self._make(shard)))

    def _make(self, shard: int) -> Generator[None, None, Path]:
        """Compute a shard and write it, with a sign of life after each piece."""
        first, pieces = shard * self.shard_rows, []
        for piece in self._compute(first, first + self.shard_rows):
            pieces.append(piece)
            yield
        try:
            return self._write(shard, torch.cat(pieces))
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, shard: int, targets: Tensor) -> Path:
        description = self.folder / "cache.json"
        if not description.exists():
            write_text_atomically(description, canonical_json(self.identity) + "\n")
        content = save({TENSOR: targets.contiguous()})
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / f"shard-{shard:05d}-{digest}.safetensors"
        write_bytes_atomically(path, content)
        self.computed += 1
        return path

    def _present(self) -> set[int]:
        """The shards of this run that are on the disk, by one look at the folder."""
        found = {int(path.name.split("-")[1]) for path in self.folder.glob("shard-*-*.safetensors")}
        return {shard for shard in found if shard < self.num_shards}

    def _find(self, shard: int) -> Path | None:
        return next(self.folder.glob(f"shard-{shard:05d}-*.safetensors"), None)

    def _open(self, shard: int) -> bool:
        path = self._find(shard)
        if path is None:
            return False
        check_shard(path)
        self._verified[shard] = path
        return True

    def _unwritable(self, error: OSError) -> CacheError:
        return CacheError(
            f"the teacher cache {self.folder} cannot be written: {error.strerror or error}; "
            "free some space, choose another folder with BDENSE_HOME, or do without: cache.enabled: false"
        )


class Recomputed:
    """What a `TrajectoryCache` does, without a disk: rows are computed when they are wanted, and then forgotten."""

    def __init__(self, *, num_rows: int, shard_rows: int, compute: Compute) -> None:
        self.num_rows = num_rows
        self.shard_rows = shard_rows
        self._compute = compute
        self._shards: dict[int, Tensor] = {}

    def fill(self, first: int, end: int) -> Iterator[int]:
        """Compute what is not there of rows [first, end); yields after each piece of work."""
        for shard in _shards_of(first, min(end, self.num_rows), self.shard_rows):
            if shard in self._shards:
                continue
            pieces = []
            for piece in self._compute(shard * self.shard_rows, (shard + 1) * self.shard_rows):
                pieces.append(piece)
                yield shard
            self._shards[shard] = torch.cat(pieces)

    def is_readable(self, first: int, end: int) -> bool:
        """Whether rows [first, end) are there."""
        return all(shard in self._shards for shard in _shards_of(first, end, self.shard_rows))

    def rows(self, first: int, end: int) -> Tensor:
        """Targets of rows [first, end); earlier shards are let go."""
        wanted = _shards_of(first, end, self.shard_rows)
        for shard in list(self._shards):
            if shard < wanted.start:
                del self._shards[shard]
        offset = wanted.start * self.shard_rows
        return torch.cat([self._shards[shard] for shard in wanted])[first - offset : end - offset]


def _shards_of(first: int, end: int, shard_rows: int) -> range:
    """The shards that hold rows [first, end)."""
    return range(first // shard_rows, -(-end // shard_rows))
