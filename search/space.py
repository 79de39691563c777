"""What is searched: named axes, and the map from a proposal's parameters to branch weights.

Knows nothing of Optuna; adding a family of weights is one class here and one member of `SearchSpace`.

Endpoint only, which is the method without branches, is the limit of every family (a -> infinity) and a point of none:
every study runs it as a control.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import count, pairwise, takewhile
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from bdense_core.errors import BadValue
from bdense_core.weights import MIN_INTERCEPT, Schedule, Weights, checked, log_linear, shares

Params = Mapping[str, Any]
"""Values of the axes by name. Others may stand beside them, of the settings that a study tunes."""
Axes = dict[str, tuple[float, float]]

DEFAULT_FAMILY = "log_linear"

_LOW_SUM = 0.01
"""How far the weights of an annealed slope may fall short of their sum between two knots of its schedule."""


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] <= bounds[1]:
        raise BadValue(f"a range of space must rise, got [{bounds[0]:g}, {bounds[1]:g}]; swap its ends")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_rising)]


def _number_of_ranges(given: Any) -> str:
    return (
        "each" if isinstance(given, list | tuple) and any(isinstance(part, list | tuple) for part in given) else "one"
    )


Ranges = Annotated[
    Annotated[Range, Tag("one")] | Annotated[tuple[Range, ...], Tag("each")], Discriminator(_number_of_ranges)
]
"""One range for all axes of a kind, or one for each."""


class Family(BaseModel, ABC):
    """What every family of weights offers. K is the method's number of loss terms (here they are called branches, as
    the paper's are), J that of its trained intervals."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def scale_axes(self) -> tuple[str, ...]:
        """The axes that multiply all weights by one factor and change nothing else."""
        return ()

    @abstractmethod
    def axes(self, num_branches: int, num_intervals: int) -> Axes:
        """Name and range of each parameter.

        Raises:
            BadValue: the family means nothing for so few branches.
        """

    @abstractmethod
    def weights(self, params: Params, num_branches: int) -> Weights:
        """The weights that a proposal stands for, first branch to last.

        Raises:
            WeightsError: a weight is not finite.
        """

    def schedule(self, params: Params, num_branches: int, num_intervals: int) -> Schedule:
        """How the weights differ over time or between trained intervals; empty where they do not.

        `weights` are then their mean.
        """
        return ()

    def params_of(self, weights: Weights, num_intervals: int, *, within_ranges: bool = True) -> dict[str, float] | None:
        """The parameters of given weights, or None where this family, or its ranges, do not hold them.

        Controls whose weights the sampler could have proposed become known to it this way.
        """
        params = self._params(weights, num_intervals)
        if params is None or not within_ranges:
            return params
        axes = self.axes(len(weights), num_intervals)
        return params if all(low <= params[name] <= high for name, (low, high) in axes.items()) else None

    @abstractmethod
    def _params(self, weights: Weights, num_intervals: int) -> dict[str, float] | None:
        """`params_of` without ranges."""

    @abstractmethod
    def curve(self, params: Params, num_branches: int) -> tuple[float, float] | None:
        """The (a, b) with which exp(a (k + index_origin) + b), k = 0 .. K - 1, are the proposal's weights.

        None where they are no such line, or not the same one all the time and in every interval.
        """


class LogLinear(Family):
    """w_k = exp(a k + b), k from `index_origin` (arXiv 2602.15971, eq. 8)."""

    family: Literal["log_linear"] = "log_linear"
    a: Range = (-1.0, 3.0)
    """The slope; 0 is uniform, ln 4 about the paper's best."""
    b: Range = (MIN_INTERCEPT, 0.0)
    """The intercept. It scales the whole loss, which Adam cancels: a flat direction (spec/methods.md 5.2)."""
    index_origin: int = Field(default=0, ge=0, le=1)
    """The first branch's k."""

    def model_post_init(self, _context: object) -> None:
        if self.b[0] < MIN_INTERCEPT:
            raise BadValue(
                f"space.b must not go below {MIN_INTERCEPT:g}, got [{self.b[0]:g}, {self.b[1]:g}]: "
                "smaller weights vanish in half precision; raise its lower end"
            )

    @property
    def scale_axes(self) -> tuple[str, ...]:
        return ("b",)

    def axes(self, num_branches: int, num_intervals: int) -> Axes:
        return {"a": self.a, "b": self.b}

    def weights(self, params: Params, num_branches: int) -> Weights:
        return log_linear(params["a"], params["b"], num_branches, index_origin=self.index_origin)

    def _params(self, weights: Weights, num_intervals: int) -> dict[str, float] | None:
        line = log_linear_of(weights, index_origin=self.index_origin)
        return None if line is None else {"a": line[0], "b": line[1]}

    def curve(self, params: Params, num_branches: int) -> tuple[float, float]:
        return params["a"], params["b"]


