"""How a search may mislead: one-line notes for people on a study's space, and on its best trial in it."""

from bdense_core.errors import WeightsError
from bdense_core.weights import shares
from search.records import Row
from search.space import free_axes, key_of
from search.spec import Study

_EDGE = 0.02
"""Share of a range's width that counts as its edge."""
_FEWEST_FINISHED = 4
"""Of fewer trials the best one is near an end by chance."""
_NOTHING = 0.01
"""Weightings whose shares differ by less are one, for all that a search can tell."""


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
    for axis, (low, high) in free_axes(study.spec.axes).items():
        width, value = high - low, best.params[axis]
        is_low, is_high = value <= low + _EDGE * width, value >= high - _EDGE * width
        if not (is_low or is_high) or not _changes(study, best, axis, by=-width if is_low else width):
            continue
        end, bound = ("lower", low) if is_low else ("upper", high)
        key = key_of(study.spec.space, axis)
        where = key if key == f"space.{axis}" else f"{key} in {axis}"
        found.append(
            f"the best trial {best.number} lies on the {end} edge of {where} ({value:.4g}, the range ends at "
            f"{bound:g}); better weights may lie beyond: widen that end in a new study"
        )
    return found


def _changes(study: Study, row: Row, axis: str, *, by: float) -> bool:
    """Whether the shares of a row would be others if it went further along an axis.

    Not so where the axis only scales, nor past slopes that leave the endpoint alone: that is a control.
    """
    moved = row.params | {axis: row.params[axis] + by}
    try:
        there = shares(study.spec.space.weights(moved, study.num_branches))
    except WeightsError:
        return False  # so steep that one branch has everything
    here = shares(study.spec.space.weights(row.params, study.num_branches))
    return max(abs(u - v) for u, v in zip(here, there, strict=True)) > _NOTHING


def _flat_axes(study: Study) -> list[str]:
    """Searched axes that no result depends on. Every method here is scale free: it trains with Adam, or asks for
    the shares alone."""
    return [axis for axis in free_axes(study.spec.axes) if axis in study.spec.space.scale_axes]
