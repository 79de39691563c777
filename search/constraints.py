"""What a study asks of a method's further figures: a trial that does not keep to it is never the best."""

import difflib
import math
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict

from bdense_core.errors import BadValue, UnknownKey


class Constraint(BaseModel):
    """The bounds of one figure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: float | None = None
    max: float | None = None

    def model_post_init(self, _context: object) -> None:
        low, high = self.min, self.max
        if low is None and high is None:
            raise BadValue("a constraint has no bound; give it min, max or both, such as {min: 0.8}")
        if low is not None and high is not None and low > high:
            raise BadValue(f"a constraint asks for at least {low:g} and at most {high:g}; no trial can keep it")

    def excesses(self, value: float | None) -> list[float]:
        """By how much each bound is missed; 0 or less where it is kept.

        A value that is missing misses a bound by its size, and by 1 at least: its true distance is not known.
        """
        if value is None:
            return [max(1.0, abs(bound)) for bound in (self.min, self.max) if bound is not None]
        return [
            *([self.min - value] if self.min is not None else []),
            *([value - self.max] if self.max is not None else []),
        ]


Constraints = Mapping[str, Constraint]


def check(constraints: Constraints, known: Iterable[str]) -> None:
    """Whether a method tells the figures that are constrained.

    Raises:
        UnknownKey: it does not; the message names the nearest.
    """
    figures = list(known)
    for name in constraints:
        if name not in figures:
            nearest = difflib.get_close_matches(name, figures, n=1, cutoff=0.0)
            hint = f"did you mean {nearest[0]}?" if nearest else "this method has none; leave constraints out"
            raise UnknownKey(f"unknown figure constraints.{name}; {hint}")


def excesses(constraints: Constraints, metrics: Mapping[str, float]) -> list[float]:
    """By how much each bound of each constraint is missed, in a fixed order: Optuna's constraint values."""
    return [
        excess for name, constraint in sorted(constraints.items()) for excess in constraint.excesses(_of(metrics, name))
    ]


def violated(constraints: Constraints, metrics: Mapping[str, float]) -> tuple[str, ...]:
    """The figures that miss a bound or are missing."""
    return tuple(name for name in sorted(constraints) if max(constraints[name].excesses(_of(metrics, name))) > 0)


def _of(metrics: Mapping[str, float], name: str) -> float | None:
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None
