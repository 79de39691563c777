"""How a student is scored: the metric, and its distance to the teacher on the same images."""

from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from torch import Tensor

from bdense_core import data
from bdense_core.evaluation import Metric, Sample
from bdense_core.images import grid_png, readable
from bdense_core.networks import NetworkConfig
from bdense_core.task import Score, Task

NUM_COMPARED = 256
"""Images on which the student is compared with its teacher, at most."""
_GAP = 1
"""White pixels around each image that is shown."""

Endpoints = Callable[[int], Generator[None, None, Tensor]]
"""The teacher's images on the first so many rows of the evaluation's noise, [N, C, H, W] on the CPU; yields on the
way."""


class Scorer:
    """Scores students of one run on the noise that its evaluation names.

    Args:
        config: of the teacher.
        endpoints: asked once, at the first score.

    Raises:
        BDenseError: see `Metric`.
    """

    def __init__(self, task: Task, config: NetworkConfig, endpoints: Endpoints) -> None:
        assert task.evaluation is not None
        self._task = task
        self._metric = Metric(task.evaluation, task.device)
        self._shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self._label_dim = config.label_dim
        self._seed = task.evaluation.seed
        self._num_early = task.evaluation.early_samples or task.evaluation.n_samples
        self._num_compared = min(NUM_COMPARED, self._num_early)
        self._endpoints = endpoints
        self._teachers: Tensor | None = None

    def score(self, sample: Sample, kimg: int, done: float) -> Generator[None, None, Score]:
        """Score a student in evaluation mode; its last score, at `done` = 1, has more to it.

        Args:
            sample: the student's images.

        Yields after each piece of work, for signs of life.

        Raises:
            BDenseError: images that are not finite, or a cache that cannot be used.
        """
        is_last = done >= 1
        first: list[Tensor] = []

        def draw(noise: Tensor, labels: Tensor | None) -> Tensor:
            made = sample(noise, labels)
            if (missing := self._num_compared - sum(len(images) for images in first)) > 0:
                first.append(made[:missing].cpu())
            return made

        value = yield from self.value(draw, count=None if is_last else self._num_early)
        if self._teachers is None:
            self._teachers = yield from self._endpoints(self._num_compared)
        mine = torch.cat(first)
        score = Score(kimg=kimg, value=value, done=done, surrogate=mean_difference(mine, self._teachers))
        if not is_last:
            return score
        further = []
        for seed in self._task.evaluation_seeds:
            further.append((yield from self.value(sample, seed=seed)))
        count = self._task.num_shown
        shown = picture(mine, self._teachers, count) if count else None
        return replace(score, evaluations=tuple(further), samples=shown)

    def value(
        self, sample: Sample, *, seed: int | None = None, count: int | None = None
    ) -> Generator[None, None, float]:
        """The metric alone, by default on the evaluation's own seed and number of samples."""
        measuring = self._metric.measure(
            sample, self._shape, self._label_dim, count=count, seed=self._seed if seed is None else seed
        )
        while True:
            try:
                next(measuring)
            except StopIteration as end:
                found: float = end.value
                return found
            yield


def mean_difference(student: Tensor, teacher: Tensor) -> float:
    """Mean absolute difference over images and pixels, which span [-1, 1]; both [N, C, H, W]."""
    return float((student - teacher).abs().double().mean())


def picture(student: Tensor, teacher: Tensor, count: int) -> bytes:
    """A PNG with the student's first `count` images in a row and the teacher's below; both [N, C, H, W] in [-1, 1]."""
    pixels = readable(data.to_uint8(torch.cat([student[:count], teacher[:count]])))
    apart = torch.nn.functional.pad(pixels, (_GAP, _GAP, _GAP, _GAP), value=255)
    return grid_png(apart, columns=min(count, len(student)))
