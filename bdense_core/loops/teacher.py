"""The teacher of a run, loaded when it is first asked, and where what it says is kept."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense_core import seeds
from bdense_core.branches import freeze
from bdense_core.cache import Compute, Recomputed, TrajectoryCache
from bdense_core.checkpoints import load_network
from bdense_core.devices import place
from bdense_core.errors import CheckpointError
from bdense_core.networks import NetworkConfig
from bdense_core.precision import HalfDenoiser, Precision, in_precision
from bdense_core.task import Task

_FEW, _SMALL = 32, 1_000_000
"""Rows that a teacher with more parameters than this is asked about at once on a CPU: signs of life must come."""


class FrozenTeacher:
    """The task's teacher, without gradients."""

    def __init__(self, task: Task, precision: Precision, device: torch.device) -> None:
        assert task.teacher is not None
        self.device = device
        self._task, self._precision = task, precision
        self._file = task.teacher

    @property
    def identity(self) -> dict[str, Any]:
        """All that its answers depend on beside what it is asked."""
        return {"teacher": self._file.sha256, "precision": self._precision, "device": self.device.type}

    def store(
        self, *, identity: dict[str, Any], num_rows: int, shard_rows: int, compute: Compute
    ) -> TrajectoryCache | Recomputed:
        """Where what `compute` makes of its answers is kept: in the task's cache, or in memory without one.

        Args:
            identity: what that depends on beside the teacher's own.
        """
        if self._task.cache_root is None:
            return Recomputed(num_rows=num_rows, shard_rows=shard_rows, compute=compute)
        return TrajectoryCache(
            Path(self._task.cache_root),
            identity=self.identity | identity,
            num_rows=num_rows,
            shard_rows=shard_rows,
            compute=compute,
            shared_url=self._task.cache_url,
        )

    def require_finite(self, states: Tensor, which: str) -> None:
        """Refuse what a damaged teacher makes.

        Raises:
            CheckpointError: some states are not finite.
        """
        if not bool(states.isfinite().all()):
            raise CheckpointError(
                f"the teacher {self._file.path} gives states that are not finite ({which}); "
                "check the file, and that the noise levels in method are those that it was trained on"
            )

    def release(self) -> None:
        """Let the network go; asked again, it is loaded again."""
        vars(self).pop("network", None)

    def pieces(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Rows [first, end) in pieces that fill the device, but with a rest now and then."""
        size = sum(parameter.numel() for parameter in self.network.full.parameters())
        at_once = _FEW if self.device.type == "cpu" and size > _SMALL else max(end - first, 1)
        for begin in range(first, end, at_once):
            yield begin, min(begin + at_once, end)

    @cached_property
    def network(self) -> HalfDenoiser:
        """With full caches it is never asked for."""
        full = place(freeze(load_network(self._file)), self.device)
        half = in_precision(full, self._precision)
        if self._task.compile:
            half.model.compile()
        return HalfDenoiser(half, full)


class Endpoints(ABC):
    """The teacher's images on an evaluation's noise (see `scoring.Endpoints`); trials share them through the cache.

    They are few beside a run's targets, so no room is reserved for them.

    Args:
        config: of the teacher.
        identity: what the images depend on beside `FrozenTeacher.identity` and the noise.
    """

    def __init__(self, task: Task, config: NetworkConfig, teacher: FrozenTeacher, identity: dict[str, Any]) -> None:
        assert task.evaluation is not None
        self._teacher, self._seed = teacher, task.evaluation.seed
        self._identity = identity | {"evaluation_seed": self._seed}
        self._shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self._label_dim = config.label_dim

    @abstractmethod
    def _images(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """What the teacher makes of noise [B, C, H, W] and one-hot labels [B, L], if any."""

    def __call__(self, count: int) -> Generator[None, None, Tensor]:
        """The first `count` images, on the CPU.

        Raises:
            CacheError: see `TrajectoryCache`.
            CheckpointError: the teacher's images are not finite.
        """
        store = self._teacher.store(identity=self._identity, num_rows=count, shard_rows=count, compute=self._compute)
        for _ in store.fill(0, count):
            yield
        return store.rows(0, count)

    def _compute(self, first: int, end: int) -> Iterator[Tensor]:
        for begin, stop in self._teacher.pieces(first, end):
            noise, labels = seeds.evaluation_rows(self._seed, begin, stop, self._shape, self._label_dim)
            device = self._teacher.device
            images = self._images(noise.to(device), None if labels is None else labels.to(device))
            self._teacher.require_finite(images, f"images of evaluation seed {self._seed}")
            yield images.cpu()
