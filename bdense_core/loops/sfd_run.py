"""One whole distillation by SFD: train on the targets, score now and then, keep what is needed to go on."""

import base64
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense_core import seeds
from bdense_core.branches import with_branches, without_branches
from bdense_core.checkpoints import load_network, save_network
from bdense_core.devices import check_device, place
from bdense_core.errors import TrainingDiverged
from bdense_core.loops.sfd import adam, first_states, learning_rate, make_grid, train_intervals
from bdense_core.loops.sfd_rules import EVERY, make_rule
from bdense_core.loops.sfd_scores import Scorer
from bdense_core.loops.sfd_targets import TARGETS, Batch, Targets
from bdense_core.methods.sfd import SFD
from bdense_core.precision import HalfDenoiser, Trainee
from bdense_core.snapshots import Snapshots
from bdense_core.task import RESUMED, Event, Progress, Score, Task, report_steps
from bdense_core.weights import weights_at

_ALMOST = 1 - 1e-6
"""How much of a run is behind it until its last score."""
STATE = 2
"""What a snapshot of a run holds, in which form: older ones are not continued once this is raised."""


def run(method: SFD, task: Task) -> Generator[Event, None, None]:
    """Distil one student; see `Method.run`.

    With `Task.snapshots` an interrupted run goes on where its last snapshot is, and ends as an undisturbed one would:
    on the CPU bit for bit. What had been scored before is said again.
    """
    distillation = Distillation(method, task)
    with distillation.targets as targets:
        try:
            if distillation.ended and not distillation.due:
                distillation.write_student()  # a run that had ended is told again, and its file may have gone
            if distillation.iteration > 0:
                yield distillation.progress(RESUMED)
            yield from distillation.scores
            while not distillation.ended or distillation.due:
                yield from _advance(distillation, targets)
        except GeneratorExit:  # whoever closes the run may want to go on later
            distillation.keep()
            raise


def _advance(distillation: "Distillation", targets: Targets) -> Iterator[Event]:
    """A score if one is due, else an iteration."""
    if distillation.due:
        yield from distillation.score()
        if distillation.ended:
            distillation.write_student()
        distillation.keep()
        yield distillation.progress("evaluation")
        yield distillation.scores[-1]
        return
    for _ in targets.fill(distillation.iteration):
        yield distillation.progress("teacher cache")
    distillation.train(targets.batch(distillation.iteration))
    distillation.keep(unless_within_s=distillation.task.snapshot_every_s)
    yield distillation.progress("train")


