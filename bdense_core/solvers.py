"""Solvers of the probability-flow ODE dx/dt = (x - D(x; t)) / t, as functions.

A solver is one function that makes one step, and one line in `SOLVERS`. `trajectory` walks a grid of
noise levels with it and yields every state; `solve` stacks them. They know a callable D(x; t), nothing
of networks or training. Notation of EDM (arXiv 2206.00364): t is the noise level, d = (x - D) / t.

The analytic first step (AFS, Dockhorn et al., arXiv 2210.05475) replaces the first network call: at the
largest noise level d is close to x / sqrt(1 + t^2).
"""

import difflib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from bdense_core.errors import BadValue
from bdense_core.sigmas import vp_constants, vp_time

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x; t) from x [B, C, H, W] and t, a tensor of one number, in the type and on the device of x."""

THRESHOLD_QUANTILE = 0.995  # dynamic thresholding, arXiv 2205.11487, section 2.3; value of SFD
DEIS_SIGMAS = (0.002, 80.0)  # limits of the VP process whose time DEIS integrates over
DEIS_POINTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What a step may look at: the grid, the denoiser, the options and what earlier steps left."""

    denoise: Denoise
    sigmas: tuple[float, ...]
    max_order: int
    afs: bool
    predict_x0: bool
    lower_order_final: bool
    # Directions or denoised images of up to four steps, newest first; kept by multistep solvers.
    history: deque[Tensor] = field(default_factory=lambda: deque(maxlen=4))

    def denoised(self, x: Tensor, t: float) -> Tensor:
        """D(x; t) by the network."""
        # Filled on the device: copying a number there would wait for everything queued before it.
        return self.denoise(x, torch.full((), t, dtype=x.dtype, device=x.device))

    def direction(self, x: Tensor, t: float) -> Tensor:
        """d by the network."""
        return (x - self.denoised(x, t)) / t

    def first_direction(self, x: Tensor, i: int) -> Tensor:
        """d at the start of step `i`, where the analytic first step spares the network."""
        if self.afs and i == 0:
            return x / math.sqrt(1 + self.sigmas[0] ** 2)
        return self.direction(x, self.sigmas[i])

    def first_denoised(self, x: Tensor, i: int) -> Tensor:
        """D at the start of step `i`, or the image that the analytic first step implies."""
        if self.afs and i == 0:
            return x - self.sigmas[0] * self.first_direction(x, i)
        return self.denoised(x, self.sigmas[i])


# --- one step each: from x at sigmas[i] to sigmas[i + 1] ------------------------------------------------


def euler_step(walk: Walk, i: int, x: Tensor) -> Tensor:
    """First order; the same as DDIM."""
    t, t_next = walk.sigmas[i : i + 2]
    return x + (t_next - t) * walk.first_direction(x, i)


def heun_step(walk: Walk, i: int, x: Tensor) -> Tensor:
    """Second order, trapezoid (arXiv 2206.00364, algorithm 1); two calls also in the last step."""
    t, t_next = walk.sigmas[i : i + 2]
    d = walk.first_direction(x, i)
    d_next = walk.direction(x + (t_next - t) * d, t_next)
    return x + (t_next - t) * (d + d_next) / 2


def dpm2_step(walk: Walk, i: int, x: Tensor) -> Tensor:
    """Second order, by the geometric midpoint (DPM-Solver-2, arXiv 2206.00927)."""
    t, t_next = walk.sigmas[i : i + 2]
    middle = math.sqrt(t * t_next)
    d_middle = walk.direction(x + (middle - t) * walk.first_direction(x, i), middle)
    return x + (t_next - t) * d_middle


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm_step(walk: Walk, i: int, x: Tensor) -> Tensor:
    """Adams-Bashforth with the weights of equal steps, whatever the steps are (iPNDM, arXiv 2204.13902)."""
    t, t_next = walk.sigmas[i : i + 2]
    walk.history.appendleft(walk.first_direction(x, i))
    weights = ADAMS_BASHFORTH[min(walk.max_order, i + 1) - 1]
    slope = sum_weighted(weights, walk.history)
    return x + (t_next - t) * slope


def deis_step(walk: Walk, i: int, x: Tensor) -> Tensor:
    """Adams-Bashforth with exact weights in VP time (tAB-DEIS, arXiv 2204.13902); first step Euler."""
    walk.history.appendleft(walk.first_direction(x, i))
    if i == 0 or walk.max_order == 1:
        t, t_next = walk.sigmas[i : i + 2]
        return x + (t_next - t) * walk.history[0]
    weights = deis_coefficients(walk.sigmas, walk.max_order)[i]
    return x + sum_weighted(weights[: min(walk.max_order, i + 1)], walk.history)