class _Normalised(Family, ABC):
    """Families whose weights have a given sum: two weightings with equal shares, which Adam cannot tell apart, are one
    proposal (spec/methods.md 5.2)."""

    loss_scale: float = Field(default=1.0, gt=0)
    """The sum of the weights. It matters to optimizers that are not scale free, and to half precision."""

    @property
    def index_origin(self) -> int:
        """The first branch's k in `curve`."""
        return 0

    def _line(self, a: float, num_branches: int) -> tuple[float, float]:
        """The (a, b) whose weights exp(a k + b) have the given sum."""
        largest = max(0.0, a * (num_branches - 1))
        log_sum = largest + math.log(math.fsum(math.exp(a * k - largest) for k in range(num_branches)))
        return a, math.log(self.loss_scale) - log_sum

    def _sloped(self, a: float, num_branches: int) -> Weights:
        return log_linear(*self._line(a, num_branches), num_branches)

    def _scaled(self, logs: Sequence[float]) -> Weights:
        """Weights of given logarithms, up to the factor that makes their sum the given one."""
        terms = [math.exp(log - max(logs)) for log in logs]
        total = math.fsum(terms)
        return checked([self.loss_scale * term / total for term in terms])


class Slope(_Normalised):
    """w_k proportional to exp(a k), their sum `loss_scale` (spec/methods.md 5.2): the log-linear shares on one axis."""

    family: Literal["slope"] = "slope"
    a: Range = (-0.5, 3.0)
    """The slope; 0 is uniform, ln 4 about the paper's best."""

    def axes(self, num_branches: int, num_intervals: int) -> Axes:
        return {"a": self.a}

    def weights(self, params: Params, num_branches: int) -> Weights:
        return self._sloped(params["a"], num_branches)

    def _params(self, weights: Weights, num_intervals: int) -> dict[str, float] | None:
        line = log_linear_of(weights)
        return None if line is None else {"a": line[0]}

    def curve(self, params: Params, num_branches: int) -> tuple[float, float]:
        return self._line(params["a"], num_branches)


class LogQuadratic(_Normalised):
    """log w_k = a x_k + c (x_k^2 - (K^2 - 1) / 12) + const, x_k = k - (K - 1) / 2 (spec/methods.md 5.2).

    Over the centred index the three terms are orthogonal, so a and c say different things: a as in `slope`, which is
    c = 0; c > 0 prefers both ends to the middle, c < 0 the middle. The constant makes the sum `loss_scale`.
    """

    family: Literal["log_quadratic"] = "log_quadratic"
    a: Range = (-0.5, 3.0)
    """The slope."""
    c: Range = (-1.0, 1.0)
    """The curvature."""

    def axes(self, num_branches: int, num_intervals: int) -> Axes:
        if num_branches < 3:
            raise BadValue(
                f"space.family log_quadratic bends the weights of three branches or more, and method.num_branches is "
                f"{num_branches}; use `space: {{family: slope}}`"
            )
        return {"a": self.a, "c": self.c}

    def weights(self, params: Params, num_branches: int) -> Weights:
        line, bow = _contrasts(num_branches)
        return self._scaled([params["a"] * x + params["c"] * q for x, q in zip(line, bow, strict=True)])

    def _params(self, weights: Weights, num_intervals: int) -> dict[str, float] | None:
        if min(weights) <= 0:
            return None
        logs = [math.log(weight) for weight in weights]
        a, c = (_projection(logs, contrast) for contrast in _contrasts(len(weights)))
        params = {"a": a, "c": c}
        return params if _have_equal_shares(self.weights(params, len(weights)), weights) else None

    def curve(self, params: Params, num_branches: int) -> tuple[float, float] | None:
        return self._line(params["a"], num_branches) if params["c"] == 0 else None


