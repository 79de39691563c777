"""DASH (arXiv 2606.00798): its loss terms and their gradients.

The update is in `dash_learner`, a whole run in `dash_run`, how a teacher learns its curriculum in `dash_teacher`.

Letters: B samples, T timesteps, L classes. Predictions are of the noise, [B, C, H, W].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdense_core import tirt
from bdense_core.discrete import DiscreteSchedule
from bdense_core.errors import BadValue, WeightsError
from bdense_core.guidance import NoisePredictor, guided, tag_weight
from bdense_core.methods.dash import DASH

AN, UN, IM = 0, 1, 2
"""The places of the terms in their order, `DASH.terms`."""


@dataclass(frozen=True)
class Batch:
    """What one update is computed from."""

    clean: Tensor
    """Images in [-1, 1], [B, C, H, W]."""
    noise: Tensor
    """Standard normal, of that shape."""
    t: Tensor
    """Timesteps, whole numbers 0 to T - 1, [B]."""
    labels: Tensor
    """One-hot, [B, L]."""

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.clean[rows], self.noise[rows], self.t[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.t)


def noised(schedule: DiscreteSchedule, batch: Batch) -> Tensor:
    """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, [B, C, H, W]."""
    share = schedule.alphas_cumprod.to(batch.t.device)[batch.t].view(-1, 1, 1, 1)
    return share.sqrt().to(batch.clean) * batch.clean + (1 - share).sqrt().to(batch.noise) * batch.noise


@dataclass(frozen=True)
class Predictions:
    """The noise that a network sees with the classes and without; None is what nobody asked."""

    cond: Tensor | None
    null: Tensor | None

    @classmethod
    def of(
        cls, network: NoisePredictor, x: Tensor, t: Tensor, labels: Tensor, *, cond: bool = True, null: bool = True
    ) -> "Predictions":
        """Both on the same noisy images, the conditional one first: its dropout does not depend on the other."""
        return cls(network(x, t, labels) if cond else None, network(x, t, None) if null else None)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: the weights of the terms, each timestep's importance, and what `im` matches."""

    weights: tuple[float, float, float]
    """Of `an`, `un` and `im`. A term without weight is not computed."""
    omega: Tensor
    """Importances, [T]."""
    kind: str = "dash"
    """See `DASH.objective`."""
    guidance: Tensor | None = None
    """Of each timestep, [T]; of the objective `composite`."""

    def __post_init__(self) -> None:
        if self.kind == "scratch" and (self.weights[AN] > 0 or self.weights[UN] > 0):
            raise WeightsError(
                f"the objective scratch has no terms but im, and weights {self.weights}; give an and un 0, or "
                "another method.objective"
            )

    @property
    def needs_null(self) -> bool:
        """Whether the networks are asked without classes."""
        return self.weights[UN] > 0 or (self.kind == "composite" and self.weights[IM] > 0)

    @property
    def matches_cond(self) -> bool:
        """Whether the teacher is asked with classes."""
        return self.kind != "scratch" and self.weights[IM] > 0

    def errors(self, student: Predictions, teacher: Predictions, batch: Batch) -> Tensor:
        """Squared error of each term and sample, a mean over pixels, unweighted; [3, B].

        an: ||eps_S(y) - eps||^2; un: ||eps_S(null) - eps_T(null)||^2; im: ||eps_S(y) - eps_T(y)||^2, or what the
        objective says. Where a prediction is missing the error is 0.
        """
        none = batch.noise.new_zeros(len(batch))
        anchor = none if student.cond is None else pixel_mse(student.cond, batch.noise)
        null = none
        if student.null is not None and teacher.null is not None:
            null = pixel_mse(student.null, teacher.null)
        return torch.stack([anchor, null, self._imitation(student, teacher, batch)])

    def _imitation(self, student: Predictions, teacher: Predictions, batch: Batch) -> Tensor:
        if self.kind == "scratch" and student.cond is not None:
            return pixel_mse(student.cond, batch.noise)
        if student.cond is None or teacher.cond is None:
            return batch.noise.new_zeros(len(batch))
        if self.kind == "dash":
            return pixel_mse(student.cond, teacher.cond)
        assert self.guidance is not None and student.null is not None and teacher.null is not None
        w = self.guidance[batch.t].view(-1, 1, 1, 1)
        return pixel_mse(guided(student.cond, student.null, w), guided(teacher.cond, teacher.null, w))


