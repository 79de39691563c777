"""SFD with and without branches: one student step per interval, matched to the teacher's states.

arXiv 2409.19681 (SFD), arXiv 2602.15971 (B-DENSE; the branch loss is inferred, spec/methods.md 1.2 and 1.3).

Letters: J intervals of the student's grid, K branches, B samples, T teacher steps per interval (K divides T).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdense_core import seeds, sigmas, solvers
from bdense_core.branches import freeze, with_branches
from bdense_core.cache import TrajectoryCache
from bdense_core.checkpoints import load_network
from bdense_core.errors import ShapeMismatch, TrainingDiverged
from bdense_core.evaluation import Metric
from bdense_core.methods.sfd import SFD
from bdense_core.networks import Denoiser
from bdense_core.task import Event, Progress, Score, Task, report_steps

_SHARD_ROWS = 1024
_PROGRESS_EVERY = 8
"""Iterations between two signs of life."""


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
    """The grids of SFD: polynomial, the teacher's with T points for each interval of the student's."""
    n = method.num_steps if num_steps is None else num_steps

    def levels(num_points: int) -> Tensor:
        grid = sigmas.polynomial(num_points, sigma_min=method.sigma_min, sigma_max=method.sigma_max, rho=method.rho)
        return torch.tensor(grid, dtype=torch.float64)

    student, teacher = levels(n), levels(method.steps_per_interval * (n - 1) + 1)
    stride = method.steps_per_interval // method.num_branches
    inner = teacher[1:].view(n - 1, method.steps_per_interval)[:, stride - 1 :: stride]
    return Grid(student=student, inner=inner.contiguous(), teacher=teacher, first_trained=int(afs))


@torch.no_grad()
def teacher_states(
    teacher: Denoiser, noise: Tensor, grid: Grid, labels: Tensor | None = None, *, order: int = 3
) -> Tensor:
    """The teacher's states at every branch time, for each row of noise.

    DPM-Solver++(3M) on x0 with thresholding, lower order at the end, never the analytic first step
    (spec 1.5).

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
        lambda x, t: teacher(x, t, labels), start, grid.teacher.tolist(), solver="dpmpp", max_order=order
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
    """The authors' optimizer (spec 1.2)."""
    return torch.optim.Adam(student.parameters(), lr=method.lr, betas=(0.9, 0.999), eps=1e-8)


