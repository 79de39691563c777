"""What a student of SFD is matched with: noise, labels and the teacher's states, batch by batch.

A state x_k at level t_k is kept as x_k - t_k z, z being the noise its trajectory began with. Along the exact
trajectory that is an average of denoised images, (1 - t_k / sigma_max) times their mean weighted by 1 / s^2, so it is
no larger than they are, while x_k itself is tens of times as large: in float16 it loses less than a tenth of a grey
level, x_k whole ones (docs/full-size.md has the measured losses). The noise follows from the seed.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bdense_core.branches import freeze
from bdense_core.cache import Recomputed, TrajectoryCache
from bdense_core.checkpoints import load_network
from bdense_core.devices import place
from bdense_core.files import HashedFile
from bdense_core.loops.sfd import Grid, latents, teacher_states, uniform_labels
from bdense_core.methods.sfd import SFD
from bdense_core.networks import Denoiser, NetworkConfig
from bdense_core.precision import DTYPES, Precision, in_precision
from bdense_core.task import Task

SHARD_ROWS = 256
"""Trajectories that the teacher walks at once, and in one file; few enough that signs of life come often."""


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
        assert task.teacher is not None
        self._method, self._seed, self._grid = method, task.seed, grid
        self._config, self._device = config, device
        self._teacher_file: HashedFile = task.teacher
        self._compile = task.compile
        self._shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="targets")
        self._ahead: tuple[int, Future[Batch]] | None = None
        self._store = self._make_store(task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

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
        noise = latents(self._seed, *rows, self._shape)
        labels = uniform_labels(self._seed, *rows, self._config.label_dim)
        stored = self._store.rows(*rows)
        if self._device.type == "cuda":
            noise, stored = noise.pin_memory(), stored.pin_memory()
        return Batch(noise, labels, stored)

    def _on_device(self, batch: Batch) -> Batch:
        noise = batch.noise.to(self._device, non_blocking=True)
        stored = batch.states.to(self._device, non_blocking=True).float()
        labels = None if batch.labels is None else batch.labels.to(self._device)
        return Batch(noise, labels, stored + self._carried(noise))

    def _carried(self, noise: Tensor) -> Tensor:
        """t_k z of the trained intervals, [B, J', K, C, H, W]."""
        levels = self._grid.inner[self._grid.first_trained :].to(noise)  # [J', K]
        return levels[None, :, :, None, None, None] * noise[:, None, None]

    def _compute(self, first: int, end: int) -> Tensor:
        """Rows as they are stored, on the CPU. A float16 teacher that overflows answers in float32."""
        noise = latents(self._seed, first, end, self._shape).to(self._device)
        labels = uniform_labels(self._seed, first, end, self._config.label_dim)
        labels = None if labels is None else labels.to(self._device)

        def walk(teacher: Denoiser) -> Tensor:
            method = self._method
            states = teacher_states(teacher, noise, self._grid, labels, solver=method.solver, order=method.order)
            return states[:, self._grid.first_trained :] - self._carried(noise)

        stored = walk(self._teacher)
        if self._method.precision == "float16" and not bool(stored.isfinite().all()):
            stored = walk(self._load("float32"))
        return stored.to(DTYPES[self._method.targets]).cpu()

    @cached_property
    def _teacher(self) -> Denoiser:
        """Loaded when it is first asked: with a full cache it never is."""
        return self._load(self._method.precision)

    def _load(self, precision: Precision) -> Denoiser:
        teacher = place(freeze(in_precision(load_network(self._teacher_file), precision)), self._device)
        if self._compile:
            teacher.model.compile()
        return teacher

    def _make_store(self, task: Task) -> TrajectoryCache | Recomputed:
        num_rows = self._method.num_iterations * self._method.batch
        if task.cache_root is None:
            return Recomputed(num_rows=num_rows, shard_rows=SHARD_ROWS, compute=self._compute)
        cache = TrajectoryCache(
            Path(task.cache_root),
            identity=self._identity(),
            num_rows=num_rows,
            shard_rows=SHARD_ROWS,
            compute=self._compute,
        )
        budget = float("inf") if task.cache_budget_gb is None else task.cache_budget_gb * 1e9
        channels, side, _ = self._shape
        cache.reserve(round(self._method.cache_bytes(channels * side * side)), budget_bytes=budget)
        return cache

    def _identity(self) -> dict[str, Any]:
        method, grid = self._method, self._grid
        return {
            "targets": "sfd/2",
            "teacher": self._teacher_file.sha256,
            "precision": method.precision,
            "seed": self._seed,
            "solver": method.solver,
            "order": method.order,
            "teacher_grid": grid.teacher.tolist(),
            "num_branches": method.num_branches,
            "first_trained": grid.first_trained,
            "dtype": method.targets,
        }