def dpmpp_step(walk: Walk, i: int, x: Tensor) -> Tensor:
    """Multistep DPM-Solver++ in lambda = -ln t (arXiv 2211.01095), of order up to 3.

    With `predict_x0` it extrapolates the thresholded denoised image, else the direction d.
    """
    t, t_next = walk.sigmas[i : i + 2]
    if walk.predict_x0:
        walk.history.appendleft(dynamic_threshold(walk.first_denoised(x, i)))
    else:
        walk.history.appendleft(walk.first_direction(x, i))
    order = dpmpp_order(i, len(walk.sigmas), walk.max_order, lower_order_final=walk.lower_order_final)
    h = math.log(t / t_next)
    z = -h if walk.predict_x0 else h
    p1 = math.expm1(z)
    p2 = p1 / z - 1
    p3 = p2 / z - 0.5
    total = p1 * walk.history[0]
    if order == 2:
        total = total + p1 / 2 * _first_difference(walk, i, h)
    elif order == 3:
        slope, curvature = _two_differences(walk, i, h)
        total = total + p2 * slope + p3 * curvature
    return (t_next / t) * x - total if walk.predict_x0 else x - t_next * total


def _first_difference(walk: Walk, i: int, h: float) -> Tensor:
    """h times the slope of m over the last step."""
    r0 = math.log(walk.sigmas[i - 1] / walk.sigmas[i]) / h
    return (walk.history[0] - walk.history[1]) / r0


def _two_differences(walk: Walk, i: int, h: float) -> tuple[Tensor, Tensor]:
    """h m' and h^2 m'' / 2 at the newest of three points, by divided differences.

    The Taylor expansion wants h^2 m''. Published multistep DPM-Solver++ leaves the 2 out, and a teacher
    must be the published one (shared/vectors/sfd/README.md).
    """
    r0 = math.log(walk.sigmas[i - 1] / walk.sigmas[i]) / h
    r1 = math.log(walk.sigmas[i - 2] / walk.sigmas[i - 1]) / h
    newer = (walk.history[0] - walk.history[1]) / r0
    older = (walk.history[1] - walk.history[2]) / r1
    curvature = (newer - older) / (r0 + r1)
    return newer + r0 * curvature, curvature


# --- their parts ----------------------------------------------------------------------------------------


