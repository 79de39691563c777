"""How a student is scored: the metric, and its distance to the teacher on the same images."""

from collections.abc import Generator, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bdense_core import data, seeds
from bdense_core.evaluation import Metric, Sample
from bdense_core.images import grid_png, readable
from bdense_core.loops.sfd import Grid, sample
from bdense_core.loops.sfd_teacher import Teacher
from bdense_core.networks import NetworkConfig
from bdense_core.precision import HalfDenoiser
from bdense_core.task import Score, Task

ENDPOINTS = "sfd/1"
"""Changes with whatever makes the teacher's endpoints differ that their identity does not name."""
NUM_COMPARED = 256
"""Images on which the student is compared with its teacher, at most."""

_GAP = 1
"""White pixels around each image that is shown."""


class Scorer:
    """Scores students of one run on the noise that its evaluation names.

    Args:
        config: of the teacher.

    Raises:
        BDenseError: see `Metric`.
    """

    def __init__(self, task: Task, grid: Grid, config: NetworkConfig, teacher: Teacher) -> None:
        assert task.evaluation is not None
        self._task, self._grid, self._teacher = task, grid, teacher
        self._metric = Metric(task.evaluation, task.device)
        self._shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self._label_dim = config.label_dim
        self._seed = task.evaluation.seed
        self._num_early = task.evaluation.early_samples or task.evaluation.n_samples
        self._num_compared = min(NUM_COMPARED, self._num_early)
        self._endpoints: Tensor | None = None

    def score(self, network: HalfDenoiser, kimg: int, done: float) -> Generator[None, None, Score]:
        """Score a student in evaluation mode; its last score, at `done` = 1, has more to it.

        Yields after each piece of work, for signs of life.

        Raises:
            BDenseError: images that are not finite, or a cache that cannot be used.
        """
        is_last = done >= 1
        first: list[Tensor] = []

        def draw(noise: Tensor, labels: Tensor | None) -> Tensor:
            made = sample(network, noise, self._grid, labels)
            if (missing := self._num_compared - sum(len(images) for images in first)) > 0:
                first.append(made[:missing].cpu())
            return made

        value = yield from self._measure(draw, self._seed, None if is_last else self._num_early)
        endpoints = yield from self._teachers()
        mine = torch.cat(first)
        score = Score(kimg=kimg, value=value, done=done, surrogate=mean_difference(mine, endpoints))
        if not is_last:
            return score
        further = []
        for seed in self._task.evaluation_seeds:
            further.append((yield from self._measure(draw, seed, None)))
        count = self._task.num_shown
        return replace(score, evaluations=tuple(further), samples=picture(mine, endpoints, count) if count else None)

    def _measure(self, draw: Sample, seed: int, count: int | None) -> Generator[None, None, float]:
        measuring = self._metric.measure(draw, self._shape, self._label_dim, count=count, seed=seed)
        while True:
            try:
                next(measuring)
            except StopIteration as end:
                value: float = end.value
                return value
            yield

    def _teachers(self) -> Generator[None, None, Tensor]:
        """The teacher's images on the rows compared, [N, C, H, W] on the CPU; trials share them through the cache.

        They are few beside a run's targets, so no room is reserved for them.

        Raises:
            CacheError: see `TrajectoryCache`.
            CheckpointError: the teacher's states are not finite.
        """
        if self._endpoints is None:
            store = self._teacher.store(
                identity={"endpoints": ENDPOINTS, "evaluation_seed": self._seed},
                num_rows=self._num_compared,
                shard_rows=self._num_compared,
                compute=self._compute,
            )
            for _ in store.fill(0, self._num_compared):
                yield
            self._endpoints = store.rows(0, self._num_compared)
        return self._endpoints

    def _compute(self, first: int, end: int) -> Iterator[Tensor]:
        def rows(begin: int, stop: int) -> tuple[Tensor, Tensor | None]:
            return seeds.evaluation_rows(self._seed, begin, stop, self._shape, self._label_dim)

        for _, states in self._teacher.walk(rows, first, end):
            endpoints = states[:, -1, -1]
            self._teacher.require_finite(endpoints, f"images of evaluation seed {self._seed}")
            yield endpoints.cpu()


def mean_difference(student: Tensor, teacher: Tensor) -> float:
    """Mean absolute difference over images and pixels, which span [-1, 1]; both [N, C, H, W]."""
    return float((student - teacher).abs().double().mean())


def picture(student: Tensor, teacher: Tensor, count: int) -> bytes:
    """A PNG with the student's first `count` images in a row and the teacher's below; both [N, C, H, W] in [-1, 1]."""
    pixels = readable(data.to_uint8(torch.cat([student[:count], teacher[:count]])))
    apart = torch.nn.functional.pad(pixels, (_GAP, _GAP, _GAP, _GAP), value=255)
    return grid_png(apart, columns=min(count, len(student)))
