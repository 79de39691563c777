"""Pictures of a study: the weight curves of its best trials, and the map of its axes with values.

What is drawn is decided once, in `curves` and `points`; plotly draws it for optuna-dashboard, matplotlib for files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense_core.files import write_atomically
from search.errors import NothingFinished
from search.records import Row
from search.report import noise_floor, ranked
from search.space import free_axes
from search.spec import Study
from search.storage import StudyStore

NUM_CURVES = 3
_CURVES, _MAP = "bdense-weight-curves", "bdense-map"
_COLORS = ("#1f77b4", "#17becf", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#7f7f7f")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Shares of one trial's branches, first to last."""

    number: int
    label: str
    shares: tuple[float, ...]
    is_control: bool


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trial on the map: in the plane of two axes, or above a single one."""

    x: float
    y: float
    value: float
    label: str
    pruned: bool
    is_control: bool


def curves(rows: list[Row]) -> list[Curve]:
    """The best searched trials and every control, best first."""
    shown = ranked(rows, searched_only=True)[:NUM_CURVES] + [row for row in ranked(rows) if row.is_control]
    return [
        Curve(number=row.number, label=f"{_name(row)}: {row.value:.3g}", shares=row.shares, is_control=row.is_control)
        for row in sorted(shown, key=lambda row: (row.value, row.number))
    ]


def map_axes(study: Study) -> tuple[str, str]:
    """What the map shows along x and y: the first two searched axes, or a single one and the metric."""
    axes = list(free_axes(study.spec.space) or study.spec.space.axes())
    return (axes[0], axes[1]) if len(axes) > 1 else (axes[0], study.metric)


def points(study: Study, rows: list[Row]) -> list[Point]:
    """Every finished or pruned trial that has a place on the map, at its last value."""
    x, y = map_axes(study)
    return [
        Point(
            x=row.params[x], y=row.params.get(y, row.value), value=row.value, label=_name(row),
            pruned=row.state == "PRUNED", is_control=row.is_control,
        )
        for row in rows
        if row.value is not None and {x, y} <= {*row.params, study.metric}
    ]  # fmt: skip


def save_to_dashboard(store: StudyStore) -> None:
    """Put both figures into the study's attributes, where optuna-dashboard shows them."""
    from optuna_dashboard import save_plotly_graph_object

    rows = store.rows()
    if not ranked(rows):
        return
    for identity, figure in ((_CURVES, _plotly_curves(store, rows)), (_MAP, _plotly_map(store, rows))):
        save_plotly_graph_object(store.optuna_study, figure, graph_object_id=identity)


