"""What a student of SFD is matched with: noise, labels and the teacher's states, batch by batch.

A state x_k at level t_k is kept as x_k - t_k z, z being the noise its trajectory began with. Along the exact
trajectory that is an average of denoised images, (1 - t_k / sigma_max) times their mean weighted by 1 / s^2, so it is
no larger than they are, while x_k itself is tens of times as large: in float16 it loses less than a tenth of a grey
level, x_k whole ones (docs/full-size.md has the measured losses). The noise follows from the seed.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bdense_core.cache import Recomputed, TrajectoryCache
from bdense_core.errors import CacheError
from bdense_core.loops.sfd import Grid, latents, uniform_labels
from bdense_core.loops.sfd_teacher import Teacher
from bdense_core.methods.sfd import SFD
from bdense_core.networks import NetworkConfig
from bdense_core.precision import DTYPES
from bdense_core.task import Task

TARGETS = "sfd/3"
"""Changes with whatever makes targets differ that their identity does not name."""
SHARD_ROWS = 256
"""Trajectories in one file."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a training seed; B rows, J' trained intervals, K branches."""

    noise: Tensor
    """Standard normal, [B, C, H, W]."""
    labels: Tensor | None
    """One-hot, [B, L]."""
    states: Tensor
    """Of the teacher, in the trained intervals, [B, J', K, C, H, W]."""


class Targets:
    """The batches of one run, read ahead of their use; a context that ends the reading.

    Args:
        config: of the teacher.
    """

    def __init__(self, method: SFD, task: Task, grid: Grid, config: NetworkConfig, device: torch.device) -> None:
        self.teacher = Teacher(method, task, grid, device)
        self._method, self._seed, self._grid = method, task.seed, grid
        self._config, self._device = config, device
        self._shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self._reader = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="targets",
            initializer=lambda: torch.cuda.set_device(device) if device.index is not None else None,
        )
        self._ahead: tuple[int, Future[Batch]] | None = None
        self._store = self._make_store(task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)
        # The store's way back to here is a cycle: without this the teacher would stay on the GPU.
        self._ahead = None
        self._store = Recomputed(num_rows=0, shard_rows=SHARD_ROWS, compute=_nothing)
        self.teacher.release()

    def fill(self, iteration: int) -> Iterator[int]:
        """Make an iteration's batch readable; yields after each piece of work.

        Raises:
            CacheError: a shard is damaged, or the folder cannot be written.
        """
        return self._store.fill(*self._rows(iteration))

    def batch(self, iteration: int) -> Batch:
        """The batch of an iteration, on the device, after `fill`. The next one is then read in another thread."""
        ahead, self._ahead = self._ahead, None
        batch = ahead[1].result() if ahead is not None and ahead[0] == iteration else self._read(iteration)
        following = iteration + 1
        if following < self._method.num_iterations and self._store.is_readable(*self._rows(following)):
            self._ahead = (following, self._reader.submit(self._read, following))
        return self._on_device(batch)

    def _rows(self, iteration: int) -> tuple[int, int]:
        return iteration * self._method.batch, (iteration + 1) * self._method.batch

    def _read(self, iteration: int) -> Batch:
        """A batch on the CPU, its states as they are stored; pinned where a GPU is to fetch them."""
        rows = self._rows(iteration)
        noise, labels = self._draw(*rows)
        stored = self._store.rows(*rows)
        if self._device.type == "cuda":
            noise, stored = noise.pin_memory(), stored.pin_memory()
        return Batch(noise, labels, stored)

    def _on_device(self, batch: Batch) -> Batch:
        noise = batch.noise.to(self._device, non_blocking=True)
        stored = batch.states.to(self._device, non_blocking=True).float()
        labels = None if batch.labels is None else batch.labels.to(self._device)
        carried = self._carried(noise)
        if stored.shape[:3] != carried.shape[:3]:
            raise CacheError(
                f"the teacher cache holds targets {list(stored.shape[1:3])} of intervals and branches where this run "
                f"needs {list(carried.shape[1:3])}; delete the cache's folder"
            )
        return Batch(noise, labels, stored + carried)

    def _carried(self, noise: Tensor) -> Tensor:
        """t_k z of the trained intervals, [B, J', K, C, H, W]."""
        levels = self._grid.inner[self._grid.first_trained :].to(noise)  # [J', K]
        return levels[None, :, :, None, None, None] * noise[:, None, None]

    def _draw(self, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Noise and labels of trajectories [first, end)."""
        noise = latents(self._seed, first, end, self._shape)
        return noise, uniform_labels(self._seed, first, end, self._config.label_dim)

    def _compute(self, first: int, end: int) -> Iterator[Tensor]:
        """Rows as they are stored, on the CPU, piece by piece.

        Raises:
            CheckpointError: the teacher's states are not finite.
        """
        begin = first
        for noise, states in self.teacher.walk(self._draw, first, end):
            stored = states[:, self._grid.first_trained :] - self._carried(noise)
            stored = stored.to(DTYPES[self._method.targets])
            stop = begin + len(noise)
            self.teacher.require_finite(stored, f"trajectories {begin} to {stop - 1} of seed {self._seed}")
            yield stored.cpu()
            begin = stop

    def _make_store(self, task: Task) -> TrajectoryCache | Recomputed:
        store = self.teacher.store(
            identity={
                "targets": TARGETS,
                "seed": self._seed,
                "branch_levels": self._grid.inner[self._grid.first_trained :].tolist(),
                "dtype": self._method.targets,
            },
            num_rows=self._method.num_iterations * self._method.batch,
            shard_rows=SHARD_ROWS,
            compute=self._compute,
        )
        if isinstance(store, TrajectoryCache):
            budget = float("inf") if task.cache_budget_gb is None else task.cache_budget_gb * 1e9
            channels, side, _ = self._shape
            store.reserve(round(self._method.cache_bytes(channels * side * side)), budget_bytes=budget)
        return store


def _nothing(first: int, end: int) -> Iterator[Tensor]:
    """What a closed run computes."""
    raise RuntimeError("the run has ended")
