"""Noise-level grids: decreasing tuples of sigma, computed in double precision, without torch.

A grid of `num_steps` points has `num_steps - 1` intervals. SFD's student walks a grid from 80 to 0.006
(spec/methods.md 1.5); its teacher walks the same rule with K - 1 points inserted in every interval.
"""

import difflib
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

from bdense_core.errors import BadValue

SIGMA_MAX = 80.0
SIGMA_MIN = 0.006  # SFD's own choice; EDM's is 0.002
RHO = 7.0
VP_TIME_MIN = 0.001  # VP time of sigma_min in `time_uniform`; sigma_max is at time 1

Grid = tuple[float, ...]


def polynomial(num_steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> Grid:
    """sigma^(1/rho) linear in the index: arXiv 2206.00364, eq. 5, without its final zero."""
    _check(num_steps, sigma_min, sigma_max, rho)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return tuple((high + s * (low - high)) ** rho for s in _fractions(num_steps))


def logsnr(num_steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Grid:
    """ln sigma linear in the index."""
    _check(num_steps, sigma_min, sigma_max)
    high, low = math.log(sigma_max), math.log(sigma_min)
    return tuple(math.exp(high + s * (low - high)) for s in _fractions(num_steps))


def time_uniform(
    num_steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Grid:
    """u^(1/rho) linear in the index, u the time of the VP process that spans the two limits."""
    _check(num_steps, sigma_min, sigma_max, rho)
    beta_d, beta_min = vp_constants(sigma_min, sigma_max)
    low = VP_TIME_MIN ** (1 / rho)
    return tuple(vp_sigma((1 + s * (low - 1)) ** rho, beta_d, beta_min) for s in _fractions(num_steps))


def discrete(
    num_steps: int, *, sigma_min: float, sigma_max: float, alphas_cumprod: Sequence[float], rho: float = 1.0
) -> Grid:
    """u^(1/rho) linear in the index, u the time of a network trained at N discrete times.

    ln alpha is interpolated linearly between the times 1/N, 2/N, ..., 1 of the alpha-bars and extended
    beyond them. The reference takes the root of the low end only; for rho other than 1 this differs
    from it unless sigma_max is the table's largest.
    """
    _check(num_steps, sigma_min, sigma_max, rho)
    if any(later >= earlier for earlier, later in pairwise(alphas_cumprod)) or len(alphas_cumprod) < 2:
        raise BadValue("alphas_cumprod must be at least two strictly falling numbers; check the table")
    times = [(j + 1) / len(alphas_cumprod) for j in range(len(alphas_cumprod))]
    # Minus ln alpha, so that it rises with time; ln(1 + sigma^2) = -2 ln alpha in both directions.
    decay = [-0.5 * math.log(a) for a in alphas_cumprod]
    first, last = (_interpolate(0.5 * math.log1p(s**2), decay, times) for s in (sigma_max, sigma_min))
    high, low = first ** (1 / rho), last ** (1 / rho)
    us = ((high + s * (low - high)) ** rho for s in _fractions(num_steps))
    return tuple(math.sqrt(math.expm1(2 * _interpolate(u, times, decay))) for u in us)


# Schedules that need only the two limits; `discrete` also needs a table and is called by itself.
SCHEDULES: dict[str, Callable[..., Grid]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
}


def student_grid(
    num_steps: int,
    *,
    schedule: str = "polynomial",
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Grid:
    """The levels a student visits, `num_steps` points. `rho` has no meaning for `logsnr`."""
    if schedule not in SCHEDULES:
        near = difflib.get_close_matches(schedule, SCHEDULES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SCHEDULES)}"
        raise BadValue(f"schedule is {schedule!r}; {hint}")
    shape = {} if schedule == "logsnr" else {"rho": rho}
    return SCHEDULES[schedule](num_steps, sigma_min=sigma_min, sigma_max=sigma_max, **shape)


def teacher_grid(
    num_steps: int,
    num_branches: int,
    *,
    schedule: str = "polynomial",
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Grid:
    """The same rule with K intervals in each student interval: K (num_steps - 1) + 1 points.

    Every K-th point is a student point, to the last bit: both are computed from the same quotient.
    """
    _check(num_steps, sigma_min, sigma_max, rho)
    if num_branches < 1:
        raise BadValue(f"num_branches is {num_branches}; give at least 1")
    points = num_branches * (num_steps - 1) + 1
    return student_grid(points, schedule=schedule, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def nfe_of(num_steps: int, *, afs: bool = True) -> int:
    """Network calls of a one-call solver such as Euler; an analytic first step counts none."""
    return num_steps - 1 - afs


def num_steps_of(nfe: int, *, afs: bool = True) -> int:
    """Grid points that give `nfe` network calls: the inverse of `nfe_of`.

    Raises:
        BadValue: fewer than one call.
    """
    if nfe < 1:
        raise BadValue(f"nfe is {nfe}; a sampler needs at least one network call")
    return nfe + 1 + afs


def vp_constants(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """beta_d and beta_min of the VP process with sigma(1) = sigma_max, sigma(0.001) = sigma_min.

    arXiv 2206.00364, table 1: ln(1 + sigma^2) = beta_d u^2 / 2 + beta_min u.
    """
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / VP_TIME_MIN - high) / (VP_TIME_MIN - 1)
    return beta_d, high - beta_d / 2


def vp_sigma(u: float, beta_d: float, beta_min: float) -> float:
    """The noise level of the VP process at time u."""
    return math.sqrt(math.expm1(beta_d * u**2 / 2 + beta_min * u))


def vp_time(sigma: float, beta_d: float, beta_min: float) -> float:
    """The inverse of `vp_sigma`."""
    return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(sigma**2)) - beta_min) / beta_d


def _fractions(num_steps: int) -> list[float]:
    return [i / (num_steps - 1) for i in range(num_steps)]


def _interpolate(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear through rising `xs`, its end segments extended."""
    right = min(max(bisect_left(xs, at), 1), len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (at - x0) * (y1 - y0) / (x1 - x0)


def _check(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> None:
    if num_steps < 2:
        raise BadValue(f"num_steps is {num_steps}; a grid needs at least 2 points")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise BadValue(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; they must rise from above 0")
    if not 0 < rho < math.inf:
        raise BadValue(f"rho is {rho}; give a positive number")
