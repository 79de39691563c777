"""One whole distillation by SFD."""

import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bdense_core.branches import with_branches, without_branches
from bdense_core.checkpoints import load_network
from bdense_core.devices import check_device, place
from bdense_core.loops.run import Losses, Run
from bdense_core.loops.scoring import Scorer
from bdense_core.loops.sfd import adam, first_states, learning_rate, make_grid, sample, train_intervals
from bdense_core.loops.sfd_rules import EVERY, make_rule, relative_work
from bdense_core.loops.sfd_scores import TeacherEndpoints
from bdense_core.loops.sfd_targets import TARGETS, Batch, Targets
from bdense_core.methods.sfd import SFD
from bdense_core.networks import Denoiser
from bdense_core.precision import HalfDenoiser, Trainee
from bdense_core.snapshots import Snapshot
from bdense_core.task import Event, Score, Task
from bdense_core.weights import weights_at

STATE = 3
"""What a snapshot of a run holds, in which form: older ones are not continued once this is raised."""


def run(method: SFD, task: Task) -> Generator[Event, None, None]:
    """Distil one student; see `Method.run`."""
    distillation = Distillation(method, task)
    with distillation.targets:
        yield from distillation.events()


class Distillation(Run):
    """A run of SFD."""

    def __init__(self, method: SFD, task: Task) -> None:
        assert task.teacher is not None
        work = relative_work(task.rule, method.num_branches)
        super().__init__(
            method,
            task,
            batch=method.batch,
            num_iterations=max(1, int(method.num_iterations / work)),
            formats={"targets": TARGETS, "state": STATE} | ({"work": work} if work > 1 else {}),
            work=work,
        )
        self._method = method
        self._device = check_device(task.device)
        teacher = load_network(task.teacher)
        student = place(with_branches(teacher, method.num_branches), self._device).requires_grad_(True).train()
        self.config = student.config
        self._trainee = Trainee(student, adam(student, method), method.precision)
        if task.compile:
            self._trainee.network.model.compile()
        self._grid = make_grid(method)
        self._weights = self._scheduled(0.0)
        num_looks = math.ceil(self.num_iterations / EVERY)
        self._rule = make_rule(
            task.rule, method, self._grid, self._device, micro_batch=task.micro_batch, num_looks=num_looks
        )
        self.targets = Targets(method, task, self._grid, teacher.config, self._device)
        endpoints = TeacherEndpoints(task, teacher.config, self.targets.teacher)
        self._scorer = Scorer(task, teacher.config, endpoints)
        self.resume()

    def prepare(self) -> Iterator[str]:
        for _ in self.targets.fill(self.iteration):
            yield "teacher cache"

    def train(self) -> Losses:
        """An optimizer step for each trained interval."""
        batch = self.targets.batch(self.iteration)
        for group in self._trainee.optimizer.param_groups:
            group["lr"] = learning_rate(self._method, int(self.iteration * self.work))
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
        return list(enumerate((losses * weights).sum(1).tolist(), start=self._grid.first_trained))

    def measure(self, step: int) -> Generator[None, None, Score]:
        network = HalfDenoiser(self._trainee.network.eval(), self._trainee.student.eval())
        score = yield from self._scorer.score(
            lambda noise, labels: sample(network, noise, self._grid, labels), step, self.done
        )
        self._trainee.network.train()
        self._trainee.student.train()
        return replace(score, shares=self._learned_shares()) if self.ended else score

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        learned = self._rule.state() if self._rule else {}
        return self._trainee.state() | learned, {"precision": self._trainee.precision}

    def restore(self, found: Snapshot) -> None:
        if found.values["precision"] != self._trainee.precision:
            self._trainee.fall_back()
        self._trainee.restore(found.tensors)
        if self._rule:
            self._rule.restore(found.tensors)

    def student(self) -> tuple[Denoiser, dict[str, Any]]:
        sampler = {
            "solver": "euler",
            "afs": self._grid.first_trained == 1,
            "sigmas": self._grid.student.tolist(),
            "precision": self._trainee.precision,
        }
        return without_branches(self._trainee.student), sampler

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
