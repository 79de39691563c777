"""What numbers can say: intervals, paired differences, rank correlations, and how good luck looks. No studies here."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats, with the same functions, takes a second to import

LEVEL = 0.95
"""Coverage of every interval: two-sided, and for one interval alone."""

_FEWEST_RANKED = 4
"""Of fewer points a rank correlation has no interval."""
_QUANTILES = 300
"""Midpoints that stand for a distribution in `chance_of_best`, which errs by less than 0.001 so."""


@dataclass(frozen=True)
class Interval:
    """A mean with Student's interval. Of a single value, low and high are infinite and sd is not a number."""

    mean: float
    low: float
    high: float
    sd: float
    """Of a single value, not of the mean."""
    count: int
    level: float = LEVEL


def mean_interval(values: Iterable[float]) -> Interval:
    """The mean of independent values and its two-sided interval; not a number if there are none."""
    numbers = np.fromiter(values, dtype=float)
    count = len(numbers)
    if count == 0:
        return Interval(math.nan, -math.inf, math.inf, math.nan, 0)
    mean = float(numbers.mean())
    if count == 1:
        return Interval(mean, -math.inf, math.inf, math.nan, 1)
    sd = float(numbers.std(ddof=1))
    half = float(special.stdtrit(count - 1, (1 + LEVEL) / 2)) * sd / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, sd, count)


def paired(first: dict[int, float], second: dict[int, float]) -> Interval:
    """The mean of first - second over the seeds that both have, and its interval: what both share cancels."""
    return mean_interval(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys()))


def chance_of_no_gain(difference: Interval) -> float:
    """One-sided p-value: how often a mean so far above 0, or farther, comes about where the true one is 0.

    Student's t for the mean of `difference.count` independent values; 1 of fewer than two.
    """
    if difference.count < 2:
        return 1.0
    if difference.sd == 0:
        return 0.0 if difference.mean > 0 else 1.0
    t = difference.mean / (difference.sd / math.sqrt(difference.count))
    return float(special.stdtr(difference.count - 1, -t))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: rejecting those <= alpha errs at all in at most a share alpha of cases.

    Holm, Scandinavian Journal of Statistics 6 (1979); it needs no independence.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Deviation:
    """A standard deviation of single values, and how many degrees of freedom it was estimated with."""

    sd: float
    df: int


def summed(parts: Sequence[Deviation]) -> Deviation:
    """Of the sum of independent noises, with the degrees of freedom of Satterthwaite (Biometrics 2, 1946), cut down."""
    variances = [part.sd**2 for part in parts]
    total = math.fsum(variances)
    if total == 0:
        return Deviation(0.0, sum(part.df for part in parts))
    df = total**2 / math.fsum(variance**2 / part.df for variance, part in zip(variances, parts, strict=True))
    return Deviation(math.sqrt(total), max(1, int(df + 1e-9)))


def pooled_deviation(groups: Iterable[Sequence[float]]) -> Deviation | None:
    """Within groups, each around its own mean; None where no group has two values."""
    arrays = [np.asarray(group, dtype=float) for group in groups]
    df = sum(len(values) - 1 for values in arrays if len(values) > 1)
    if df == 0:
        return None
    return Deviation(math.sqrt(sum(float(((values - values.mean()) ** 2).sum()) for values in arrays) / df), df)


def residual_deviation(table: Sequence[Sequence[float]]) -> Deviation | None:
    """Of a complete table, what is left when the means of rows and columns are taken out (two-way layout).

    None where it has fewer than two rows or columns.
    """
    values = np.asarray(table, dtype=float)
    df = (values.shape[0] - 1) * (values.shape[1] - 1) if values.ndim == 2 else 0
    if df < 1:
        return None
    left = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + values.mean()
    return Deviation(math.sqrt(float((left**2).sum()) / df), df)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with an interval at `LEVEL`."""

    rho: float
    low: float
    high: float
    count: int


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> Correlation | None:
    """How far two scores order the same things alike; None below 4 things, or where a score is the same for all.

    The interval is Fisher's with the variance of Bonett and Wright, Psychometrika 65 (2000). A perfect order has
    none there, so rho enters it at most half a step below 1, a step being two neighbours exchanged.
    """
    count = len(xs)
    if count < _FEWEST_RANKED or min(len(set(xs)), len(set(ys))) < 2:
        return None
    rho = float(np.corrcoef(ranks(xs), ranks(ys))[0, 1])
    limit = 1 - 6 / (count**3 - count)
    centre = math.atanh(max(-limit, min(limit, rho)))
    half = float(special.ndtri((1 + LEVEL) / 2)) * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return Correlation(rho, min(rho, math.tanh(centre - half)), max(rho, math.tanh(centre + half)), count)


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the lowest; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks: list[float] = (counts.cumsum() - (counts - 1) / 2)[place].tolist()
    return mean_ranks


def chance_of_best(gain: float, sd: float, df: int, num_trials: int) -> float:
    """How often the best of N weightings that are all as good as the rival looks at least `gain` better than it.

    Each run is its truth plus independent normal noise, whose standard deviation was estimated as `sd` with `df`
    degrees of freedom; the N differences share the rival's own draw. This is Dunnett's one-sided distribution
    (J. Amer. Statist. Assoc. 50, 1955), P(z_0 + max z_i >= (gain / sd) u), u^2 = chi^2_df / df, integrated over
    quantiles of z_0 and u. Without noise (`sd` 0) it is whether the gain is 0 or less.
    """
    if sd == 0:
        return float(gain <= 0)
    quantiles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    spread = np.sqrt(2 * special.gammaincinv(df / 2, quantiles) / df)[:, None]
    rival = special.ndtri(quantiles)[None, :]
    all_below = special.ndtr(gain / sd * spread - rival) ** num_trials
    return float(1 - all_below.mean())
