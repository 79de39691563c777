"""Pictures of a study in matplotlib, as SVG for the page and as PNG for files.

Each function draws one figure from `marks`. Ink, grid and paper are colours that the page replaces by its own, so that
one SVG serves light and dark.
"""

import io
import math
from collections.abc import Callable
from typing import Any

from bdense_core.methods.base import Axis
from search.comparison import Comparison
from search.labels import term_labels, value_text
from search.marks import (
    BAND,
    OTHER,
    Band,
    Colors,
    Effect,
    Point,
    band,
    curves,
    effects,
    flat_axis,
    gain_over,
    log_is_better,
    map_axes,
    points,
    readable,
    repeats,
    scale_end,
    traces,
)
from search.records import Row
from search.spec import Study
from search.statistics import ranks

Figure = Any
"""An empty `matplotlib.figure.Figure`, which is loaded when something is drawn."""
Draw = Callable[[Figure], None]
"""Fills one."""

_INK, _GRID, _PAPER = "#1b1f25", "#d3d7dd", "#fefdfb"
_ON_PAGE = {_INK: "currentColor", _GRID: "var(--rule)", _PAPER: "var(--paper)"}
_DPI = 150
_STOPPED, _VIOLATES = "stopped early", "violates a constraint"
_CROSSES = {_STOPPED: "x", _VIOLATES: "+"}
_MAP = "viridis"
"""The better, the darker; even for the colour-blind, and in print."""
_STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "text.parse_math": False,
    "svg.fonttype": "none", "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID,
    "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5,
    "lines.linewidth": 1.6, "figure.facecolor": _PAPER,
}  # fmt: skip


def svg(name: str, size: tuple[float, float], draw: Draw) -> str:
    """A figure as an SVG element for an HTML page; `name` keeps its ids apart from other figures'.

    Args:
        size: width and height in inches.
    """
    content = io.StringIO()
    _save(size, draw, content, format="svg", transparent=True, metadata={"Date": None, "Creator": None}, salt=name)
    text = content.getvalue()
    for color, its in _ON_PAGE.items():
        text = text.replace(color, its)
    return text[text.index("<svg") :]


def png(size: tuple[float, float], draw: Draw) -> bytes:
    """The same figure as a PNG file."""
    content = io.BytesIO()
    _save(size, draw, content, format="png", dpi=_DPI)
    return content.getvalue()


def _save(size: tuple[float, float], draw: Draw, file: Any, *, salt: str = "", **how: Any) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = _STYLE | {"svg.hashsalt": salt or None}
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, **how)


# -- one study


def draw_curves(axes: Any, study: Study, rows: list[Row], *, log: bool = False, legend: bool = True) -> None:
    """Shares by loss term: the best trials with lines, the controls dashed."""
    colors, (kind, names) = Colors(rows), term_labels(study.spec.method.terms)
    places = range(len(names))
    for curve in curves(rows):
        axes.plot(places, curve.shares, label=curve.label, color=colors[curve.name], **_line(curve.is_control))
    axes.set(xlabel=kind, ylabel="share", xticks=places, xticklabels=names)
    if log:
        axes.set_title("on a logarithmic scale")
        _log_scale(axes, "y", subs=(1.0,))
    if legend:
        axes.legend()


def draw_map(axes: Any, study: Study, rows: list[Row]) -> None:
    """The plane of two axes with values as colours, or the value over a single axis."""
    drawn, (x, y) = points(study, rows), map_axes(study)
    axes.set(xlabel=x, ylabel=y)
    if not drawn:
        axes.set_title("no trial has a place here yet")
    elif y == study.metric:
        _draw_line_of_values(axes, rows, drawn)
    else:
        _draw_plane(axes, study, drawn)
    _scale_axis(axes, "x", study.spec.searched.get(x))
    _scale_axis(axes, "y", study.spec.searched.get(y))


