"""The teacher of a run of SFD: the states it goes through from given noise."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bdense_core.loops.sfd import Grid, teacher_states
from bdense_core.loops.teacher import FrozenTeacher
from bdense_core.methods.sfd import SFD
from bdense_core.task import Task

Rows = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""Noise [B, C, H, W] and one-hot labels [B, L], if any, of a range of rows; both on the CPU."""


class Teacher(FrozenTeacher):
    """A frozen network that walks its own grid from given noise."""

    def __init__(self, method: SFD, task: Task, grid: Grid, device: torch.device) -> None:
        super().__init__(task, method.precision, device)
        self._method, self._grid = method, grid

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {
            "solver": self._method.solver,
            "order": self._method.order,
            "teacher_grid": self._grid.teacher.tolist(),
        }

    def walk(self, rows: Rows, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Noise [b, C, H, W] of rows [first, end) and the states it leads to [b, J, K, C, H, W], piece by piece."""
        for begin, stop in self.pieces(first, end):
            noise, labels = rows(begin, stop)
            noise = noise.to(self.device)
            yield noise, self.states(noise, None if labels is None else labels.to(self.device))

    def states(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The states that noise [B, C, H, W] leads to, [B, J, K, C, H, W]."""
        method = self._method
        return teacher_states(self.network, noise, self._grid, labels, solver=method.solver, order=method.order)