def pixel_mse(one: Tensor, other: Tensor) -> Tensor:
    """Mean over pixels of the squared difference, [B]."""
    return (one - other).square().flatten(1).mean(1)


def accumulate(
    student: NoisePredictor,
    teacher: NoisePredictor,
    batch: Batch,
    objective: Objective,
    schedule: DiscreteSchedule,
    *,
    micro_batch: int | None = None,
) -> Tensor:
    """Add the gradient of a batch's loss to the student's parameters; returns the terms, unweighted, [3].

    Each is the mean over the batch of its errors times the importance of their timesteps, which are normalised over
    the whole batch. The loss is their weighted sum.

    Args:
        micro_batch: rows that go through the networks at once; their gradients add up to those of the whole batch.
    """
    weights = batch.clean.new_tensor(objective.weights)
    omega = tirt.batch_weights(objective.omega[batch.t])
    terms = batch.clean.new_zeros(3)
    ask_cond = objective.weights[AN] + objective.weights[IM] > 0
    rows_at_once = micro_batch or len(batch)
    for first in range(0, len(batch), rows_at_once):
        rows = slice(first, first + rows_at_once)
        some = batch[rows]
        x = noised(schedule, some)
        ask = {"cond": ask_cond, "null": objective.needs_null}
        with torch.no_grad():
            ask_teacher = {"cond": objective.matches_cond, "null": objective.needs_null}
            theirs = Predictions.of(teacher, x, some.t, some.labels, **ask_teacher)
        errors = objective.errors(Predictions.of(student, x, some.t, some.labels, **ask), theirs, some)
        part = (errors * omega[rows]).sum(1) / len(batch)
        (part * weights).sum().backward()  # type: ignore[no-untyped-call]
        terms += part.detach()
    return terms


def importance(method: DASH, schedule: DiscreteSchedule, logits: Sequence[float] | None) -> Tensor:
    """The curriculum of a student, one importance for each timestep, [T], float32.

    Args:
        logits: that its teacher has learned; None if it has none.

    Raises:
        BadValue: the method wants the teacher's, and there are none, or not T of them.
    """
    snr = schedule.snr
    if method.curriculum == "uniform":
        return torch.ones_like(snr).float()
    if method.curriculum == "min_snr":
        return tirt.min_snr(snr, gamma=method.gamma).float()
    if method.curriculum == "clipped_snr":
        return tirt.clipped_snr(snr, gamma=method.gamma).float()
    if logits is None or len(logits) != len(snr):
        found = "none" if logits is None else f"{len(logits)} logits"
        raise BadValue(
            f"method.curriculum is {method.curriculum}, but the teacher has {found} of the {len(snr)} that TIRT "
            "learns; choose uniform, min_snr or clipped_snr, or a teacher trained with TIRT"
        )
    tau = method.tau if method.curriculum == "tirt_tempered" else 1.0
    return tirt.tirt(snr, torch.tensor(logits, dtype=snr.dtype), gamma=method.gamma, tau=tau).float()


def guidance_table(method: DASH, num_times: int) -> Tensor:
    """The weight of guidance at each timestep, [T], float32."""
    if not method.tag:
        return torch.full((num_times,), method.guidance)
    limits = {"w_min": method.tag_min, "w_max": method.guidance, "beta": method.tag_beta}
    return torch.tensor([tag_weight(t, num_times, **limits) for t in range(num_times)], dtype=torch.float32)