def draw_slice(axes: Any, study: Study, rows: list[Row], name: str, drawn: list[Point]) -> None:
    """The value over one searched setting."""
    axes.set(xlabel=name, ylabel=study.metric)
    _draw_line_of_values(axes, rows, drawn)
    _scale_axis(axes, "x", study.spec.searched.get(name))


def _scale_axis(axes: Any, which: str, axis: Axis | None) -> None:
    """Choices by their names, and logarithmic where the search is."""
    if axis is not None and axis.choices:
        ticks = {f"{which}ticks": range(len(axis.choices)), f"{which}ticklabels": list(map(value_text, axis.choices))}
        axes.set(**ticks, **{f"{which}lim": (-0.5, len(axis.choices) - 0.5)})
    elif axis is not None and axis.log:
        _log_scale(axes, which)


def _draw_plane(axes: Any, study: Study, drawn: list[Point]) -> None:
    axes.margins(0.07)
    _scatter_crosses(axes, [p for p in drawn if p.pruned], _STOPPED)
    _scatter_crosses(axes, [p for p in drawn if not p.pruned and p.violates], _VIOLATES)
    if ended := [p for p in drawn if p.value is not None and not p.violates]:
        _draw_values(axes, study, ended)
    if flat := flat_axis(study):
        _draw_flat_direction(axes, study, flat)
    axes.legend(handles=_handles(drawn), loc="upper left", bbox_to_anchor=(0, -0.13), ncols=3, borderaxespad=0.0)


def _draw_values(axes: Any, study: Study, ended: list[Point]) -> None:
    values = [p.value for p in ended if p.value is not None]
    best, end = min(values), scale_end(values)
    for is_control, marker in ((False, "o"), (True, "D")):
        group = [p for p in ended if p.is_control == is_control]
        axes.scatter(
            [p.x for p in group], [p.y for p in group], c=[p.value for p in group], marker=marker, s=52,
            cmap=_MAP, vmin=best, vmax=end, edgecolors=_INK, linewidths=0.7, zorder=3,
        )  # fmt: skip
    for p in ended:
        if p.is_control or p.value == best:
            axes.annotate(p.label, (p.x, p.y), (6, 6), textcoords="offset points", fontsize=8.5)
    extend = "max" if end < max(values) else "neither"
    axes.figure.colorbar(axes.collections[-1], ax=axes, label=study.metric, extend=extend, pad=0.02)


def _handles(drawn: list[Point]) -> list[Any]:
    """Legend of the markers alone, since colours stand for values."""
    from matplotlib.lines import Line2D

    kinds = {
        ("o", "ran to the end"): any(not (p.pruned or p.violates or p.is_control) for p in drawn),
        ("D", "control"): any(p.is_control for p in drawn),
        (_CROSSES[_STOPPED], _STOPPED): any(p.pruned for p in drawn),
        (_CROSSES[_VIOLATES], _VIOLATES): any(p.violates and not p.pruned for p in drawn),
    }
    return [
        Line2D([], [], linestyle="", marker=marker, label=label, color=OTHER, markeredgecolor=OTHER)
        for (marker, label), is_there in kinds.items()
        if is_there
    ]


def _draw_flat_direction(axes: Any, study: Study, flat: str) -> None:
    """Lines along which all shares are equal."""
    is_vertical = map_axes(study)[1] == flat
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x" if is_vertical else "y", linestyle=(0, (6, 3)), color=OTHER, alpha=0.5)
    axes.set_title(f"dashed lines: equal shares, {flat} is flat")


