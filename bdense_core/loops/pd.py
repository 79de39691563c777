"""One step of progressive distillation, with and without branches: targets, losses, the optimizer's rules.

arXiv 2202.00512 (PD) and arXiv 2602.15971 (branches, reconstructed in spec/methods.md 1.1 and 2.2). The student makes N
steps where its teacher makes T N. In the step that begins at u = (i + 1) / N, branch k of K is taught the image with
which one step of the student gets to where the teacher is after k T / K of its T steps. K divides T; K = 1 is plain PD.
A whole run is in `pd_run`.

Letters: B samples, N, T and K as above, C x H x W pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bdense_core import vp
from bdense_core.errors import ShapeMismatch
from bdense_core.methods.pd import PD, Weighting


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A student's steps and its teacher's within them."""

    schedule: vp.Schedule
    num_steps: int
    """N."""
    teacher_steps: int
    """T."""
    num_branches: int
    """K, which divides T."""

    def times(self, index: Tensor) -> list[Tensor]:
        """u - (j / T) / N for j = 0 to T, each [B] in float64; `index` is i, 0 for the step to the clean end, [B]."""
        first = (index.double() + 1) * self.teacher_steps  # whole numbers: the clean end is exactly 0
        return [(first - j) / (self.num_steps * self.teacher_steps) for j in range(self.teacher_steps + 1)]

    def level(self, index: Tensor) -> vp.Level:
        """Where steps begin."""
        return self.schedule.at(self.times(index)[0])


def noisy(x: Tensor, eps: Tensor, level: vp.Level) -> Tensor:
    """Images [B, C, H, W] with noise: alpha x + sigma eps."""
    at = level.beside(x)
    return at.alpha * x + at.sigma * eps


@torch.no_grad()
def targets(teacher: vp.Denoise, z: Tensor, index: Tensor, steps: Steps) -> Tensor:
    """The image that each branch is to predict at z, [B, K, C, H, W].

    A step of DDIM adds (alpha' / sigma' - alpha / sigma) x to z / sigma, x being the predicted image. So one step that
    does what several do has their mean image, weighted by these differences. That is (z'' - r z) / (alpha'' - r alpha),
    r = sigma'' / sigma (arXiv 2202.00512, algorithm 2), without its small denominator. In the step to the clean end
    the last image alone counts, as there.

    Args:
        z: states at the beginning of the student's steps, [B, C, H, W].
        index: i of each, [B].
    """
    levels = [steps.schedule.at(u) for u in steps.times(index)]
    seen = torch.stack([believed.x for believed, _ in vp.ddim(teacher, z, levels)], dim=1)  # [B, T, C, H, W]
    added = torch.stack([level.alpha / level.sigma for level in levels], dim=1).diff(dim=1)  # [B, T]
    added[:, -1].masked_fill_(index == 0, torch.inf)
    return torch.stack([_mean(seen[:, :end], added[:, :end]) for end in _ends(steps)], dim=1)


def _ends(steps: Steps) -> range:
    """The teacher's step that each branch ends with, counted from 1."""
    stride = steps.teacher_steps // steps.num_branches
    return range(stride, steps.teacher_steps + 1, stride)


def _mean(images: Tensor, weights: Tensor) -> Tensor:
    """Of images [B, j, C, H, W] with weights [B, j], the last of which may be infinite."""
    shares = torch.where(weights.isinf().any(1, keepdim=True), weights.isinf().double(), weights)
    shares = (shares / shares.sum(1, keepdim=True)).to(images)
    return (images * shares[:, :, None, None, None]).sum(1)


def branch_losses(student: vp.Prediction, target: vp.Prediction, weighting: Weighting) -> Tensor:
    """The error of each branch, unweighted: a mean over pixels of squared differences, [B, K].

    Of the image (`constant`), of the noise (`snr`: SNR times as much), of v (`v_mse`: SNR + 1 times), or the larger one
    of image and noise (`snr_trunc`): arXiv 2202.00512, section 4.

    Args:
        student: of all branches at z, [B, K, C, H, W].
        target: likewise.

    Raises:
        ShapeMismatch: the two shapes differ.
    """
    if student.x.shape != target.x.shape:
        raise ShapeMismatch(
            f"predicted images are {list(student.x.shape)} but targets are {list(target.x.shape)}; "
            "student and teacher cache must share the number of branches"
        )
    if weighting == "snr_trunc":
        return torch.maximum(_error(student.x, target.x), _error(student.eps, target.eps))
    if weighting == "snr":
        return _error(student.eps, target.eps)
    if weighting == "v_mse":
        return _error(student.v, target.v)
    return _error(student.x, target.x)


def _error(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().flatten(2).mean(2)


def optimizer_for(parameters: Iterable[torch.nn.Parameter], method: PD, *, fused: bool = False) -> torch.optim.Adam:
    """Adam, or AdamW with decoupled weight decay."""
    kind = torch.optim.AdamW if method.optimizer == "adamw" else torch.optim.Adam
    return kind(
        parameters,
        lr=method.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=method.weight_decay,
        fused=True if fused else None,
    )


def learning_rate(method: PD, iteration: int, num_iterations: int) -> float:
    """The rate of an iteration of a stage, counted from 0: linear to 0 if it decays (form inferred, spec 2.1)."""
    return method.lr * (1 - iteration / num_iterations) if method.lr_decay == "linear" else method.lr


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`; the norm before.

    torch's own function adds 1e-6 to the norm, the authors' (arXiv 2202.00512) nothing.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # In float64, so that the gradient of an idle branch, which is 0, does not even change the order of rounding.
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
    norm: Tensor = torch.linalg.vector_norm(norms)
    scale = (max_norm / norm).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
    return norm
