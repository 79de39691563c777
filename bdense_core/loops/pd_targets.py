"""What a student of progressive distillation is matched with, batch by batch.

The first stage's targets depend on the images, the noise, the places in time and the teacher, never on the student: all
trials share them through the cache. They are kept as v = alpha eps - sigma x, which float16 rounds alike at all noise
levels: the image that v means is then wrong by sigma times as much, and the noise by alpha times. Of an image kept in
float16, the noise would be wrong by a thousand times more near the clean end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from bdense_core import seeds, vp
from bdense_core.cache import Recomputed, TrajectoryCache
from bdense_core.errors import CacheError
from bdense_core.loops.images import Images
from bdense_core.loops.pd import Steps, noisy, targets
from bdense_core.loops.teacher import FrozenTeacher
from bdense_core.methods.pd import PD
from bdense_core.networks import NetworkConfig
from bdense_core.precision import DTYPES, HalfDenoiser
from bdense_core.task import Task

TARGETS = "pd/1"
"""Changes with whatever makes targets differ that their identity does not name."""
SHARD_ROWS = 256
"""Rows in one file."""


def schedule_of(method: PD) -> vp.Schedule:
    """The noise levels of times, of which the students' steps are an even grid."""
    return vp.Linear() if method.schedule == "linear" else vp.Cosine(method.logsnr_min, method.logsnr_max)


def steps_of(method: PD, stage: int) -> Steps:
    """What a stage's student and its teacher do, stages counted from 0."""
    return Steps(
        schedule=schedule_of(method),
        num_steps=method.stage_steps[stage],
        teacher_steps=method.teacher_steps,
        num_branches=method.num_branches,
    )


@dataclass(frozen=True)
class Batch:
    """Where some steps of a student begin, B rows on the device."""

    z: Tensor
    """[B, C, H, W]."""
    index: Tensor
    """i of each step, [B]."""
    level: vp.Level
    """[B]."""
    labels: Tensor | None
    """One-hot, [B, L]."""

    def __getitem__(self, some: slice) -> "Batch":
        level = vp.Level(self.level.alpha[some], self.level.sigma[some])
        return Batch(self.z[some], self.index[some], level, None if self.labels is None else self.labels[some])

    def ask(self, network: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """What a network predicts at z, all branches [B, K, C, H, W] or one [B, C, H, W]."""
        return vp.of_exploding(lambda x, sigma: network(x, sigma, self.labels))(self.z, self.level)


def draw(images: Images, steps: Steps, seed: int, first: int, end: int) -> Batch:
    """Rows [first, end) of a training seed: an image, noise and a step each, the same in all trials."""
    x, labels = images.rows(first, end)
    eps = seeds.noise_rows(seed, "noise", first, end, x.shape[1:]).to(x.device)
    index = seeds.index_rows(seed, "steps", first, end, steps.num_steps).to(x.device)
    level = steps.level(index)
    return Batch(noisy(x, eps, level), index, level, labels)


def taught(teacher: HalfDenoiser, batch: Batch, steps: Steps) -> Tensor:
    """The image that each branch is to predict, [B, K, C, H, W]."""
    denoise = vp.of_exploding(lambda x, sigma: teacher(x, sigma, batch.labels))
    return targets(denoise, batch.z, batch.index, steps)


class FirstTargets:
    """Those of the first stage, whose teacher is the task's.

    Args:
        images: what the rows are drawn from.
        config: of the teacher.
    """

    def __init__(self, method: PD, task: Task, teacher: FrozenTeacher, images: Images, config: NetworkConfig) -> None:
        self._teacher, self._images, self._seed = teacher, images, task.seed
        self._steps, self._dtype = steps_of(method, 0), DTYPES[method.targets]
        self._store: TrajectoryCache | Recomputed = teacher.store(
            identity={
                "targets": TARGETS,
                "seed": task.seed,
                "dataset": images.digest,
                "flip": method.flip,
                "schedule": repr(schedule_of(method)),
                "start_steps": method.start_steps,
                "teacher_steps": method.teacher_steps,
                "num_branches": method.num_branches,
                "dtype": method.targets,
            },
            num_rows=method.stage_ends[0] * method.batch,
            shard_rows=SHARD_ROWS,
            compute=self._compute,
        )
        if isinstance(self._store, TrajectoryCache):
            budget = float("inf") if task.cache_budget_gb is None else task.cache_budget_gb * 1e9
            row = method.cache_bytes(config.img_channels * config.img_resolution**2) * method.num_stages
            self._store.reserve(round(row), budget_bytes=budget)

    def fill(self, first: int, end: int) -> Iterator[int]:
        """Make rows readable; yields after each piece of work.

        Raises:
            CacheError: a shard is damaged, or the folder cannot be written.
            CheckpointError: the teacher's images are not finite.
        """
        return self._store.fill(first, end)

    def rows(self, first: int, end: int, batch: Batch) -> Tensor:
        """The images that the branches are to predict in these rows, [B, K, C, H, W], after `fill`.

        Args:
            batch: the same rows.
        """
        v = self._store.rows(first, end).to(batch.z.device, batch.z.dtype)
        if v.shape[1] != self._steps.num_branches:
            raise CacheError(
                f"the teacher cache holds targets of {v.shape[1]} branches where this run needs "
                f"{self._steps.num_branches}; delete the cache's folder"
            )
        return vp.predict(v, batch.z[:, None], batch.level, mean_type="v").x

    def close(self) -> None:
        """Let the teacher and what it said go, and end the cycle that would keep them: the store's way back to here."""
        self._store = Recomputed(num_rows=0, shard_rows=SHARD_ROWS, compute=_nothing)
        self._teacher.release()

    def _compute(self, first: int, end: int) -> Iterator[Tensor]:
        for begin, stop in self._teacher.pieces(first, end):
            batch = draw(self._images, self._steps, self._seed, begin, stop)
            x = taught(self._teacher.network, batch, self._steps)
            self._teacher.require_finite(x, f"rows {begin} to {stop - 1} of seed {self._seed}")
            yield vp.predict(x, batch.z[:, None], batch.level).v.to(self._dtype).cpu()


def _nothing(first: int, end: int) -> Iterator[Tensor]:
    """What a closed store computes."""
    raise RuntimeError("the first stage has ended")
