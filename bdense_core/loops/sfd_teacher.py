"""The teacher of a run, loaded when it is first asked, and where its states are kept."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense_core.branches import freeze
from bdense_core.cache import Compute, Recomputed, TrajectoryCache
from bdense_core.checkpoints import load_network
from bdense_core.devices import place
from bdense_core.errors import CheckpointError
from bdense_core.loops.sfd import Grid, teacher_states
from bdense_core.methods.sfd import SFD
from bdense_core.precision import HalfDenoiser, in_precision
from bdense_core.task import Task

_FEW, _SMALL = 32, 1_000_000
"""Trajectories that a teacher with more parameters than this walks at once on a CPU: signs of life must come."""

Rows = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""Noise [B, C, H, W] and one-hot labels [B, L], if any, of a range of rows; both on the CPU."""


class Teacher:
    """A frozen network that walks its own grid from given noise."""

    def __init__(self, method: SFD, task: Task, grid: Grid, device: torch.device) -> None:
        assert task.teacher is not None
        self._method, self._task, self._grid, self._device = method, task, grid, device
        self._file = task.teacher

    @property
    def identity(self) -> dict[str, Any]:
        """All that its states depend on beside the noise."""
        return {
            "teacher": self._file.sha256,
            "precision": self._method.precision,
            "solver": self._method.solver,
            "order": self._method.order,
            "teacher_grid": self._grid.teacher.tolist(),
            "device": self._device.type,
        }

    def walk(self, rows: Rows, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Noise [b, C, H, W] of rows [first, end) and the states it leads to [b, J, K, C, H, W], piece by piece."""
        at_once = self._at_once(end - first)
        for begin in range(first, end, at_once):
            noise, labels = rows(begin, min(begin + at_once, end))
            noise = noise.to(self._device)
            labels = None if labels is None else labels.to(self._device)
            method = self._method
            yield (
                noise,
                teacher_states(self._network, noise, self._grid, labels, solver=method.solver, order=method.order),
            )

    def store(
        self, *, identity: dict[str, Any], num_rows: int, shard_rows: int, compute: Compute
    ) -> TrajectoryCache | Recomputed:
        """Where what `compute` makes of its states is kept: in the task's cache, or in memory without one.

        Args:
            identity: what that depends on beside `Teacher.identity`.
        """
        if self._task.cache_root is None:
            return Recomputed(num_rows=num_rows, shard_rows=shard_rows, compute=compute)
        return TrajectoryCache(
            Path(self._task.cache_root),
            identity=self.identity | identity,
            num_rows=num_rows,
            shard_rows=shard_rows,
            compute=compute,
        )

    def require_finite(self, states: Tensor, which: str) -> None:
        """Refuse what a damaged teacher makes.

        Raises:
            CheckpointError: some states are not finite.
        """
        if not bool(states.isfinite().all()):
            raise CheckpointError(
                f"the teacher {self._file.path} gives states that are not finite ({which}); "
                "check the file, or its sigma_max and method.sigma_max"
            )

    def release(self) -> None:
        """Let the network go; asked again, it is loaded again."""
        vars(self).pop("_network", None)

    def _at_once(self, count: int) -> int:
        """Trajectories that are walked at once: as many as fill the device, and a rest after each piece."""
        size = sum(parameter.numel() for parameter in self._network.full.parameters())
        return _FEW if self._device.type == "cpu" and size > _SMALL else max(count, 1)

    @cached_property
    def _network(self) -> HalfDenoiser:
        """With full caches it is never asked for."""
        full = place(freeze(load_network(self._file)), self._device)
        half = in_precision(full, self._method.precision)
        if self._task.compile:
            half.model.compile()
        return HalfDenoiser(half, full)
