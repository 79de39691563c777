"""Teacher trajectories, computed once and shared by all trials and workers.

The targets of SFD depend on the teacher, the grid and the seed, never on the student or its weights
(spec: a cache leaves 6 of 18 forward-equivalents per trajectory). A cache is a folder of shards; the folder
is named by everything the targets depend on, each shard by the sha256 of its content, so a damaged shard
cannot be mistaken for a good one. Several workers fill one cache together: whoever holds a shard's lock
computes it, the others go on with the next.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
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
from bdense_core.integrity import TENSOR, check_shard

_WAIT_S = 0.05


class TrajectoryCache:
    """The targets of `num_rows` trajectories, in shards of `shard_rows`.

    Args:
        root: the folder that holds all caches.
        identity: all that the targets depend on, JSON-able; its hash names the folder.
        num_rows: trajectories in the whole cache.
        shard_rows: trajectories in one file; the last may be shorter.
        compute: the targets of rows [first, end), [end - first, ...].
    """

    def __init__(
        self,
        root: Path,
        *,
        identity: dict[str, Any],
        num_rows: int,
        shard_rows: int,
        compute: Callable[[int, int], Tensor],
    ) -> None:
        self.identity = {**identity, "shard_rows": shard_rows}
        self.folder = root / sha256_of(self.identity)[:24]
        self.num_rows = num_rows
        self.shard_rows = shard_rows
        self.computed = 0
        self._compute = compute
        self._verified: dict[int, Path] = {}

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    def fill(self, end_row: int) -> Iterator[int]:
        """Make rows [0, end_row) readable.

        Yields the number of readable shards after each piece of work and each short wait for another worker;
        nothing if there is nothing to do.

        Raises:
            CacheError: a shard is damaged, or the folder cannot be written.
        """
        for shard in range(-(-min(end_row, self.num_rows) // self.shard_rows)):
            while shard not in self._verified and not self._open(shard):
                self._work_on_any(shard)
                yield shard

    def rows(self, first: int, end: int) -> Tensor:
        """Targets of rows [first, end), read from the memory-mapped shards. `fill(end)` comes before.

        Raises:
            CacheError: a shard that was there has gone.
        """
        parts = []
        for shard in range(first // self.shard_rows, (end - 1) // self.shard_rows + 1):
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

    def _work_on_any(self, wanted: int) -> None:
        """Compute the wanted shard, or, while another worker does, the next one that nobody works on."""
        for shard in range(wanted, self.num_shards):
            if self._find(shard) is None and self._compute_unless_taken(shard):
                return
        time.sleep(_WAIT_S)

    def _compute_unless_taken(self, shard: int) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"shard-{shard:05d}.lock", timeout=0):
                if self._find(shard) is not None:
                    return False
                first = shard * self.shard_rows
                targets = self._compute(first, min(first + self.shard_rows, self.num_rows))
                self._write(shard, targets)
                return True
        except Timeout:
            return False
        except OSError as error:
            raise CacheError(
                f"the teacher cache {self.folder} cannot be written: {error.strerror or error}; "
                "free some space or choose another folder with BDENSE_HOME"
            ) from error

    def _write(self, shard: int, targets: Tensor) -> None:
        description = self.folder / "cache.json"
        if not description.exists():
            write_text_atomically(description, canonical_json(self.identity) + "\n")
        for left in self.folder.glob(f".shard-{shard:05d}-*.tmp"):
            left.unlink()  # by a worker that was killed: whoever writes this shard holds its lock
        content = save({TENSOR: targets.contiguous()})
        digest = hashlib.sha256(content).hexdigest()
        write_bytes_atomically(self.folder / f"shard-{shard:05d}-{digest}.safetensors", content)
        self.computed += 1

    def _find(self, shard: int) -> Path | None:
        return next(self.folder.glob(f"shard-{shard:05d}-*.safetensors"), None)

    def _open(self, shard: int) -> bool:
        path = self._find(shard)
        if path is None:
            return False
        check_shard(path)
        self._verified[shard] = path
        return True
