"""How a search may mislead: one-line notes for people on a study's space, and on its best trial in it."""

from search.records import Row
from search.space import free_axes
from search.spec import Study

_EDGE = 0.02
"""Share of a range's width that counts as its edge."""
_FEWEST_FINISHED = 4
"""Of fewer trials the best one is near an end by chance."""


def notes(study: Study) -> list[str]:
    """What is known of a study before any trial has run."""
    flat = _flat_axes(study)
    if not flat:
        return []
    axis = flat[0]
    return [
        f"space.{axis} only scales the loss, which Adam cancels: trials that differ in {axis} alone differ by noise. "
        f"To search what matters, use `space: {{family: slope}}` or fix it ({axis}: [x, x]) in a new study"
    ]


def findings(study: Study, rows: list[Row]) -> list[str]:
    """What the trials so far say about the study's space."""
    finished = [row for row in rows if row.is_search and row.state == "COMPLETE" and row.value is not None]
    if len(finished) < _FEWEST_FINISHED:
        return []
    best = min(finished, key=lambda row: (row.value, row.number))
    found = []
    for axis, (low, high) in free_axes(study.spec.space).items():
        margin, value = _EDGE * (high - low), best.params[axis]
        if axis in _flat_axes(study) or low + margin < value < high - margin:
            continue
        end, bound = ("lower", low) if value <= low + margin else ("upper", high)
        found.append(
            f"the best trial {best.number} lies on the {end} edge of space.{axis} ({value:.4g}, the range ends at "
            f"{bound:g}); better weights may lie beyond: widen that end in a new study"
        )
    return found


def _flat_axes(study: Study) -> list[str]:
    """Searched axes that no result depends on. Every method here is scale free: it trains with Adam, or asks for
    the shares alone."""
    return [axis for axis in free_axes(study.spec.space) if axis in study.spec.space.scale_axes]
