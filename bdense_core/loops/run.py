"""A whole distillation, whatever the method: train, score now and then, keep what is needed to go on.

A method's own run says what an iteration is, how its student is scored, and what its state is.
"""

import base64
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense_core import seeds
from bdense_core.checkpoints import save_network
from bdense_core.errors import TrainingDiverged
from bdense_core.methods.base import Method
from bdense_core.networks import Denoiser
from bdense_core.snapshots import Snapshot, Snapshots
from bdense_core.task import RESUMED, Event, Progress, Score, Task

_ALMOST = 1 - 1e-6
"""How much of a run is behind it until its last score."""

Losses = Sequence[tuple[int | None, float]]
"""Of one iteration, in their order: the trained interval, if the method has such, and the loss there."""


class Run(ABC):
    """A student on its way: how far it is, and what has been found; continued from its snapshot, if there is one.

    With `Task.snapshots` an interrupted run goes on where its last snapshot is, and ends as an undisturbed one would:
    on the CPU bit for bit. What had been scored before is said again.

    Args:
        batch: images of an iteration.
        work: what an iteration costs beside one with fixed weights. The budget, and the kimg at which the student is
            scored, count in the latter.
        formats: the versions of whatever a snapshot holds; one of other versions is not continued.
    """

    def __init__(
        self, method: Method, task: Task, *, batch: int, num_iterations: int, formats: dict[str, Any], work: float = 1.0
    ) -> None:
        self.method, self.task = method, task
        self.batch, self.num_iterations, self.work = batch, num_iterations, work
        self.iteration = 0
        self.scores: list[Score] = []
        """All so far."""
        self._steps = method.steps(task.every_kimg)
        self._last_finite: float | None = None
        self._snapshots = _snapshots(method, task, formats)
        self._kept: tuple[int, int] | None = None
        self._kept_at = time.monotonic()

    # -- what a method supplies

    def prepare(self) -> Iterator[str]:
        """Work before an iteration, such as asking the teacher: the name of the phase after each piece."""
        return iter(())

    @abstractmethod
    def train(self) -> Losses:
        """The iteration `self.iteration`. Torch's own generator is seeded for it."""

    @abstractmethod
    def measure(self, step: int) -> Generator[None, None, Score]:
        """The score at `step` kimg of the student as it is now, `self.done` of the run behind it; yields on the way."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able values that the run goes on from; a snapshot has `iteration` and `scores` besides."""

    @abstractmethod
    def restore(self, found: Snapshot) -> None:
        """Go back to a `state`; `self.iteration` is that of the snapshot already."""

    @abstractmethod
    def student(self) -> tuple[Denoiser, dict[str, Any]]:
        """The student as an ordinary network, and the sampler that it is for (see `sampling.sampler_of`)."""

    # -- how far it is

    @property
    def done(self) -> float:
        return self.iteration / self.num_iterations

    @property
    def ended(self) -> bool:
        return self.iteration == self.num_iterations

    @property
    def images(self) -> int:
        return self.iteration * self.batch

    @property
    def kimg(self) -> float:
        """What it has used of its budget."""
        return self.images * self.work / 1000

    @property
    def due(self) -> bool:
        """Whether a score is to come now: a large batch may pass several steps at once."""
        return bool(self._passed()) or (self.ended and (not self.scores or self.scores[-1].done < 1))

    def progress(self, phase: str) -> Progress:
        """A sign of life, with whatever there is to tell about the snapshots."""
        note = self._snapshots.take_note() if self._snapshots else None
        done = min(self.done, _ALMOST)
        return Progress(kimg=self.kimg, done=done, phase=phase, loss=self._last_finite, note=note)

    # -- what it does

    def events(self) -> Generator[Event, None, None]:
        """The whole run, or what is left of it; see `Method.run`."""
        try:
            if self.ended and not self.due:
                self.write_student()  # a run that had ended is told again, and its file may have gone
            if self.iteration > 0:
                yield self.progress(RESUMED)
            yield from self.scores
            while not self.ended or self.due:
                yield from self._advance()
        except GeneratorExit:  # whoever closes the run may want to go on later
            self.keep()
            raise

    def _advance(self) -> Iterator[Event]:
        """A score if one is due, else an iteration."""
        if self.due:
            yield from self.score()
            if self.ended:
                self.write_student()
            self.keep()
            yield self.progress("evaluation")
            yield self.scores[-1]
            return
        for phase in self.prepare():
            yield self.progress(phase)
        self.advance()
        self.keep(unless_within_s=self.task.snapshot_every_s)
        yield self.progress("train")

    def advance(self) -> None:
        """One iteration, after `prepare`.

        Raises:
            TrainingDiverged: a loss is not finite.
        """
        # Dropout depends on the iteration alone: nothing to keep for a run that goes on elsewhere.
        torch.manual_seed(seeds.derive(self.task.seed, "dropout", self.iteration))
        losses = self.train()
        self.iteration += 1
        for interval, loss in losses:
            if not math.isfinite(loss):
                raise TrainingDiverged(kimg=self.kimg, interval=interval, last_finite_loss=self._last_finite)
            self._last_finite = loss

    def score(self) -> Generator[Progress, None, None]:
        """Measure the student as it is now; signs of life on the way."""
        measuring = self.measure(self._steps[-1] if self.ended else self._passed()[-1])
        while True:
            try:
                next(measuring)
            except StopIteration as end:
                self.scores.append(end.value)
                return
            yield self.progress("evaluation")

    def keep(self, *, unless_within_s: float = 0.0) -> None:
        """Write a snapshot, unless the last one is younger or of this very state."""
        position = (self.iteration, len(self.scores))
        if self._snapshots is None or self._kept == position:
            return
        if time.monotonic() - self._kept_at < unless_within_s:
            return
        tensors, values = self.state()
        values |= {"scores": [_plain(score) for score in self.scores], "last_finite": self._last_finite}
        if self._snapshots.save(self.iteration, tensors, values):
            self._kept = position
        self._kept_at = time.monotonic()

    def resume(self) -> None:
        """Go back to the newest snapshot, if there is one: the last thing that the making of a run does."""
        found = self._snapshots.latest() if self._snapshots else None
        if found is not None:
            self.iteration = found.step
            self.scores = [_score(values) for values in found.values["scores"]]
            self._last_finite = found.values["last_finite"]
            self.restore(found)
        self._kept, self._kept_at = (self.iteration, len(self.scores)), time.monotonic()

    def write_student(self) -> None:
        """The trained student as a file, if the task wants it."""
        if self.task.output is None:
            return
        network, sampler = self.student()
        about = {
            "method": asdict(self.method),  # type: ignore[call-overload]
            "weights": list(self.task.weights),
            "schedule": self.task.schedule,
            "rule": self.task.rule,
            "seed": self.task.seed,
            "teacher_sha256": self.task.teacher.sha256 if self.task.teacher else None,
            "scores": [[score.kimg, score.value] for score in self.scores],
            "sampler": sampler,
        }
        save_network(network, Path(self.task.output), about)

    def _passed(self) -> list[int]:
        """Steps that are behind the student and not scored yet."""
        last = self.scores[-1].kimg if self.scores else 0
        return [step for step in self._steps if last < step and step * 1000 <= self.images * self.work]