def _draw_line_of_values(axes: Any, rows: list[Row], drawn: list[Point]) -> None:
    colors, noise = Colors(rows), band(rows)
    _scatter_crosses(axes, [p for p in drawn if not p.pruned and p.violates], _VIOLATES)
    heights = [p.y for p in drawn if p.y is not None and not p.violates]
    handles = _handles(drawn)
    if noise is not None:
        color, label = colors[noise.name], f"{noise.name}, {BAND}"
        low, high = noise.value - noise.half, noise.value + noise.half
        axes.axhspan(low, high, color=color, alpha=0.16, linewidth=0)
        handles.append(axes.axhline(noise.value, color=color, linestyle="--", label=label))
    for p in drawn:
        if p.y is not None and not p.violates:
            marker = "D" if p.is_control else "o"
            axes.scatter(
                p.x, p.y, marker=marker, s=44, color=colors[p.label], edgecolors=_INK, linewidths=0.7, zorder=3
            )
            if p.is_control or p.y == min(heights):
                axes.annotate(p.label, (p.x, p.y), (6, 6), textcoords="offset points", fontsize=8.5)
    _scatter_crosses(axes, [p for p in drawn if p.pruned], _STOPPED, y=min(heights, default=0.0))
    if log_is_better(heights):
        _log_scale(axes, "y")
    axes.legend(handles=handles)


def _scatter_crosses(axes: Any, group: list[Point], what: str, y: float | None = None) -> None:
    if group:
        heights = [p.y if y is None else y for p in group]
        axes.scatter([p.x for p in group], heights, marker=_CROSSES[what], s=34, color=OTHER)


def draw_traces(axes: Any, study: Study, rows: list[Row]) -> None:
    """The score over training for all trials, with the noise around the best control."""
    colors, noise = Colors(rows), band(rows)
    found = traces(study, rows)
    if noise is not None:
        _draw_band(axes, noise, colors[noise.name], detached=any(trace.detached for trace in found))
    for trace in found:
        cut = len(trace.steps) - trace.detached
        style = _line(trace.is_control) if trace.is_named else {"marker": ".", "linewidth": 0.9}
        label = trace.name if trace.is_named else None
        style |= {"color": colors[trace.name] if trace.is_named else OTHER, "zorder": 3 if trace.is_named else 2}
        axes.plot(trace.steps[:cut], trace.values[:cut], label=label, **style)
        if trace.detached:
            axes.plot(trace.steps[cut:], trace.values[cut:], **style)
        if trace.is_pruned:
            axes.plot(trace.steps[-1:], trace.values[-1:], marker="x", color=OTHER, zorder=2)
    axes.set(xlabel="kimg", ylabel=study.metric)
    _whole_numbers(axes.xaxis)
    if log_is_better(value for trace in found for value in trace.values):
        _log_scale(axes, "y")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _draw_band(axes: Any, noise: Band, color: str, *, detached: bool) -> None:
    """What is `detached` at the end, as the traces are, becomes a bar of its own."""
    cut = len(noise.steps) - detached
    label = f"{noise.name}, {BAND}"
    axes.fill_between(
        noise.steps[:cut], noise.lows[:cut], noise.highs[:cut], color=color, alpha=0.16, linewidth=0, label=label
    )
    axes.vlines(noise.steps[cut:], noise.lows[cut:], noise.highs[cut:], color=color, alpha=0.3, linewidth=7)


def draw_controls(axes: Any, rows: list[Row]) -> None:
    """Each control's runs around their own mean: what the seed alone does."""
    colors, found = Colors(rows), repeats(rows)
    for height, item in enumerate(reversed(found)):
        for values, offset, face, label in (
            (item.training, 0.13, colors[item.name], "training seeds"),
            (item.evaluation, -0.13, _PAPER, "evaluation seeds, one student"),
        ):
            if values:
                around = [value - sum(values) / len(values) for value in values]
                axes.scatter(
                    around, [height + offset] * len(around), s=42, facecolors=face, edgecolors=colors[item.name],
                    linewidths=1.3, label=label if height == len(found) - 1 else None, zorder=3,
                )  # fmt: skip
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set(
        yticks=range(len(found)), yticklabels=[item.name for item in reversed(found)], ylim=(-0.6, len(found) - 0.4),
        xlabel="difference from the control's own mean",
    )  # fmt: skip
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)


