"""SFD with and without branches: one student step per interval, matched to the teacher's states.

arXiv 2409.19681 (SFD), arXiv 2602.15971 (B-DENSE; the branch loss is inferred, spec/methods.md 1.2 and 1.3).
The steps are here; where targets come from is in `sfd_targets`, a whole run in `sfd_run`.

Letters: J intervals of the student's grid, K branches, B samples, T teacher steps per interval (K divides T).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdense_core import seeds, sigmas, solvers
from bdense_core.errors import ShapeMismatch
from bdense_core.methods.sfd import SFD
from bdense_core.networks import Denoiser
from bdense_core.precision import HalfDenoiser, Trainee

Denoise = Denoiser | HalfDenoiser


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The student's times [J+1], falling, and the branches' times [J, K] within each interval; float64."""

    student: Tensor
    inner: Tensor
    teacher: Tensor
    first_trained: int
    """1 with the analytic first step, which trains nothing; else 0."""

    @property
    def num_intervals(self) -> int:
        return len(self.student) - 1


def make_grid(method: SFD, *, num_steps: int | None = None, afs: bool = True) -> Grid:
    """The grids of SFD: of one schedule, the teacher's with T points for each interval of the student's."""
    n = method.num_steps if num_steps is None else num_steps

    shape: dict[str, Any] = {
        "schedule": method.schedule,
        "sigma_min": method.sigma_min,
        "sigma_max": method.sigma_max,
        "rho": method.rho,
    }
    student = torch.tensor(sigmas.student_grid(n, **shape), dtype=torch.float64)
    teacher = torch.tensor(sigmas.teacher_grid(n, method.steps_per_interval, **shape), dtype=torch.float64)
    stride = method.steps_per_interval // method.num_branches
    inner = teacher[1:].view(n - 1, method.steps_per_interval)[:, stride - 1 :: stride]
    return Grid(student=student, inner=inner.contiguous(), teacher=teacher, first_trained=int(afs))


@torch.no_grad()
def teacher_states(
    teacher: Denoise,
    noise: Tensor,
    grid: Grid,
    labels: Tensor | None = None,
    *,
    solver: str = "dpmpp",
    order: int | None = 3,
) -> Tensor:
    """The teacher's states at every branch time, for each row of noise.

    The authors use DPM-Solver++(3M) on x0 with thresholding and lower order at the end; never the analytic first
    step (spec 1.5).

    Args:
        noise: standard normal, [B, C, H, W]; the trajectory starts at sigma_max times it.
        labels: one-hot, [B, L], for a class-conditional teacher.

    Returns:
        [B, J, K, C, H, W].
    """
    num_intervals, num_branches = grid.inner.shape
    stride = (len(grid.teacher) - 1) // (num_intervals * num_branches)
    start = grid.teacher[0].to(noise) * noise
    states = solvers.solve(
        lambda x, t: teacher(x, t, labels), start, grid.teacher.tolist(), solver=solver, max_order=order
    )
    kept = states[stride::stride].transpose(0, 1)  # [B, J K, C, H, W]
    return kept.reshape(len(noise), num_intervals, num_branches, *noise.shape[1:])


def first_states(noise: Tensor, grid: Grid) -> Tensor:
    """Where the first trained interval begins: the noise, or the point the analytic first step reaches.

    The first direction is x / sqrt(1 + t^2), no network (spec 1.5). [B, C, H, W].
    """
    x = grid.student[0].to(noise) * noise
    if grid.first_trained:
        x = analytic_states(x, grid.student[0], grid.student[1:2])[:, 0]
    return x


def analytic_states(x: Tensor, t: Tensor, inner: Tensor) -> Tensor:
    """What `branch_states` is in the analytic first step, whose one direction serves all branches."""
    t, inner = t.to(x), inner.to(x)
    direction = x / (1 + t**2).sqrt()
    return x.unsqueeze(1) + (inner - t).view(1, -1, 1, 1, 1) * direction.unsqueeze(1)


def branch_states(student: Denoiser, x: Tensor, t: Tensor, inner: Tensor, labels: Tensor | None = None) -> Tensor:
    """One Euler step of each branch: x + (t_k - t)(x - D_k) / t (spec 1.2, inferred form).

    Args:
        x: states at level t, [B, C, H, W].
        inner: the branches' levels, [K].

    Returns:
        [B, K, C, H, W].
    """
    t, inner = t.to(x), inner.to(x)
    direction = (x.unsqueeze(1) - student.branches(x, t, labels)) / t
    return x.unsqueeze(1) + (inner - t).view(1, -1, 1, 1, 1) * direction