class Free(_Normalised):
    """log(w_k / w_K) = u_k for k = 1 .. K - 1, branch K the endpoint; their sum is `loss_scale` (spec/methods.md 4).

    Every weighting with no share of 0 is one proposal. At u = 0 all branches count as much as the endpoint.
    """

    family: Literal["free"] = "free"
    u: Ranges = (-6.0, 1.0)
    """Of each u_k, or one for each, first to last. The paper's best, slope ln 4 with K = 4: -4.2, -2.8, -1.4."""

    def axes(self, num_branches: int, num_intervals: int) -> Axes:
        ranges = [bounds for bounds in self.u if isinstance(bounds, tuple)]
        if not ranges:
            return dict.fromkeys((f"u{k}" for k in range(1, num_branches)), cast(tuple[float, float], self.u))
        if len(ranges) != num_branches - 1:
            raise BadValue(
                f"space.u has {len(ranges)} ranges, and {num_branches} weights of a given sum have {num_branches - 1} "
                "axes; give one range for each, or one for all"
            )
        return {f"u{k}": bounds for k, bounds in enumerate(ranges, start=1)}

    def weights(self, params: Params, num_branches: int) -> Weights:
        return self._scaled([*(params[f"u{k}"] for k in range(1, num_branches)), 0.0])

    def _params(self, weights: Weights, num_intervals: int) -> dict[str, float] | None:
        if min(weights) <= 0:
            return None
        return {f"u{k}": math.log(weight / weights[-1]) for k, weight in enumerate(weights[:-1], start=1)}

    def curve(self, params: Params, num_branches: int) -> tuple[float, float] | None:
        return log_linear_of(self.weights(params, num_branches))


class Annealed(_Normalised):
    """w_k(t) proportional to exp(a(t) k), a(t) = a0 + (a1 - a0) t, their sum `loss_scale`; t is 0 at the first image
    and 1 at the last.

    Dense early, endpoint late is a0 < a1 (spec/methods.md 5.1; by 5.2 the best slope grows with the budget).
    a0 = a1 is `slope`.
    """

    family: Literal["annealed"] = "annealed"
    a0: Range = (-0.5, 3.0)
    """The slope at the start."""
    a1: Range = (-0.5, 3.0)
    """The slope at the end."""

    def axes(self, num_branches: int, num_intervals: int) -> Axes:
        return {"a0": self.a0, "a1": self.a1}

    def weights(self, params: Params, num_branches: int) -> Weights:
        knots = self._knots(params, num_branches)
        middles = [_mean(pair) for pair in pairwise(knots)]
        return checked(_mean(middles))  # the trapezoidal rule

    def schedule(self, params: Params, num_branches: int, num_intervals: int) -> Schedule:
        return tuple((weights,) for weights in self._knots(params, num_branches))

    def _knots(self, params: Params, num_branches: int) -> list[Weights]:
        """The weights at evenly spaced times: enough of them for the schedule's own interpolation.

        Between two knots that differ by h in slope, interpolated logarithms give the right shares, as log w_k is
        a k - L(a) and L, the logarithm of sum_k exp(a k), the same for all k. But L is convex, so that the weights' sum
        is too low: by at most L'' h^2 / 8 in its logarithm, and L'', the variance of k under the shares, is at most
        (K - 1)^2 / 4.
        """
        begin, end = params["a0"], params["a1"]
        widest = math.sqrt(32 * _LOW_SUM) / max(1, num_branches - 1)
        count = max(1, math.ceil(abs(end - begin) / widest))
        return [self._sloped(begin + (end - begin) * i / count, num_branches) for i in range(count + 1)]

    def _params(self, weights: Weights, num_intervals: int) -> dict[str, float] | None:
        line = log_linear_of(weights)
        return None if line is None else {"a0": line[0], "a1": line[0]}

    def curve(self, params: Params, num_branches: int) -> tuple[float, float] | None:
        return self._line(params["a0"], num_branches) if params["a0"] == params["a1"] else None