def save_png(store: StudyStore, path: Path) -> None:
    """Draw both figures, and the scores over training, into one PNG.

    Raises:
        NothingFinished: no trial has run to its end.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = store.rows()
    if not ranked(rows):
        raise NothingFinished(f"study {store.name!r} has no finished trial to draw yet")
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _draw_curves(left, rows)
    _draw_map(middle, store.study, rows)
    _draw_scores(right, rows, store.study.metric)
    figure.suptitle(_title(store, rows))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _title(store: StudyStore, rows: list[Row]) -> str:
    floor = noise_floor(rows)
    noise = "noise floor not measured" if floor is None else f"sd between training seeds {floor.sd:.2g}"
    return f"{store.name}: {store.study.metric}, {noise}"


def _name(row: Row) -> str:
    return f"trial {row.number}" if row.is_search else row.role.removeprefix("control:").replace("_", " ")


def _plotly_curves(store: StudyStore, rows: list[Row]) -> Any:
    from plotly import graph_objects

    figure = graph_objects.Figure(layout=_layout("Weight curves (shares): " + _title(store, rows), "branch", "share"))
    for index, curve in enumerate(curves(rows)):
        figure.add_scatter(
            x=list(range(1, len(curve.shares) + 1)), y=list(curve.shares), name=curve.label, mode="lines+markers",
            line={"dash": "dash" if curve.is_control else "solid", "color": _COLORS[index % len(_COLORS)]},
        )  # fmt: skip
    figure.update_xaxes(dtick=1)
    return figure


def _plotly_map(store: StudyStore, rows: list[Row]) -> Any:
    from plotly import graph_objects

    drawn, (x, y) = points(store.study, rows), map_axes(store.study)
    figure = graph_objects.Figure(layout=_layout(f"Map of {x} and {y}: {_title(store, rows)}", x, y))
    figure.add_scatter(
        x=[p.x for p in drawn], y=[p.y for p in drawn], mode="markers+text",
        text=[f"{p.value:.3g}" for p in drawn], textposition="top center", showlegend=False,
        hovertext=[f"{p.label}{' (pruned)' if p.pruned else ''}: {p.value:.4g}" for p in drawn],
        marker={
            "color": [p.value for p in drawn], "colorscale": "Viridis", "size": 12, "showscale": True,
            "colorbar": {"title": {"text": store.study.metric}},
            "symbol": ["x" if p.pruned else "diamond" if p.is_control else "circle" for p in drawn],
        },
    )  # fmt: skip
    figure.add_annotation(
        text="○ searched  × pruned, at its last value  ◇ control", showarrow=False, xref="paper", yref="paper",
        x=0, y=1.06, xanchor="left",
    )  # fmt: skip
    return figure


def _layout(title: str, x: str, y: str) -> dict[str, Any]:
    return {
        "template": None, "title": {"text": title, "font": {"size": 14}}, "height": 460,
        "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}},
    }  # fmt: skip


def _draw_curves(axes: Any, rows: list[Row]) -> None:
    for curve, color in zip(curves(rows), _COLORS, strict=False):
        style = "--" if curve.is_control else "-"
        branches = range(1, len(curve.shares) + 1)
        axes.plot(branches, curve.shares, style, marker="o", label=curve.label, color=color)
    axes.set(title="weight curves", xlabel="branch", ylabel="share", xticks=list(branches))
    axes.legend(fontsize=8)


def _draw_map(axes: Any, study: Study, rows: list[Row]) -> None:
    drawn, (x, y) = points(study, rows), map_axes(study)
    if not drawn:
        axes.set(title=f"map of {x} and {y}: no points yet")
        return
    low, high = min(p.value for p in drawn), max(p.value for p in drawn)
    for marker, kind in (("o", "searched"), ("x", "pruned"), ("D", "control")):
        group = [p for p in drawn if _kind(p) == kind]
        if not group:
            continue
        dots = axes.scatter(
            [p.x for p in group], [p.y for p in group], c=[p.value for p in group], marker=marker, s=60,
            cmap="viridis", vmin=low, vmax=high, label=kind,
        )  # fmt: skip
    for p in drawn:
        axes.annotate(f"{p.value:.3g}", (p.x, p.y), textcoords="offset points", xytext=(4, 5), fontsize=7)
    axes.figure.colorbar(dots, ax=axes, label=study.metric)
    axes.set(title=f"map of {x} and {y}; pruned trials at their last value", xlabel=x, ylabel=y)
    axes.legend(fontsize=8)


def _kind(point: Point) -> str:
    return "control" if point.is_control else "pruned" if point.pruned else "searched"


def _draw_scores(axes: Any, rows: list[Row], metric: str) -> None:
    colors = {curve.number: color for curve, color in zip(curves(rows), _COLORS, strict=False)}
    for row in rows:
        if not row.intermediate:
            continue
        steps = sorted(row.intermediate)
        highlighted = row.number in colors
        axes.plot(
            steps, [row.intermediate[step] for step in steps], "--" if row.is_control else "-",
            marker="x" if row.state == "PRUNED" else ".", color=colors.get(row.number, "0.75"),
            label=_name(row) if highlighted else None, zorder=2 if highlighted else 1,
        )  # fmt: skip
    axes.set(title="score while training", xlabel="kimg", ylabel=metric, yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=8)