def _plain(score: Score) -> dict[str, Any]:
    """A score as JSON has it."""
    samples = score.samples and base64.b64encode(score.samples).decode()
    return asdict(score) | {"samples": samples}


def _score(values: dict[str, Any]) -> Score:
    """The score that `_plain` described."""
    tuples = {name: tuple(values[name]) for name in ("evaluations", "shares", "repeats")}
    samples = values["samples"] and base64.b64decode(values["samples"])
    return Score(**values | tuples | {"samples": samples})


def _snapshots(method: Method, task: Task, formats: dict[str, Any]) -> Snapshots | None:
    if task.snapshots is None:
        return None
    described = identity(method, task) | formats
    return Snapshots(Path(task.snapshots), identity=described, required=task.snapshots_required)


def identity(method: Method, task: Task) -> dict[str, Any]:
    """All that a run's state depends on: what a snapshot must agree with to be continued."""
    assert task.teacher is not None and task.evaluation is not None
    evaluation = task.evaluation
    described = {
        "method": asdict(method),  # type: ignore[call-overload]
        "weights": list(task.weights),
        "schedule": task.schedule,
        "rule": task.rule,
        "seed": task.seed,
        "every_kimg": task.every_kimg,
        "teacher_sha256": task.teacher.sha256,
        "protocol": evaluation.protocol.to_dict(),
        "evaluation_seed": evaluation.seed,
        "evaluation_seeds": task.evaluation_seeds,
        "early_samples": evaluation.early_samples,
        "num_shown": task.num_shown,
        "micro_batch": task.micro_batch,
        "compile": task.compile,
        "device": task.device.partition(":")[0],
    }
    return described | ({"dataset": task.dataset} if task.dataset else {})