def train_intervals(
    student: Denoiser,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    targets: Tensor,
    *,
    weights: Tensor,
    grid: Grid,
    labels: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One optimizer step for each trained interval, in order: the steps happen as the iterator is read.

    The next interval starts from the endpoint that was computed before the step, detached (spec 1.5).

    Args:
        x: states at the first trained interval, [B, C, H, W].
        targets: teacher states of the trained intervals, [B, J', K, C, H, W].
        weights: [K].

    Yields:
        After each step, from before it: the unweighted losses [K] and the branches' states [B, K, C, H, W].
    """
    for j in range(targets.shape[1]):
        interval = grid.first_trained + j
        predicted = branch_states(student, x, grid.student[interval], grid.inner[interval], labels)
        terms = branch_losses(predicted, targets[:, j])
        optimizer.zero_grad(set_to_none=True)
        (terms * weights).sum().backward()  # type: ignore[no-untyped-call]
        _repair_gradients(student)
        optimizer.step()
        predicted = predicted.detach()
        x = predicted[:, -1]
        yield terms.detach(), predicted


def _repair_gradients(student: Denoiser) -> None:
    """As the authors: NaN gradients count as 0, infinite ones as 1e5."""
    for parameter in student.parameters():
        if parameter.grad is not None:
            torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)


def learning_rate(method: SFD, iteration: int) -> float:
    """The rate of an iteration, counted from 0: a tenth once the one before began after the drop."""
    dropped = iteration > 0 and (iteration - 1) * method.batch >= method.lr_drop_at * method.budget_kimg * 1000
    return method.lr / 10 if dropped else method.lr


def latents(seed: int, first: int, end: int, shape: Sequence[int]) -> Tensor:
    """Noise of trajectories [first, end) of a training seed, [end - first, C, H, W]."""
    return seeds.noise_rows(seed, "latents", first, end, shape)


def uniform_labels(seed: int, first: int, end: int, label_dim: int) -> Tensor | None:
    """One-hot classes of trajectories [first, end), uniform; None for an unconditional network."""
    return seeds.label_rows(seed, "labels", first, end, label_dim)


def sample(network: Denoiser, noise: Tensor, grid: Grid, labels: Tensor | None = None) -> Tensor:
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


def run(method: SFD, task: Task) -> Iterator[Event]:
    """Distil one student; see `Method.run`."""
    assert task.teacher is not None and task.evaluation is not None
    teacher = freeze(load_network(task.teacher)).to(task.device)
    student = with_branches(teacher, method.num_branches).requires_grad_(True)
    metric = Metric(task.evaluation, task.device)
    grid = make_grid(method)
    shape = (student.config.img_channels, student.config.img_resolution, student.config.img_resolution)
    cache = _cache(method, task, teacher, grid, shape)
    weights = torch.tensor(task.weights, dtype=torch.float32, device=task.device)
    optimizer = adam(student, method)
    torch.manual_seed(seeds.derive(task.seed, "dropout"))

    def score(step: int, done: float) -> Score:
        student.eval()
        value = metric(lambda noise, labels: sample(student, noise, grid, labels), shape, student.config.label_dim)
        student.train()
        return Score(kimg=step, value=value, done=done)

    student.train()
    total = method.num_iterations
    steps = list(report_steps(method.budget_kimg, task.every_kimg))
    last_finite: float | None = None
    for iteration in range(total):
        first, end = iteration * method.batch, (iteration + 1) * method.batch
        for _ in cache.fill(end):
            yield Progress(kimg=first / 1000, done=iteration / total, phase="teacher cache")
        noise = latents(task.seed, first, end, shape).to(task.device)
        labels = uniform_labels(task.seed, first, end, student.config.label_dim)
        targets = cache.rows(first, end).to(task.device, torch.float32)
        optimizer.param_groups[0]["lr"] = learning_rate(method, iteration)
        trained = train_intervals(
            student, optimizer, first_states(noise, grid), targets, weights=weights, grid=grid, labels=labels
        )
        losses = torch.stack([terms for terms, _ in trained])  # [J', K]
        weighted = (losses * weights).sum(1).tolist()
        last_finite = _finite_loss(weighted, grid, end / 1000, last_finite)
        if iteration % _PROGRESS_EVERY == 0:
            yield Progress(kimg=end / 1000, done=iteration / total, phase="train", loss=last_finite)
        if end >= steps[0] * 1000 or iteration == total - 1:
            # A large batch may pass several steps at once; the last score is always that of the whole budget.
            passed = steps if iteration == total - 1 else [step for step in steps if step * 1000 <= end]
            steps = steps[len(passed) :]
            yield score(passed[-1], (iteration + 1) / total)


def _finite_loss(losses: Sequence[float], grid: Grid, kimg: float, last: float | None) -> float:
    """The last of an iteration's losses; the first interval whose loss is not finite ends the run."""
    for interval, loss in enumerate(losses, start=grid.first_trained):
        if not math.isfinite(loss):
            raise TrainingDiverged(kimg=kimg, interval=interval, last_finite_loss=last)
        last = loss
    assert last is not None
    return last


def _cache(method: SFD, task: Task, teacher: Denoiser, grid: Grid, shape: tuple[int, int, int]) -> TrajectoryCache:
    def compute(first: int, end: int) -> Tensor:
        noise = latents(task.seed, first, end, shape).to(task.device)
        labels = uniform_labels(task.seed, first, end, teacher.config.label_dim)
        states = teacher_states(teacher, noise, grid, labels, order=method.solver_order)
        return states[:, grid.first_trained :].cpu()  # [rows, J', K, C, H, W]

    assert task.teacher is not None
    identity = {
        "targets": "sfd/1", "teacher": task.teacher.sha256, "seed": task.seed, "solver": method.solver,
        "order": method.solver_order, "teacher_grid": grid.teacher.tolist(),
        "num_branches": method.num_branches, "first_trained": grid.first_trained, "dtype": "float32",
        "num_rows": method.num_iterations * method.batch,
    }  # fmt: skip
    return TrajectoryCache(
        Path(task.cache_root),
        identity=identity,
        num_rows=method.num_iterations * method.batch,
        shard_rows=_SHARD_ROWS,
        compute=compute,
    )
