"""A method's settings that a study searches beside the weights: narrowed by its file, checked, set out as a grid.

Knows nothing of Optuna. What may be searched is the method's to say: `Method.axes`.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from bdense_core.errors import BadValue, ConfigError, UnknownKey
from bdense_core.methods.base import Axis, Method, with_settings

Setting = float | int | str | bool
Narrowed = tuple[Setting, ...]
"""The two ends of a range, or some choices."""


def narrowed(method: Method, wanted: Mapping[str, Any], weight_axes: Mapping[str, Any]) -> dict[str, Narrowed]:
    """The section `tune` of a study with everything said: nothing given for an axis means all of the method's own.

    Raises:
        UnknownKey: an axis that the method does not have; the message names the nearest.
        BadValue: no range or no choices of that axis, a value that the method refuses, or a name that an axis of the
            weights has.
    """
    axes = method.axes()
    for name in wanted:
        if name not in axes:
            raise _no_axis(method, name, axes)
        if name in weight_axes:
            raise BadValue(f"tune.{name} is called as an axis of the weights; choose another space.family")
    found = {name: _narrowed(name, axis, wanted[name]) for name, axis in axes.items() if name in wanted}
    for name, values in found.items():
        for value in values:
            try:
                with_settings(method, {name: value})
            except ConfigError as error:
                raise BadValue(f"tune.{name} reaches {value}, which the method refuses: {error}") from error
    return found


def _no_axis(method: Method, name: str, axes: Mapping[str, Axis]) -> ConfigError:
    known = ", ".join(axes) or "none"
    if name in {found.name for found in dataclasses.fields(method)}:  # type: ignore[arg-type]
        return BadValue(f"tune.{name}: method.{name} is not searched by training again; what may be searched: {known}")
    nearest = difflib.get_close_matches(name, axes, n=1, cutoff=0.0)
    hint = f"did you mean tune.{nearest[0]}?" if nearest else "it has none to search; leave tune out"
    return UnknownKey(f"unknown key tune.{name} for the method {method.kind}; {hint}")


def _narrowed(name: str, axis: Axis, given: Any) -> Narrowed:
    if given is None or given in ({}, (), []):
        return axis.choices or tuple(_number(f"tune.{name}", axis, end) for end in (axis.low, axis.high))
    if not isinstance(given, list | tuple):
        raise BadValue(f"tune.{name} is {given!r}; give {_wanted(axis)}, or nothing for all of it")
    if axis.choices:
        chosen = tuple(value_of(f"tune.{name}", axis, value) for value in given)
        if not len(set(chosen)) == len(given) > 1:
            raise BadValue(f"tune.{name} is {list(given)}; give {_wanted(axis)}, at least two, each once")
        return chosen
    low, high = (_number(f"tune.{name}", axis, value) for value in given) if len(given) == 2 else (0, 0)
    if not low < high or (axis.log and low <= 0):
        raise BadValue(f"tune.{name} is {list(given)}; give {_wanted(axis)}")
    return low, high


def _wanted(axis: Axis) -> str:
    if axis.choices:
        return f"some of {', '.join(map(str, axis.choices))}"
    kind = "two whole numbers" if axis.integer else "two numbers"
    return f"{kind} that rise{' from above 0' if axis.log else ''}, such as [{axis.low:g}, {axis.high:g}]"


def resolved(method: Method, section: Mapping[str, Narrowed]) -> dict[str, Axis]:
    """The axes that a section `tune` with everything said means."""
    axes = method.axes()
    return {
        name: dataclasses.replace(axes[name], choices=values)
        if axes[name].choices
        else dataclasses.replace(axes[name], low=float(values[0]), high=float(values[1]))
        for name, values in section.items()
    }


def value_of(where: str, axis: Axis, given: Any) -> Setting:
    """A value of an axis from one that a person gave, which may be text.

    Raises:
        BadValue: it lies outside of the range, is none of the choices, or no number; `where` says whose value it is.
    """
    if axis.choices:
        chosen = [choice for choice in axis.choices if _is_meant(choice, given)]
        if not chosen:
            raise BadValue(f"{where} is {given!r}; choose one of {', '.join(map(str, axis.choices))}")
        return chosen[0]
    value = _number(where, axis, given)
    if not axis.low <= value <= axis.high:
        raise BadValue(f"{where} = {value:g} lies outside the study's range [{axis.low:g}, {axis.high:g}]")
    return value


def _is_meant(choice: Setting, given: Any) -> bool:
    if isinstance(choice, bool) or isinstance(given, bool):
        return str(choice).lower() == str(given).lower()
    if isinstance(choice, str):
        return bool(choice == given)
    try:
        return float(given) == choice
    except (TypeError, ValueError):
        return False


def _number(where: str, axis: Axis, given: Any) -> float | int:
    """A float, or for an axis of whole numbers an int."""
    try:
        value = float(given) if not isinstance(given, bool) else None
    except (TypeError, ValueError):
        value = None
    if value is None or not math.isfinite(value) or (axis.integer and value != int(value)):
        raise BadValue(f"{where} is {given!r}; give a {'whole' if axis.integer else 'finite'} number")
    return int(value) if axis.integer else value


def holds(axis: Axis, value: Any) -> bool:
    """Whether an axis has a value."""
    try:
        value_of("it", axis, value)
    except BadValue:
        return False
    return True


def grid(axis: Axis, num_points: int) -> list[Setting]:
    """Evenly spaced points of an axis, both ends among them: by ratio on a logarithmic axis, rounded on a whole one.

    All choices, where it has such; one point, where it is a single one.
    """
    import numpy as np  # as a command that reads a study file starts without it

    if axis.choices:
        return list(axis.choices)
    spaced = np.geomspace if axis.log else np.linspace
    points: list[float] = spaced(axis.low, axis.high, num_points if axis.low < axis.high else 1).tolist()
    return list(dict.fromkeys(round(point) for point in points)) if axis.integer else list(points)


def is_searched(axis: Axis) -> bool:
    """Whether it is more than one point."""
    return bool(axis.choices) or axis.low < axis.high