class PerInterval(_Normalised):
    """w_jk proportional to exp(a_j k) in trained interval j = 1 .. J, from noise to image (spec/methods.md 5.1).

    Each interval's weights have the sum `loss_scale`: it has optimizer steps of its own, and a factor there would only
    say how much its gradients count beside the other intervals' in what Adam remembers. Equal slopes are `slope`.
    """

    family: Literal["per_interval"] = "per_interval"
    a: Range = (-0.5, 3.0)
    """Of each slope."""

    def axes(self, num_branches: int, num_intervals: int) -> Axes:
        return {f"a{j}": self.a for j in range(1, num_intervals + 1)}

    def weights(self, params: Params, num_branches: int) -> Weights:
        (rows,) = self.schedule(params, num_branches, self._num_slopes(params))
        return checked(_mean(rows))

    def _num_slopes(self, params: Params) -> int:
        return sum(1 for _ in takewhile(lambda j: f"a{j}" in params, count(1)))

    def schedule(self, params: Params, num_branches: int, num_intervals: int) -> Schedule:
        return (tuple(self._sloped(params[f"a{j}"], num_branches) for j in range(1, num_intervals + 1)),)

    def _params(self, weights: Weights, num_intervals: int) -> dict[str, float] | None:
        line = log_linear_of(weights)
        return None if line is None else {f"a{j}": line[0] for j in range(1, num_intervals + 1)}

    def curve(self, params: Params, num_branches: int) -> tuple[float, float] | None:
        slopes = {params[f"a{j}"] for j in range(1, self._num_slopes(params) + 1)}
        return self._line(slopes.pop(), num_branches) if len(slopes) == 1 else None


def free_axes(axes: Axes) -> Axes:
    """The axes that are searched: those whose range is more than one point."""
    return {name: (low, high) for name, (low, high) in axes.items() if low < high}


def key_of(space: Family, axis: str) -> str:
    """The key of a study file that holds an axis' range; numbered axes share one."""
    return f"space.{axis if hasattr(space, axis) else axis.rstrip('0123456789')}"


def log_linear_of(weights: Weights, *, index_origin: int = 0) -> tuple[float, float] | None:
    """The (a, b) of weights exp(a k + b), k from `index_origin`; None where they are not such."""
    if len(weights) < 2 or min(weights) <= 0:
        return None
    a = math.log(weights[-1] / weights[0]) / (len(weights) - 1)
    b = math.log(weights[0]) - a * index_origin
    again = log_linear(a, b, len(weights), index_origin=index_origin)
    return (a, b) if _are_close(again, weights) else None


def _have_equal_shares(one: Weights, other: Weights) -> bool:
    return _are_close(shares(one), shares(other))


def _are_close(one: Weights, other: Weights) -> bool:
    return all(math.isclose(u, v, rel_tol=1e-9) for u, v in zip(one, other, strict=True))


def _contrasts(num_branches: int) -> tuple[list[float], list[float]]:
    """A line and a bow over the centred index: orthogonal to each other and to a constant."""
    line = [k - (num_branches - 1) / 2 for k in range(num_branches)]
    return line, [x * x - (num_branches**2 - 1) / 12 for x in line]


def _projection(values: Sequence[float], contrast: Sequence[float]) -> float:
    return _dot(values, contrast) / _dot(contrast, contrast)


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(u * v for u, v in zip(one, other, strict=True))


def _mean(rows: Sequence[Weights]) -> Weights:
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


def family_of(section: Any) -> str:
    """The family that a study file's section means, also where it leaves it to the default."""
    named = section.get("family", DEFAULT_FAMILY) if isinstance(section, dict) else getattr(section, "family", None)
    return DEFAULT_FAMILY if named is None else str(named)


SearchSpace = Annotated[
    Annotated[LogLinear, Tag("log_linear")]
    | Annotated[Slope, Tag("slope")]
    | Annotated[LogQuadratic, Tag("log_quadratic")]
    | Annotated[Free, Tag("free")]
    | Annotated[Annealed, Tag("annealed")]
    | Annotated[PerInterval, Tag("per_interval")],
    Discriminator(family_of),
]
