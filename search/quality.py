"""How a search may mislead: one-line notes for people on what a study searches, and on its best trial in it."""

import math
from collections.abc import Iterator

from bdense_core.errors import WeightsError
from bdense_core.weights import shares
from search.records import Row
from search.space import free_axes, key_of
from search.spec import Study

_EDGE = 0.02
"""Share of a range's width that counts as its edge."""
_FEWEST_FINISHED = 4
"""Of fewer trials the best one is near an end by chance."""
_BLIND = ("cmaes", "qmc", "random", "grid")
"""Samplers that learn nothing from constraints."""
_NOTHING = 0.01
"""Weightings whose shares differ by less are one, for all that a search can tell."""


def notes(study: Study) -> list[str]:
    """What is known of a study before any trial has run."""
    found = []
    for axis in _flat_axes(study)[:1]:
        found.append(
            f"space.{axis} only scales the loss, which Adam cancels: trials that differ in {axis} alone differ by "
            f"noise. To search what matters, use `space: {{family: slope}}` or fix it ({axis}: [x, x]) in a new study"
        )
    if study.spec.constraints and study.spec.sampler.kind in _BLIND:
        found.append(
            f"sampler.kind {study.spec.sampler.kind} does not know the constraints: it may propose what misses them "
            "again and again; tpe and gp learn them"
        )
    return found


def findings(study: Study, rows: list[Row]) -> list[str]:
    """What the trials so far say about what the study searches."""
    finished = [row for row in rows if row.is_search and row.state == "COMPLETE" and row.value is not None]
    kept = [row for row in finished if not row.violated]
    if len(finished) < _FEWEST_FINISHED:
        return []
    if not kept:
        asked = ", ".join(sorted(study.spec.constraints))
        return [f"none of the {len(finished)} finished trials keeps the constraints of {asked}; loosen them"]
    best = min(kept, key=lambda row: (row.value, row.number))
    return [*_on_edges_of_weights(study, best), *_on_edges_of_settings(study, best)]


def _on_edges_of_weights(study: Study, best: Row) -> Iterator[str]:
    for axis, (low, high) in free_axes(study.spec.axes).items():
        width, value = high - low, float(best.params[axis])
        end = _edge(value, low, high)
        if end is not None and _changes(study, best, axis, to=value + (width if end == "upper" else -width)):
            key = key_of(study.spec.space, axis)
            where = key if key == f"space.{axis}" else f"{key} in {axis}"
            yield _on_edge(best, where, end, value, low, high, "weights")


def _on_edges_of_settings(study: Study, best: Row) -> Iterator[str]:
    for name, axis in study.spec.tuned.items():
        if not axis.choices:
            value = float(best.params[name])
            places = [math.log(x) if axis.log else x for x in (value, axis.low, axis.high)]
            if (end := _edge(*places)) is not None:
                yield _on_edge(best, f"tune.{name}", end, value, axis.low, axis.high, "values")


def _edge(value: float, low: float, high: float) -> str | None:
    """The end of a range that a value lies at."""
    width = high - low
    return "lower" if value <= low + _EDGE * width else "upper" if value >= high - _EDGE * width else None


def _on_edge(best: Row, where: str, end: str, value: float, low: float, high: float, what: str) -> str:
    return (
        f"the best trial {best.number} lies on the {end} edge of {where} ({value:.4g}, the range ends at "
        f"{low if end == 'lower' else high:g}); better {what} may lie beyond: widen that end in a new study"
    )


def _changes(study: Study, row: Row, axis: str, *, to: float) -> bool:
    """Whether the shares of a row would be others if it went further along an axis.

    Not so where the axis only scales, nor past slopes that leave the endpoint alone: that is a control.
    """
    moved = row.params | {axis: to}
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
