"""One whole progressive distillation: stage by stage, each student the next one's teacher."""

from abc import abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bdense_core import vp
from bdense_core.branches import freeze, with_branches, without_branches
from bdense_core.checkpoints import load_network
from bdense_core.devices import check_device, place
from bdense_core.errors import BadValue
from bdense_core.loops.images import Images
from bdense_core.loops.pd import branch_losses, clip_gradients, learning_rate, optimizer_for
from bdense_core.loops.pd_targets import TARGETS, Batch, FirstTargets, draw, schedule_of, steps_of, taught
from bdense_core.loops.run import Losses, Run
from bdense_core.loops.scoring import Scorer
from bdense_core.loops.teacher import Endpoints, FrozenTeacher
from bdense_core.methods.pd import PD
from bdense_core.networks import Denoiser, NetworkConfig, build
from bdense_core.precision import HalfDenoiser, Trainee, in_precision
from bdense_core.sampling import DDIMSampler
from bdense_core.snapshots import Snapshot
from bdense_core.task import Event, Score, Task
from bdense_core.weights import shares, weights_at

STATE = 1
"""What a snapshot of a run holds, in which form: older ones are not continued once this is raised."""
ENDPOINTS = "pd/1"
"""Changes with whatever makes the teacher's endpoints differ that their identity does not name."""
_TEACHER = "teacher."


def run(method: PD, task: Task) -> Generator[Event, None, None]:
    """Distil one student; see `Method.run`.

    Raises:
        BadValue: a rule that learns weights, or data that do not fit the teacher.
    """
    if task.rule != "fixed":
        raise BadValue(f"the rule {task.rule} learns weights in SFD alone; leave it out of experimental")
    if method.untrained:
        yield from TeacherAlone(method, task).events()
        return
    distillation = Distillation(method, task)
    try:
        yield from distillation.events()
    finally:
        distillation.close()


def sampler_for(method: PD, num_steps: int) -> DDIMSampler:
    """DDIM in so many steps, its images clipped: in sampling alone, as the authors' (spec/methods.md 2.1)."""
    grid = schedule_of(method).grid(num_steps)
    levels = tuple(float(level.in_exploding) for level in grid)
    return DDIMSampler(sigmas=levels, clip=True, precision=method.precision)


class TeacherEndpoints(Endpoints):
    """The images of the first teacher, by as many steps as it has."""

    def __init__(self, method: PD, task: Task, config: NetworkConfig, teacher: FrozenTeacher) -> None:
        self._sampler = sampler_for(method, method.start_steps)
        super().__init__(task, config, teacher, {"endpoints": ENDPOINTS, "sigmas": list(self._sampler.sigmas)})
        self._asked = teacher

    def _images(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        return self._sampler(self._asked.network, noise, labels)


class _Staged(Run):
    """What a run has in common with its teacher's own: a score at the end of each stage."""

    def __init__(self, method: PD, task: Task, config: NetworkConfig, **how: Any) -> None:
        super().__init__(method, task, **how)
        assert task.evaluation is not None
        self._method = method
        self._has_early_scores = task.evaluation.early_samples is not None
        self._device = check_device(task.device)
        self._teacher = FrozenTeacher(task, method.precision, self._device)
        self.config = config
        self._scorer = Scorer(task, config, TeacherEndpoints(method, task, config, self._teacher))

    def measure(self, step: int) -> Generator[None, None, Score]:
        """The score of the stage that ends here, with the metric of all stages so far, on all samples."""
        network, stage = self._sampled(), self._steps.index(step)
        sampler = sampler_for(self._method, self._method.stage_steps[stage])

        def sample(noise: Tensor, labels: Tensor | None) -> Tensor:
            return sampler(network, noise, labels)

        score = yield from self._scorer.score(sample, step, self.done)
        value = score.value
        if self._has_early_scores and not self.ended:
            value = yield from self._scorer.value(sample)
        earlier = self.scores[-1].metrics if self.scores else {}
        return replace(score, metrics=earlier | {list(self._method.metrics())[stage]: value})

    def student(self) -> tuple[Denoiser, dict[str, Any]]:
        return without_branches(self._sampled().full), sampler_for(self._method, self._method.nfe).to_dict()

    @abstractmethod
    def _sampled(self) -> HalfDenoiser:
        """The network that is scored."""


class TeacherAlone(_Staged):
    """The unmodified teacher at the students' numbers of steps: a stage is an iteration in which nothing happens."""

    def __init__(self, method: PD, task: Task) -> None:
        assert task.teacher is not None
        super().__init__(
            method,
            task,
            load_network(task.teacher).config,
            batch=method.stage_kimg * 1000,
            num_iterations=method.num_stages,
            formats={"state": STATE},
        )
        self.resume()

    def train(self) -> Losses:
        return ()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, found: Snapshot) -> None:
        pass

    def _sampled(self) -> HalfDenoiser:
        return self._teacher.network


