"""The teacher's images that a student of SFD is compared with."""

from collections.abc import Generator, Iterator

from torch import Tensor

from bdense_core import seeds
from bdense_core.loops.sfd_teacher import Teacher
from bdense_core.networks import NetworkConfig
from bdense_core.task import Task

ENDPOINTS = "sfd/1"
"""Changes with whatever makes the teacher's endpoints differ that their identity does not name."""


class TeacherEndpoints:
    """Where the teacher's trajectories end on an evaluation's noise; trials share them through the cache.

    They are few beside a run's targets, so no room is reserved for them.

    Args:
        config: of the teacher.
    """

    def __init__(self, task: Task, config: NetworkConfig, teacher: Teacher) -> None:
        assert task.evaluation is not None
        self._teacher = teacher
        self._seed = task.evaluation.seed
        self._shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self._label_dim = config.label_dim

    def __call__(self, count: int) -> Generator[None, None, Tensor]:
        """See `scoring.Endpoints`.

        Raises:
            CacheError: see `TrajectoryCache`.
            CheckpointError: the teacher's states are not finite.
        """
        store = self._teacher.store(
            identity={"endpoints": ENDPOINTS, "evaluation_seed": self._seed},
            num_rows=count,
            shard_rows=count,
            compute=self._compute,
        )
        for _ in store.fill(0, count):
            yield
        return store.rows(0, count)

    def _compute(self, first: int, end: int) -> Iterator[Tensor]:
        def rows(begin: int, stop: int) -> tuple[Tensor, Tensor | None]:
            return seeds.evaluation_rows(self._seed, begin, stop, self._shape, self._label_dim)

        for _, states in self._teacher.walk(rows, first, end):
            endpoints = states[:, -1, -1]
            self._teacher.require_finite(endpoints, f"images of evaluation seed {self._seed}")
            yield endpoints.cpu()