class Distillation:
    """A run: the student, how far it is, and what has been found on the way; continued from its snapshot, if any."""

    def __init__(self, method: SFD, task: Task) -> None:
        assert task.teacher is not None and task.evaluation is not None
        self.method, self.task = method, task
        self.iteration = 0
        self.scores: list[Score] = []
        """All so far."""
        self._device = check_device(task.device)
        teacher = load_network(task.teacher)
        student = place(with_branches(teacher, method.num_branches), self._device).requires_grad_(True).train()
        self.config = student.config
        self._trainee = Trainee(student, adam(student, method), method.precision)
        if task.compile:
            self._trainee.network.model.compile()
        self._grid = make_grid(method)
        self._weights = self._scheduled(0.0)
        self._rule = make_rule(task.rule, method, self._grid, self._device, micro_batch=task.micro_batch)
        self.targets = Targets(method, task, self._grid, teacher.config, self._device)
        self._scorer = Scorer(task, self._grid, teacher.config, self.targets.teacher)
        self._steps = report_steps(method.budget_kimg, task.every_kimg)
        self._last_finite: float | None = None
        self._snapshots = _snapshots(method, task)
        self._resume()
        self._kept, self._kept_at = self._position, time.monotonic()

    @property
    def done(self) -> float:
        return self.iteration / self.method.num_iterations

    @property
    def ended(self) -> bool:
        return self.iteration == self.method.num_iterations

    @property
    def images(self) -> int:
        return self.iteration * self.method.batch

    @property
    def due(self) -> bool:
        """Whether a score is to come now: a large batch may pass several steps at once."""
        return bool(self._passed()) or (self.ended and (not self.scores or self.scores[-1].done < 1))

    @property
    def _position(self) -> tuple[int, int]:
        """What tells a state of this run from another one."""
        return self.iteration, len(self.scores)

    def progress(self, phase: str) -> Progress:
        """A sign of life, with whatever there is to tell about the snapshots."""
        note = self._snapshots.take_note() if self._snapshots else None
        done = min(self.done, _ALMOST)
        return Progress(kimg=self.images / 1000, done=done, phase=phase, loss=self._last_finite, note=note)

    def train(self, batch: Batch) -> None:
        """One iteration: an optimizer step for each trained interval.

        Raises:
            TrainingDiverged: a loss is not finite.
        """
        # Dropout depends on the iteration alone: nothing to keep for a run that goes on elsewhere.
        torch.manual_seed(seeds.derive(self.task.seed, "dropout", self.iteration))
        for group in self._trainee.optimizer.param_groups:
            group["lr"] = learning_rate(self.method, self.iteration)
        weights = self._weights_for(batch)
        trained = train_intervals(
            self._trainee,
            first_states(batch.noise, self._grid),
            batch.states,
            weights=weights,
            grid=self._grid,
            labels=batch.labels,
            micro_batch=self.task.micro_batch,
        )
        losses = torch.stack([terms for terms, _ in trained])  # [J', K]
        self.iteration += 1
        self._check_finite((losses * weights).sum(1).tolist())

    def score(self) -> Generator[Event, None, None]:
        """Measure the student as it is now; signs of life on the way."""
        step = self._steps[-1] if self.ended else self._passed()[-1]
        network = HalfDenoiser(self._trainee.network.eval(), self._trainee.student.eval())
        scoring = self._scorer.score(network, step, self.done)
        while True:
            try:
                next(scoring)
            except StopIteration as end:
                score: Score = end.value
                break
            yield self.progress("evaluation")
        self._trainee.network.train()
        self._trainee.student.train()
        self.scores.append(replace(score, shares=self._learned_shares()) if self.ended else score)

    def keep(self, *, unless_within_s: float = 0.0) -> None:
        """Write a snapshot, unless the last one is younger or of this very state."""
        if self._snapshots is None or self._kept == self._position:
            return
        if time.monotonic() - self._kept_at < unless_within_s:
            return
        values = {
            "scores": [_plain(score) for score in self.scores],
            "last_finite": self._last_finite,
            "precision": self._trainee.precision,
        }
        learned = self._rule.state() if self._rule else {}
        if self._snapshots.save(self.iteration, self._trainee.state() | learned, values):
            self._kept = self._position
        self._kept_at = time.monotonic()

    def write_student(self) -> None:
        """The trained student as an ordinary network of the teacher's size, if the task wants it."""
        if self.task.output is None:
            return
        assert self.task.teacher is not None
        about = {
            "method": asdict(self.method),
            "weights": list(self.task.weights),
            "schedule": self.task.schedule,
            "rule": self.task.rule,
            "seed": self.task.seed,
            "teacher_sha256": self.task.teacher.sha256,
            "scores": [[score.kimg, score.value] for score in self.scores],
            "sampler": {
                "solver": "euler",
                "afs": self._grid.first_trained == 1,
                "sigmas": self._grid.student.tolist(),
                "precision": self._trainee.precision,
            },
        }
        save_network(without_branches(self._trainee.student), Path(self.task.output), about)

    def _resume(self) -> None:
        found = self._snapshots.latest() if self._snapshots else None
        if found is None:
            return
        self.iteration = found.step
        self.scores = [_score(values) for values in found.values["scores"]]
        self._last_finite = found.values["last_finite"]
        if found.values["precision"] != self._trainee.precision:
            self._trainee.fall_back()
        self._trainee.restore(found.tensors)
        if self._rule:
            self._rule.restore(found.tensors)

    def _weights_for(self, batch: Batch) -> Tensor:
        """The weights of the coming iteration, which trains on the batch, [J', K]."""
        weights = self._scheduled(self.done) if self.task.schedule else self._weights
        if self._rule is None:
            return weights
        if self.iteration % EVERY == 0:
            self._rule.look(self._trainee.network, batch)
        return self._rule.applied(weights)

    def _scheduled(self, done: float) -> Tensor:
        """The weights as they are given, [J', K]."""
        trained = self._grid.num_intervals - self._grid.first_trained
        now = weights_at(self.task.schedule, self.task.weights, done, trained)
        return torch.tensor(now, dtype=torch.float32, device=self._device)

    def _learned_shares(self) -> tuple[float, ...]:
        """Of the branches, as the rule has them now: a mean over the trained intervals. Empty without a rule."""
        if self._rule is None:
            return ()
        weights = self._rule.applied(self._scheduled(self.done)).double()
        return tuple((weights / weights.sum(1, keepdim=True)).mean(0).tolist())

    def _passed(self) -> list[int]:
        """Steps that are behind the student and not scored yet."""
        last = self.scores[-1].kimg if self.scores else 0
        return [step for step in self._steps if last < step and step * 1000 <= self.images]

    def _check_finite(self, losses: Sequence[float]) -> None:
        """The first interval whose loss is not finite ends the run."""
        for interval, loss in enumerate(losses, start=self._grid.first_trained):
            if not math.isfinite(loss):
                raise TrainingDiverged(kimg=self.images / 1000, interval=interval, last_finite_loss=self._last_finite)
            self._last_finite = loss


def _plain(score: Score) -> dict[str, Any]:
    """A score as JSON has it."""
    samples = score.samples and base64.b64encode(score.samples).decode()
    return asdict(score) | {"samples": samples}


def _score(values: dict[str, Any]) -> Score:
    """The score that `_plain` described."""
    tuples = {name: tuple(values[name]) for name in ("evaluations", "shares", "repeats")}
    samples = values["samples"] and base64.b64decode(values["samples"])
    return Score(**values | tuples | {"samples": samples})


def _snapshots(method: SFD, task: Task) -> Snapshots | None:
    if task.snapshots is None:
        return None
    return Snapshots(Path(task.snapshots), identity=identity(method, task), required=task.snapshots_required)


def identity(method: SFD, task: Task) -> dict[str, Any]:
    """All that a run's state depends on: what a snapshot must agree with to be continued."""
    assert task.teacher is not None and task.evaluation is not None
    evaluation = task.evaluation
    return {
        "method": asdict(method),
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
        "targets": TARGETS,
        "state": STATE,
        "micro_batch": task.micro_batch,
        "compile": task.compile,
        "device": task.device.partition(":")[0],
    }
