"""What is searched: named axes, and the map from a proposal's parameters to branch weights.

Knows nothing of Optuna; adding a family of weights is one class here and one member of `SearchSpace`.
"""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from bdense_core.errors import BadValue
from bdense_core.weights import MIN_INTERCEPT, Weights, log_linear

Params = dict[str, float]


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] <= bounds[1]:
        raise BadValue(f"a range of space must rise, got [{bounds[0]:g}, {bounds[1]:g}]; swap its ends")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_rising)]


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

    def axes(self) -> dict[str, tuple[float, float]]:
        """Name and range of each searched parameter."""
        return {"a": self.a, "b": self.b}

    def weights(self, params: Params, num_branches: int) -> Weights:
        """The weights that a proposal stands for."""
        return log_linear(params["a"], params["b"], num_branches, index_origin=self.index_origin)

    def params_of(self, weights: Weights, *, within_ranges: bool = True) -> Params | None:
        """The parameters of given weights, or None where this family, or its ranges, do not hold them.

        Controls whose weights the sampler could have proposed become known to it this way.
        """
        if len(weights) < 2 or min(weights) <= 0:
            return None
        a = math.log(weights[-1] / weights[0]) / (len(weights) - 1)
        b = math.log(weights[0]) - a * self.index_origin
        params = {"a": a, "b": b}
        fits = not within_ranges or all(low <= params[name] <= high for name, (low, high) in self.axes().items())
        exact = all(
            math.isclose(u, v, rel_tol=1e-9) for u, v in zip(self.weights(params, len(weights)), weights, strict=True)
        )
        return params if fits and exact else None


SearchSpace = LogLinear
