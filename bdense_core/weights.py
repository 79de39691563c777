"""Branch weights: how much each of a student's K branches counts in the loss.

arXiv 2602.15971, eq. 8: log-linear weights w_k = exp(a k + b). Only plain floats here, so that export and
report start without torch.
"""

import math
from collections.abc import Sequence
from typing import Literal

from bdense_core.errors import WeightsError

MIN_INTERCEPT = -5.0
"""The lower end of b: below it an fp16 gradient underflows (the paper's b >= -5)."""

PAPER_BEST = (1.386, -4.274)
"""(a, b) of the first row of Table 4, arXiv 2602.15971: K = 4, target space "state", SFD at NFE 2."""

Weights = tuple[float, ...]

Schedule = tuple[tuple[Weights, ...], ...]
"""Weights that differ over time or between intervals, `[times][intervals][K]`.

The times are evenly spaced from the first image to the last; between two of them the weights' logarithms are
interpolated, the weights themselves where one of the two is 0. One interval stands for all. Empty: the same weights
everywhere.
"""

Rule = Literal["fixed", "gate", "meta"]
"""Whether weights stay as they are given, or are learned in training (experimental, see `loops.sfd_rules`)."""
RULES: tuple[Rule, ...] = ("gate", "meta")
"""Those that learn."""


def log_linear(a: float, b: float, num_branches: int, *, index_origin: int = 0) -> Weights:
    """K weights exp(a k + b), k counted from `index_origin`.

    arXiv 2602.15971, eq. 8. The paper does not state the origin; its Table 4 sums to about 1 with 0
    (spec: inferred), and under Adam the origin makes no difference.

    Raises:
        WeightsError: no branch, or a weight that is not finite.
    """
    if num_branches < 1:
        raise WeightsError(f"weights need at least one branch, got {num_branches}; set method.num_branches")
    try:
        weights = tuple(math.exp(a * (k + index_origin) + b) for k in range(num_branches))
    except OverflowError:
        weights = (math.inf,)
    return checked(weights)


def uniform(num_branches: int) -> Weights:
    """K equal weights that sum to 1."""
    return (1.0 / num_branches,) * num_branches


def endpoint_only(num_branches: int) -> Weights:
    """All weight on the last branch: plain SFD or plain progressive distillation."""
    return (0.0,) * (num_branches - 1) + (1.0,)


def checked(weights: Sequence[float]) -> Weights:
    """The weights as a tuple.

    Raises:
        WeightsError: empty, negative, not finite, or all zero.
    """
    values = tuple(float(w) for w in weights)
    if not values:
        raise WeightsError("the list of branch weights is empty; give one weight for each branch")
    if not all(math.isfinite(w) and w >= 0 for w in values):
        raise WeightsError(f"branch weights must be finite and >= 0, got {list(values)}; choose a smaller |a|")
    if sum(values) == 0:
        raise WeightsError(f"all {len(values)} branch weights are 0; at least the endpoint's must be positive")
    return values


def weights_at(schedule: Schedule, weights: Weights, done: float, num_intervals: int) -> tuple[Weights, ...]:
    """The weights of each trained interval when `done` of 1.0 of a run is behind it, `[intervals][K]`.

    Args:
        schedule: if empty, `weights` hold everywhere.

    Raises:
        WeightsError: `done` lies outside [0, 1], or the schedule has another number of intervals or branches.
    """
    if not schedule:
        return (weights,) * num_intervals
    if not 0 <= done <= 1:
        raise WeightsError(f"a schedule runs from 0 to 1, not to {done:g}")
    knots = [_of_intervals(knot, len(weights), num_intervals) for knot in schedule]
    position = done * (len(knots) - 1)
    before = min(int(position), max(len(knots) - 2, 0))
    first, second = knots[before], knots[min(before + 1, len(knots) - 1)]
    return tuple(
        tuple(_between(u, v, position - before) for u, v in zip(early, late, strict=True))
        for early, late in zip(first, second, strict=True)
    )


def _of_intervals(knot: tuple[Weights, ...], num_branches: int, num_intervals: int) -> tuple[Weights, ...]:
    """One time of a schedule, a row for each interval."""
    rows = knot * num_intervals if len(knot) == 1 else knot
    if len(rows) != num_intervals or any(len(row) != num_branches for row in rows):
        raise WeightsError(
            f"a schedule has a time with rows of {[len(row) for row in knot]} weights, but the student has "
            f"{num_intervals} trained intervals of {num_branches} branches; give one row for each interval, or one"
        )
    return tuple(checked(row) for row in rows)


def _between(early: float, late: float, part: float) -> float:
    """Geometric interpolation; linear from or to 0, which has no logarithm. Equal ends give exactly that."""
    if early == late:
        return early
    if min(early, late) == 0:
        return early + (late - early) * part
    return float(early ** (1 - part) * late**part)


def shares(weights: Sequence[float]) -> Weights:
    """Weights divided by their sum: what matters under Adam, which cancels a common factor."""
    values = checked(weights)
    total = math.fsum(values)
    return tuple(w / total for w in values)