def branch_losses(predicted: Tensor, target: Tensor) -> Tensor:
    """Distance of each branch to the teacher's state at its own time, unweighted.

    arXiv 2602.15971, eq. 6 (inferred form, spec/methods.md 1.3).

    Args:
        predicted: student states, [B, K, C, H, W].
        target: teacher states at the same K times, [B, K, C, H, W].

    Returns:
        L1 summed over pixels, mean over the batch, [K].

    Raises:
        ShapeMismatch: the two shapes differ.
    """
    if predicted.shape != target.shape:
        raise ShapeMismatch(
            f"predicted branch states are {list(predicted.shape)} but targets are {list(target.shape)}; "
            "student and teacher cache must share grid and number of branches"
        )
    return (predicted - target).abs().flatten(2).sum(2).mean(0)


def adam(student: Denoiser, method: SFD) -> torch.optim.Adam:
    """The authors' optimizer (spec 1.2); one kernel for all weights where torch has one."""
    on_gpu = next(student.parameters()).device.type == "cuda"
    return torch.optim.Adam(
        student.parameters(), lr=method.lr, betas=(0.9, 0.999), eps=1e-8, fused=True if on_gpu else None
    )


def train_intervals(
    trainee: Trainee,
    x: Tensor,
    targets: Tensor,
    *,
    weights: Tensor,
    grid: Grid,
    labels: Tensor | None = None,
    micro_batch: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One optimizer step for each trained interval, in order: the steps happen as the iterator is read.

    The next interval starts from the endpoint that was computed before the step, detached (spec 1.5). Where float16
    overflows, the interval is computed again in float32, and so is the rest of the run.

    Args:
        x: states at the first trained interval, [B, C, H, W].
        targets: teacher states of the trained intervals, [B, J', K, C, H, W].
        weights: of all intervals [K], or of each [J', K].
        micro_batch: rows that go through the network at once, for a device with little memory; their gradients add
            up to those of the whole batch.

    Yields:
        After each step, from before it: the unweighted losses [K] and the branches' states [B, K, C, H, W].
    """
    rows = [slice(first, first + (micro_batch or len(x))) for first in range(0, len(x), micro_batch or len(x))]
    for j, here in enumerate(weights.expand(targets.shape[1], -1)):
        interval = grid.first_trained + j
        found = _gradients(trainee, x, targets[:, j], here, grid, interval, labels, rows)
        if found is None:
            trainee.fall_back()
            found = _gradients(trainee, x, targets[:, j], here, grid, interval, labels, rows)
            assert found is not None, "float32 has nothing to fall back to"
        trainee.step()
        losses, predicted = found
        x = predicted[:, -1]
        yield losses, predicted


def _gradients(
    trainee: Trainee,
    x: Tensor,
    target: Tensor,
    weights: Tensor,
    grid: Grid,
    interval: int,
    labels: Tensor | None,
    rows: Sequence[slice],
) -> tuple[Tensor, Tensor] | None:
    """The gradients of one interval, and its losses [K] and states [B, K, C, H, W]; None where float16 overflows."""
    trainee.begin()
    losses, states = torch.zeros_like(weights), []
    for some in rows:
        told = None if labels is None else labels[some]
        predicted = branch_states(trainee.network, x[some], grid.student[interval], grid.inner[interval], told)
        if trainee.precision == "float16" and not bool(predicted.isfinite().all()):
            return None
        terms = branch_losses(predicted, target[some]) * (len(predicted) / len(x))
        trainee.backward((terms * weights).sum())
        losses += terms.detach()
        states.append(predicted.detach())
    return losses, torch.cat(states) if len(states) > 1 else states[0]


def learning_rate(method: SFD, iteration: int) -> float:
    """The rate of an iteration, counted from 0: a tenth once the one before began after the drop."""
    # Rounded, as 4.014 * 1000 is a little more than 4014.
    drop = method.lr_drop_at * round(method.budget_kimg * 1000)
    dropped = iteration > 0 and (iteration - 1) * method.batch >= drop
    return method.lr / 10 if dropped else method.lr


def latents(seed: int, first: int, end: int, shape: Sequence[int]) -> Tensor:
    """Noise of trajectories [first, end) of a training seed, [end - first, C, H, W]."""
    return seeds.noise_rows(seed, "latents", first, end, shape)


def uniform_labels(seed: int, first: int, end: int, label_dim: int) -> Tensor | None:
    """One-hot classes of trajectories [first, end), uniform; None for an unconditional network."""
    return seeds.label_rows(seed, "labels", first, end, label_dim)


def sample(network: Denoise, noise: Tensor, grid: Grid, labels: Tensor | None = None) -> Tensor:
    """Images of a student's last branch: Euler on its grid with the analytic first step. [B, C, H, W]."""
    start = grid.student[0].to(noise) * noise
    with torch.no_grad():
        states = solvers.solve(
            lambda x, t: network(x, t, labels),
            start,
            grid.student.tolist(),
            solver="euler",
            afs=grid.first_trained == 1,
        )
    return states[-1]
