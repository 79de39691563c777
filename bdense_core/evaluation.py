"""The score of a student: a Fréchet distance of generated images to shipped reference statistics.

The noise depends on the evaluation's seed alone, so all trials of a study are scored on the same noise, and
small differences between them show (spec/fid.md).
"""

import math
from collections.abc import Callable, Generator
from pathlib import Path

from torch import Tensor

from bdense_core import data, seeds
from bdense_core.errors import EvaluationError
from bdense_core.features import FeatureNetwork, load_features
from bdense_core.frechet import FeatureStatistics, Statistics, frechet_distance, load_statistics
from bdense_core.task import Evaluation

Sample = Callable[[Tensor, Tensor | None], Tensor]
"""Images [B, C, H, W] in [-1, 1] from standard normal noise [B, C, H, W] and one-hot labels, if any."""


class Metric:
    """The distance an `Evaluation` describes; `protocol` says what its values may be compared with.

    Raises:
        CheckpointError: the feature network's file is missing or altered.
        EvaluationError: the reference is missing, altered, or made with other features; or the metric
            is not named after its features.
    """

    def __init__(self, evaluation: Evaluation, device: str = "cpu") -> None:
        self.evaluation = evaluation
        self.device = device
        self._features = load_features(evaluation.features, device)
        self._reference = load_statistics(Path(evaluation.reference.path), sha256=evaluation.reference.sha256)
        self.protocol = evaluation.protocol
        self._check()

    def _check(self) -> None:
        if self._reference.features != self._features.identity:
            raise EvaluationError(
                f"the reference {self.evaluation.reference.path} was made with features "
                f"{self._reference.features}, but the evaluation uses {self._features.identity}; "
                "give the reference made with these features"
            )
        if self.evaluation.features_name != self._features.name:
            raise EvaluationError(
                f"the evaluation calls its features {self.evaluation.features_name!r}, but "
                f"{self.evaluation.features.path} holds those called {self._features.name!r}; name them so"
            )
        if self.evaluation.n_samples < 2 or self.evaluation.batch < 1:
            raise EvaluationError(
                f"evaluation.n_samples is {self.evaluation.n_samples} and evaluation.batch "
                f"{self.evaluation.batch}; give at least 2 images and 1 a batch"
            )
        early = self.evaluation.early_samples
        if early is not None and not 2 <= early <= self.evaluation.n_samples:
            raise EvaluationError(
                f"evaluation.early_samples is {early}; give 2 to {self.evaluation.n_samples}, which is "
                "evaluation.n_samples, or leave it out"
            )

    def __call__(self, sample: Sample, shape: tuple[int, ...], label_dim: int) -> float:
        """`measure`, run to its end."""
        measuring = self.measure(sample, shape, label_dim)
        while True:
            try:
                next(measuring)
            except StopIteration as end:
                return float(end.value)

    def measure(
        self,
        sample: Sample,
        shape: tuple[int, ...],
        label_dim: int,
        *,
        count: int | None = None,
        seed: int | None = None,
    ) -> Generator[int, None, float]:
        """The distance of generated images to the reference, lower is better.

        Args:
            sample: asked for the images in their order, a batch at a time.
            shape: of one image, (C, H, W).
            label_dim: classes of a class-conditional network, drawn uniformly; 0 for none.
            count: images; fewer than the evaluation's `n_samples`, the default, are the first of them.
            seed: of the noise; by default the evaluation's own.

        Yields:
            After each batch, how many images there are so far.

        Raises:
            EvaluationError: images or a distance that are not finite.
        """
        count = self.evaluation.n_samples if count is None else count
        seed = self.evaluation.seed if seed is None else seed
        seen = FeatureStatistics(self._features.identity)
        for first in range(0, count, self.evaluation.batch):
            end = min(first + self.evaluation.batch, count)
            noise, labels = seeds.evaluation_rows(seed, first, end, shape, label_dim)
            images = sample(noise.to(self.device), None if labels is None else labels.to(self.device))
            if not bool(images.isfinite().all()):
                raise EvaluationError(
                    f"images {first} to {end - 1} of evaluation seed {seed} are not all finite; "
                    "the student has diverged: lower method.lr or change the weights"
                )
            seen.update(self._features(data.to_uint8(images)))
            yield end
        return self.distance(seen.finish())

    def distance(self, statistics: Statistics) -> float:
        """Of statistics by these features to the reference.

        Raises:
            EvaluationError: it is not finite.
        """
        value = frechet_distance(statistics, self._reference)
        if not math.isfinite(value):
            raise EvaluationError(f"{self.evaluation.protocol.metric} of {statistics.n_samples} images is {value}")
        return value


def reference_statistics(images: Tensor, features: FeatureNetwork, *, batch: int = 500) -> Statistics:
    """Statistics of real images [N, C, H, W] in [-1, 1], marked with the features that made them."""
    seen = FeatureStatistics(features.identity)
    for first in range(0, len(images), batch):
        seen.update(features(data.to_uint8(images[first : first + batch])))
    return seen.finish()