class Distillation(_Staged):
    """A run of progressive distillation."""

    def __init__(self, method: PD, task: Task) -> None:
        assert task.teacher is not None
        teacher = load_network(task.teacher)
        super().__init__(
            method,
            task,
            teacher.config,
            batch=method.batch,
            num_iterations=method.stage_ends[-1],
            formats={"targets": TARGETS, "state": STATE},
        )
        self._images = Images(task, self.config, self._device, flip=method.flip)
        self._targets = FirstTargets(method, task, self._teacher, self._images, self.config)
        self._enter(0, teacher)
        self.resume()

    def close(self) -> None:
        """Let the teacher go."""
        self._targets.close()

    def prepare(self) -> Iterator[str]:
        if self.iteration == self._method.stage_ends[self._stage]:
            self._enter(self._stage + 1, without_branches(self._trainee.student))
        if self._stage == 0:
            for _ in self._targets.fill(*self._rows):
                yield "teacher cache"

    def train(self) -> Losses:
        """An optimizer step towards what several of the teacher's steps do."""
        batch = draw(self._images, self._steps_of_stage, self.task.seed, *self._rows)
        target = self._targets_of(batch)
        for group in self._trainee.optimizer.param_groups:
            group["lr"] = self._rate()
        weights = self._weights()
        losses = self._gradients(batch, target, weights)
        self._trainee.step()
        return [(None, float((losses * weights).sum()))]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = self._trainee.state()
        if self._stage:
            tensors |= {f"{_TEACHER}{name}": tensor for name, tensor in self._promoted.full.state_dict().items()}
        return tensors, {"stage": self._stage}

    def restore(self, found: Snapshot) -> None:
        if stage := found.values["stage"]:
            teacher = build(self.config)
            state = {name.removeprefix(_TEACHER): t for name, t in found.tensors.items() if name.startswith(_TEACHER)}
            teacher.load_state_dict(state)
            self._enter(stage, teacher)
        self._trainee.restore(found.tensors)

    def _sampled(self) -> HalfDenoiser:
        return HalfDenoiser(self._trainee.network, self._trainee.student)

    @property
    def _rows(self) -> tuple[int, int]:
        """Of the coming iteration."""
        return self.iteration * self.batch, (self.iteration + 1) * self.batch

    def _enter(self, stage: int, teacher: Denoiser) -> None:
        """Begin a stage: a student that is its teacher's copy, and an optimizer that has seen nothing.

        In the first one the task's own teacher is asked, through the cache.
        """
        method = self._method
        self._stage, self._steps_of_stage = stage, steps_of(method, stage)
        # In evaluation mode: the authors train students without dropout (spec 2.1).
        student = place(with_branches(teacher, method.num_branches), self._device).requires_grad_(True).eval()
        optimizer = optimizer_for(student.parameters(), method, fused=self._device.type == "cuda")

        def limit(*_: object) -> None:
            clip_gradients(student.parameters(), method.clip_norm)

        optimizer.register_step_pre_hook(limit)
        self._trainee = Trainee(student, optimizer, method.precision)
        if stage:
            self._targets.close()
            full = place(freeze(teacher), self._device)
            self._promoted = HalfDenoiser(in_precision(full, method.precision), full)
        if self.task.compile:
            self._trainee.network.model.compile()
            if stage:
                self._promoted.half.model.compile()

    def _rate(self) -> float:
        begin, end = (0, *self._method.stage_ends)[self._stage : self._stage + 2]
        return learning_rate(self._method, self.iteration - begin, end - begin)

    def _weights(self) -> Tensor:
        """Of the coming iteration, [K]. Their sum is 1: clipping would give it a meaning that Adam does not."""
        now = shares(weights_at(self.task.schedule, self.task.weights, self.done, 1)[0])
        return torch.tensor(now, device=self._device)

    def _targets_of(self, batch: Batch) -> Tensor:
        """The image that each branch is to predict, [B, K, C, H, W]."""
        if self._stage == 0:
            return self._targets.rows(*self._rows, batch)
        return taught(self._promoted, batch, self._steps_of_stage)

    def _gradients(self, batch: Batch, target: Tensor, weights: Tensor) -> Tensor:
        """The gradients of an iteration, and its unweighted losses [K]."""
        trainee, losses = self._trainee, torch.zeros_like(weights)
        trainee.begin()
        size = self.task.micro_batch or len(batch.z)
        for some in (slice(first, first + size) for first in range(0, len(batch.z), size)):
            part = batch[some]
            x = part.ask(trainee.network.branches)
            z = part.z[:, None]
            errors = branch_losses(
                vp.predict(x, z, part.level), vp.predict(target[some], z, part.level), self._method.weighting
            )
            terms = errors.sum(0) / len(batch.z)
            trainee.backward((terms * weights).sum())
            losses += terms.detach()
        return losses