def draw_ranks(axes: Any, pairs: list[tuple[float, float]], title: str) -> None:
    """Early rank against final rank, 1 the best."""
    early, final = (ranks([pair[i] for pair in pairs]) for i in (0, 1))
    axes.plot([1, len(pairs)], [1, len(pairs)], color=_GRID, linestyle="--", linewidth=1.2, zorder=1)
    axes.scatter(early, final, s=30, color=OTHER, edgecolors=_INK, linewidths=0.6, zorder=3)
    axes.set(title=title, xlabel="early rank", ylabel="final rank", aspect="equal")
    _whole_numbers(axes.xaxis)
    _whole_numbers(axes.yaxis)


# -- comparisons


def draw_forest(figure: Any, comparison: Comparison, colors: Colors) -> None:
    """The gain of each candidate over each control, one panel a control with a scale of its own."""
    by_control: dict[str, list[Effect]] = {}
    for effect in effects(comparison):
        by_control.setdefault(effect.control, []).append(effect)
    panels = figure.subplots(len(by_control), 1, squeeze=False)[:, 0]
    for axes, (control, group) in zip(panels, by_control.items(), strict=True):
        axes.axvline(0, color=_INK, linewidth=0.9)
        for height, effect in enumerate(reversed(group)):
            _draw_effect(axes, height, effect, colors[effect.candidate])
        axes.set(
            title=f"against {control}", yticks=range(len(group)), ylim=(-0.6, len(group) - 0.4),
            yticklabels=[effect.candidate for effect in reversed(group)],
        )  # fmt: skip
        axes.grid(visible=False, axis="y")
    panels[-1].set_xlabel(f"gain in {comparison.study.metric} on the same seed; right of the line is better")


def _draw_effect(axes: Any, height: float, effect: Effect, color: str) -> None:
    interval = effect.interval
    if interval.count > 1:
        axes.plot([interval.low, interval.high], [height, height], color=color, linewidth=2.6, solid_capstyle="butt")
    axes.scatter(
        effect.by_seed, [height] * len(effect.by_seed), s=26, facecolors=_PAPER, edgecolors=color, linewidths=1.1,
        zorder=3,
    )  # fmt: skip
    axes.scatter([interval.mean], [height], marker="D", s=40, color=color, edgecolors=_INK, linewidths=0.8, zorder=4)


def draw_transfer(axes: Any, comparisons: list[Comparison], colors: Colors, control: str) -> None:
    """The gain over one control by NFE of the target, with intervals."""
    axes.axhline(0, color=_INK, linewidth=0.9)
    names = list(dict.fromkeys(arm.name for item in comparisons for arm in item.arms if arm.name != control))
    names.sort(key=lambda name: not name.startswith("trial-"))
    for number, name in enumerate(names):
        offset = 0.6 * ((number + 0.5) / len(names) - 0.5)
        found = [
            (place + offset, gain) for place, item in enumerate(comparisons) if (gain := gain_over(item, name, control))
        ]
        color = colors[readable(name)]
        axes.errorbar(
            [x for x, _ in found], [gain.mean for _, gain in found],
            yerr=[[_finite(g.mean - g.low) for _, g in found], [_finite(g.high - g.mean) for _, g in found]],
            fmt="o" if name.startswith("trial-") else "D", color=color, elinewidth=2, markeredgecolor=_INK,
            markeredgewidth=0.7, label=readable(name),
        )  # fmt: skip
    axes.set(
        xticks=range(len(comparisons)), xlim=(-0.6, len(comparisons) - 0.4),
        xticklabels=[f"NFE {item.study.spec.method.nfe}" for item in comparisons],
        ylabel=f"gain over {readable(control)}",
    )  # fmt: skip
    axes.grid(visible=False, axis="x")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _finite(half: float) -> float:
    """Half an interval; a single seed has none, which is drawn as none."""
    return half if math.isfinite(half) else 0.0


def _line(is_control: bool) -> dict[str, Any]:
    return {"linestyle": "--", "marker": "D", "markersize": 4.5} if is_control else {"marker": "o", "markersize": 4.5}


def _log_scale(axes: Any, which: str, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """A logarithmic axis with plain numbers, and few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
