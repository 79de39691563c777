"""What is searched: named axes, and the map from a proposal's parameters to branch weights.

Knows nothing of Optuna; adding a family of weights is one class here and one member of `SearchSpace`.
"""

import math
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from bdense_core.errors import BadValue
from bdense_core.weights import MIN_INTERCEPT, Weights, log_linear

Params = dict[str, float]
Axes = dict[str, tuple[float, float]]

DEFAULT_FAMILY = "log_linear"


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] <= bounds[1]:
        raise BadValue(f"a range of space must rise, got [{bounds[0]:g}, {bounds[1]:g}]; swap its ends")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_rising)]


class Family(Protocol):
    """What every family of weights offers."""

    @property
    def index_origin(self) -> int:
        """The first branch's k in `curve`."""

    @property
    def scale_axes(self) -> tuple[str, ...]:
        """The axes that multiply all weights by one factor and change nothing else."""

    def axes(self) -> Axes:
        """Name and range of each parameter."""

    def weights(self, params: Params, num_branches: int) -> Weights:
        """The weights that a proposal stands for, first branch to last.

        Raises:
            WeightsError: a weight is not finite.
        """

    def params_of(self, weights: Weights, *, within_ranges: bool = True) -> Params | None:
        """The parameters of given weights, or None where this family, or its ranges, do not hold them.

        Controls whose weights the sampler could have proposed become known to it this way.
        """

    def curve(self, params: Params, num_branches: int) -> tuple[float, float]:
        """The (a, b) with which exp(a (k + index_origin) + b), k = 0 .. K - 1, are the proposal's weights."""


class LogLinear(BaseModel):
    """w_k = exp(a k + b), k from `index_origin` (arXiv 2602.15971, eq. 8)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["log_linear"] = "log_linear"
    a: Range = (-1.0, 3.0)
    """The slope; 0 is uniform, ln 4 about the paper's best."""
    b: Range = (MIN_INTERCEPT, 0.0)
    """The intercept. It scales the whole loss, which Adam cancels: a flat direction (spec/methods.md 5.2)."""
    index_origin: int = Field(default=0, ge=0, le=1)

    def model_post_init(self, _context: object) -> None:
        if self.b[0] < MIN_INTERCEPT:
            raise BadValue(
                f"space.b must not go below {MIN_INTERCEPT:g}, got [{self.b[0]:g}, {self.b[1]:g}]: "
                "smaller weights vanish in half precision; raise its lower end"
            )

    @property
    def scale_axes(self) -> tuple[str, ...]:
        return ("b",)

    def axes(self) -> Axes:
        return {"a": self.a, "b": self.b}

    def weights(self, params: Params, num_branches: int) -> Weights:
        return log_linear(params["a"], params["b"], num_branches, index_origin=self.index_origin)

    def params_of(self, weights: Weights, *, within_ranges: bool = True) -> Params | None:
        line = log_linear_of(weights, index_origin=self.index_origin)
        if line is None:
            return None
        params = dict(zip(("a", "b"), line, strict=True))
        return params if not within_ranges or _inside(params, self.axes()) else None

    def curve(self, params: Params, num_branches: int) -> tuple[float, float]:
        return params["a"], params["b"]


class Slope(BaseModel):
    """w_k proportional to exp(a k), their sum `loss_scale` (spec/methods.md 5.2): the log-linear shares on one axis.

    Two weightings with equal shares are one proposal here; Adam cannot tell them apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["slope"] = "slope"
    a: Range = (-0.5, 3.0)
    """The slope; 0 is uniform, ln 4 about the paper's best."""
    loss_scale: float = Field(default=1.0, gt=0)
    """The sum of the weights. It matters to optimizers that are not scale free, and to half precision."""

    @property
    def index_origin(self) -> int:
        return 0

    @property
    def scale_axes(self) -> tuple[str, ...]:
        return ()

    def axes(self) -> Axes:
        return {"a": self.a}

    def weights(self, params: Params, num_branches: int) -> Weights:
        return log_linear(*self.curve(params, num_branches), num_branches)

    def params_of(self, weights: Weights, *, within_ranges: bool = True) -> Params | None:
        line = log_linear_of(weights)
        if line is None:
            return None
        params = {"a": line[0]}
        return params if not within_ranges or _inside(params, self.axes()) else None

    def curve(self, params: Params, num_branches: int) -> tuple[float, float]:
        a = params["a"]
        largest = max(0.0, a * (num_branches - 1))
        log_sum = largest + math.log(math.fsum(math.exp(a * k - largest) for k in range(num_branches)))
        return a, math.log(self.loss_scale) - log_sum


def free_axes(space: Family) -> Axes:
    """The axes that are searched: those whose range is more than one point."""
    return {name: (low, high) for name, (low, high) in space.axes().items() if low < high}


def _inside(params: Params, axes: Axes) -> bool:
    return all(low <= params[name] <= high for name, (low, high) in axes.items())


def log_linear_of(weights: Weights, *, index_origin: int = 0) -> tuple[float, float] | None:
    """The (a, b) of weights exp(a k + b), k from `index_origin`; None where they are not such."""
    if len(weights) < 2 or min(weights) <= 0:
        return None
    a = math.log(weights[-1] / weights[0]) / (len(weights) - 1)
    b = math.log(weights[0]) - a * index_origin
    again = log_linear(a, b, len(weights), index_origin=index_origin)
    return (a, b) if all(math.isclose(u, v, rel_tol=1e-9) for u, v in zip(again, weights, strict=True)) else None


def family_of(section: Any) -> str:
    """The family that a study file's section means, also where it leaves it to the default."""
    named = section.get("family", DEFAULT_FAMILY) if isinstance(section, dict) else getattr(section, "family", None)
    return DEFAULT_FAMILY if named is None else str(named)


SearchSpace = Annotated[
    Annotated[LogLinear, Tag("log_linear")] | Annotated[Slope, Tag("slope")], Discriminator(family_of)
]
