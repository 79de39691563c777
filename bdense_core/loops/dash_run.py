"""One whole distillation by DASH."""

import dataclasses
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from bdense_core import data, seeds
from bdense_core.devices import check_device, place
from bdense_core.errors import BadValue
from bdense_core.guidance import GuidedSampler, noise_predictor, schedule_of
from bdense_core.integrity import read_metadata
from bdense_core.loops.dash import IM, Objective, Predictions, accumulate, guidance_table, importance, noised
from bdense_core.loops.dash_data import Examples
from bdense_core.loops.dash_gap import gap_metrics, gap_rows
from bdense_core.loops.dash_learner import Learner, cosine_rate
from bdense_core.loops.run import Losses, Run
from bdense_core.loops.scoring import Scorer
from bdense_core.loops.teacher import Endpoints, FrozenTeacher
from bdense_core.methods.dash import DASH, sampling_name
from bdense_core.network_config import NetworkConfig
from bdense_core.networks import Denoiser, build
from bdense_core.snapshots import Snapshot
from bdense_core.task import Event, Score, Task
from bdense_core.weights import Weights, weights_at

STATE = 1
"""What a snapshot of a run holds, in which form: older ones are not continued once this is raised."""
ENDPOINTS = "dash/1"
"""Changes with whatever makes the teacher's images differ that their identity does not name."""


def run(method: DASH, task: Task) -> Generator[Event, None, None]:
    """Distil one student; see `Method.run`."""
    yield from Distillation(method, task).events()


class Distillation(Run):
    """A run of DASH: a student of its own size, from random weights.

    Raises:
        BadValue: a teacher that does not fit the method or the data, a student that is too large, or a rule that
            would learn the weights.
    """

    def __init__(self, method: DASH, task: Task) -> None:
        assert task.teacher is not None and task.evaluation is not None
        super().__init__(
            method, task, batch=method.batch, num_iterations=method.num_iterations, formats={"state": STATE}
        )
        if task.rule != "fixed":
            raise BadValue(f"space.rule is {task.rule}, but the weights of DASH are not learned; leave it out")
        self._method, self._evaluation_seed = method, task.evaluation.seed
        self._device = check_device(task.device)
        asked = FrozenTeacher(task, "float32", self._device)  # `noise_predictor` knows the method's precision
        self._teacher = asked.network.full
        for name, parameter in self._teacher.named_parameters():
            asked.require_finite(parameter, f"its weights {name} are not")
        self._schedule = schedule_of(self._teacher.config)
        self._examples = _examples(task, self._teacher.config, method.held_out, self._device)
        self.config = student_config(method, self._teacher.config)
        self._learner = self._new_learner()
        if task.compile:
            self._learner.network.model.compile()
        logits = read_metadata(task.teacher.path).get("about", {}).get("tirt")
        self._omega = importance(method, self._schedule, logits).to(self._device)
        self._guidance = guidance_table(method, self._schedule.num_steps).to(self._device)
        self._scorer = Scorer(task, self._teacher.config, TeacherImages(task, asked, sampler_for(method)))
        self.resume()

    def train(self) -> Losses:
        """One update on images, noise and timesteps that follow from the training seed."""
        method = self._method
        batch = self._examples.batch(
            self.task.seed, self.iteration, size=method.batch, num_times=self._schedule.num_steps
        )
        weights = relative(weights_at(self.task.schedule, self.task.weights, self.done, 1)[0])
        objective = Objective(weights=weights, omega=self._omega, kind=method.objective, guidance=self._guidance)
        terms = accumulate(
            noise_predictor(self._learner.network, method.precision),
            noise_predictor(self._teacher, method.precision),
            batch,
            objective,
            self._schedule,
            micro_batch=self.task.micro_batch,
        )
        epoch = self._examples.epoch(self.images)
        num_epochs = self._examples.epoch(self.num_iterations * method.batch - 1) + 1
        self._learner.step(cosine_rate(method.lr, method.lr_min, epoch, num_epochs))
        return [(None, sum(w * term for w, term in zip(weights, terms.tolist(), strict=True)))]

    def measure(self, step: int) -> Generator[None, None, Score]:
        student, method = self._learner.average, self._method
        score = yield from self._scorer.score(sampler_for(method).bind(student), step, self.done)
        if not self.ended:
            return score
        metrics = yield from self._gap(student)
        for also in method.also_sampled:
            sample = sampler_for(method.sampled_at(also)).bind(student)
            metrics[sampling_name(also)] = yield from self._scorer.value(sample)
        return dataclasses.replace(score, metrics=metrics)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._learner.state(), {}

    def restore(self, found: Snapshot) -> None:
        self._learner.restore(found.tensors)

    def student(self) -> tuple[Denoiser, dict[str, Any]]:
        return self._learner.average, sampler_for(self._method).to_dict()

    def _new_learner(self) -> Learner[Denoiser]:
        method = self._method
        torch.manual_seed(seeds.derive(self.task.seed, "student", "weights"))
        return Learner(
            place(build(self.config), self._device).train(),
            lr=method.lr,
            weight_decay=method.weight_decay,
            ema=method.ema,
            grad_clip=method.grad_clip,
        )

    @torch.no_grad()
    def _gap(self, student: Denoiser) -> Generator[None, None, dict[str, float]]:
        """What the student has kept of the guidance gap, on the same held-out pairs in all trials."""
        mine, theirs = (noise_predictor(network, self._method.precision) for network in (student, self._teacher))
        rows = []
        for batch in self._examples.pairs(
            self._evaluation_seed, self._method.num_pairs, num_times=self._schedule.num_steps
        ):
            asked = noised(self._schedule, batch), batch.t, batch.labels
            rows.append(gap_rows(Predictions.of(mine, *asked), Predictions.of(theirs, *asked)))
            yield
        return gap_metrics(torch.cat(rows))