def sum_weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum of weights[j] * tensors[j] over the given weights."""
    total = weights[0] * tensors[0]
    for j in range(1, len(weights)):
        total = total + weights[j] * tensors[j]
    return total


def dpmpp_order(i: int, num_points: int, max_order: int, *, lower_order_final: bool) -> int:
    """Order of step `i` of a grid: rising from 1 and, if wanted, falling to 1 again at the end.

    A 4-point grid has orders 1, 2, 1 and a 13-point grid 1, 2, 3, ..., 3, 2, 1 (spec/methods.md 1.5).
    """
    order = min(max_order, i + 1)
    if lower_order_final and i + 1 >= max_order:
        order = min(order, num_points - 1 - i)
    return order


def dynamic_threshold(denoised: Tensor) -> Tensor:
    """Clips each image to its 0.995 quantile of absolute values, at least 1, and scales it to [-1, 1].

    The quantile interpolates linearly between neighbours. It is taken from the few largest values,
    because `torch.quantile` refuses the size of an ImageNet batch.
    """
    flat = denoised.flatten(1).abs()  # [B, C * H * W]
    position = THRESHOLD_QUANTILE * (flat.shape[1] - 1)
    below = math.floor(position)
    largest = flat.topk(flat.shape[1] - below, dim=1).values  # falling; the last is element `below`
    low, high = largest[:, -1], largest[:, max(0, largest.shape[1] - 2)]
    limit = torch.lerp(low, high, position - below).clamp(min=1)  # [B]
    limit = limit.reshape(-1, *[1] * (denoised.dim() - 1))
    return denoised.clamp(-limit, limit) / limit


@lru_cache(maxsize=64)
def deis_coefficients(sigmas: tuple[float, ...], max_order: int) -> tuple[tuple[float, ...], ...]:
    """Weights of the newest directions in each step of tAB-DEIS, `[steps][max_order]`; step 0 is all zero.

    Integrals over the step, in VP time u, of the Lagrange polynomials through the current and earlier
    times, times d sigma / du; by a plain sum over equidistant points, as the reference does.
    """
    beta_d, beta_min = vp_constants(*DEIS_SIGMAS)
    times = [vp_time(sigma, beta_d, beta_min) for sigma in sigmas]
    rows = [(0.0,) * max_order]
    for i in range(1, len(sigmas) - 1):
        nodes = times[i::-1][:max_order]  # newest first
        u = torch.linspace(times[i], times[i + 1], DEIS_POINTS, dtype=torch.float64)
        growth = (beta_d * u**2 / 2 + beta_min * u).expm1()  # sigma^2
        rate = (beta_d * u + beta_min) * (growth + 1) / (2 * growth.sqrt())
        length = times[i + 1] - times[i]
        row = [float((_lagrange(u, nodes, j) * rate).sum()) * length / DEIS_POINTS for j in range(len(nodes))]
        rows.append((*row, *(0.0,) * (max_order - len(row))))
    return tuple(rows)


def _lagrange(u: Tensor, nodes: Sequence[float], j: int) -> Tensor:
    """The polynomial that is 1 at node j and 0 at the others."""
    value = torch.ones_like(u)
    for k, node in enumerate(nodes):
        if k != j:
            value = value * (u - node) / (nodes[j] - node)
    return value


# --- the table and the driver ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver:
    """A step function, its network calls per step, and the highest order that may be asked for."""

    step: Callable[[Walk, int, Tensor], Tensor]
    calls_per_step: int = 1
    highest_order: int | None = None  # None: the order is not a choice


SOLVERS = {
    "euler": Solver(euler_step),
    "heun": Solver(heun_step, calls_per_step=2),
    "dpm2": Solver(dpm2_step, calls_per_step=2),
    "ipndm": Solver(ipndm_step, highest_order=4),
    "deis_tab": Solver(deis_step, highest_order=4),
    "dpmpp": Solver(dpmpp_step, highest_order=3),
}


def find_solver(name: str) -> Solver:
    """The entry of that name.

    Raises:
        BadValue: no such solver; the message names the nearest.
    """
    if name not in SOLVERS:
        near = difflib.get_close_matches(name, SOLVERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SOLVERS)}"
        raise BadValue(f"solver is {name!r}; {hint}")
    return SOLVERS[name]


def network_calls(solver: str, num_steps: int, *, afs: bool = False, to_zero: bool = False) -> int:
    """Network calls of one walk over a grid of `num_steps` points: the NFE."""
    return find_solver(solver).calls_per_step * (num_steps - 1) - afs + to_zero


def trajectory(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    solver: str = "euler",
    max_order: int | None = None,
    afs: bool = False,
    predict_x0: bool = True,
    lower_order_final: bool = True,
    to_zero: bool = False,
) -> Iterator[Tensor]:
    """The states of a solver, one at a time, the given one first.

    Args:
        denoise: D(x; t).
        x: the state at `sigmas[0]`, [B, ...]; for fresh noise z that is sigmas[0] * z.
        sigmas: falling noise levels, n of them.
        solver: a name in `SOLVERS`.
        max_order: order of a multistep solver; left out, its highest.
        afs: spare the first network call.
        predict_x0: `dpmpp` extrapolates the denoised image (thresholded), not the direction.
        lower_order_final: `dpmpp` ends with lower orders.
        to_zero: one more state at the end, D(x; t) at the last level.

    Returns:
        An iterator over n states (n + 1 with `to_zero`), each shaped like `x`.

    Raises:
        BadValue: unknown solver, an order it has not, or levels that do not fall.
    """
    entry = find_solver(solver)
    levels = tuple(float(sigma) for sigma in sigmas)
    if len(levels) < 2 or any(b >= a for a, b in pairwise(levels)) or levels[-1] <= 0:
        raise BadValue(f"sigmas are {levels}; give at least two falling levels above 0")
    if max_order is not None and not 1 <= max_order <= (entry.highest_order or 0):
        allowed = f"give 1 to {entry.highest_order}" if entry.highest_order else "it has no choice of order"
        raise BadValue(f"max_order is {max_order} for solver {solver}; {allowed}")
    walk = Walk(
        denoise=denoise,
        sigmas=levels,
        max_order=max_order or entry.highest_order or 1,
        afs=afs,
        predict_x0=predict_x0,
        lower_order_final=lower_order_final,
    )
    return _states(entry, walk, x, to_zero)


def _states(entry: Solver, walk: Walk, x: Tensor, to_zero: bool) -> Iterator[Tensor]:
    yield x
    for i in range(len(walk.sigmas) - 1):
        x = entry.step(walk, i, x)
        yield x
    if to_zero:
        yield walk.denoised(x, walk.sigmas[-1])


def solve(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    solver: str = "euler",
    max_order: int | None = None,
    afs: bool = False,
    predict_x0: bool = True,
    lower_order_final: bool = True,
    to_zero: bool = False,
) -> Tensor:
    """All states of `trajectory`, with its arguments, stacked: [n, B, ...]."""
    states = trajectory(
        denoise,
        x,
        sigmas,
        solver=solver,
        max_order=max_order,
        afs=afs,
        predict_x0=predict_x0,
        lower_order_final=lower_order_final,
        to_zero=to_zero,
    )
    return torch.stack(list(states))