class TeacherImages(Endpoints):
    """The teacher's own guided images, which the student's are compared with."""

    def __init__(self, task: Task, teacher: FrozenTeacher, sampler: GuidedSampler) -> None:
        network = teacher.network.full
        identity = {"endpoints": ENDPOINTS, "sampler": sampler.to_dict()}
        super().__init__(task, network.config, teacher, identity)
        self._sample = sampler.bind(network)

    def _images(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        return self._sample(noise, labels)


def relative(weights: Weights) -> tuple[float, float, float]:
    """Weights with that of `im` as 1: the gradient's limit then means the same whatever their common factor.

    Without `im` the largest is 1.
    """
    an, un, im = (weight / (weights[IM] or max(weights)) for weight in weights)
    return an, un, im


def sampler_for(method: DASH) -> GuidedSampler:
    """How the method's students make images."""
    return GuidedSampler(
        num_steps=method.sampling_steps,
        guidance=method.guidance,
        tag_min=method.tag_min if method.tag else None,
        tag_beta=method.tag_beta,
        eta=method.eta,
        clip=method.clip,
        precision=method.precision,
    )


def student_config(method: DASH, teacher: NetworkConfig) -> NetworkConfig:
    """The student's network, which is of a size that is allowed.

    Raises:
        BadValue: a width that no such network has, or more parameters than `method.max_parameters`.
    """
    config = method.student_network(teacher)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(config).parameters())
    if method.max_parameters is not None and size > method.max_parameters:
        raise BadValue(
            f"a student of {method.student_channels} channels and {method.student_blocks} blocks has {size} "
            f"parameters, more than method.max_parameters ({method.max_parameters}); make it smaller or raise it"
        )
    return config


def _examples(task: Task, config: NetworkConfig, held_out: float, device: torch.device) -> Examples:
    if task.dataset is None:
        raise BadValue("DASH trains on images and the study names none; set dataset")
    return Examples(*data.load_bytes(task.dataset), config, held_out=held_out, device=device)
