"""Pictures of a study where people watch it: in optuna-dashboard, drawn by plotly, and in one PNG file.

What is drawn is decided in `marks`.
"""

from pathlib import Path
from statistics import mean
from typing import Any

from bdense_core.files import write_bytes_atomically
from bdense_core.methods.base import Axis
from search import marks, plots
from search.comparison import Comparison, compare
from search.errors import NothingFinished
from search.labels import term_labels, value_text
from search.marks import Colors, map_axes, points
from search.noise import noise_floor, ranked, rungs
from search.records import Row
from search.spec import Study
from search.storage import Studies, StudyStore

_CURVES, _MAP, _TRAINING = "bdense-weight-curves", "bdense-map", "bdense-training"
_NOISE, _EARLY = "bdense-noise", "bdense-early-scores"
_COMPARISON = {"confirm": "bdense-confirmation", "transfer": "bdense-transfer"}
_SIZE = (16.0, 4.8)


def save_to_dashboard(store: StudyStore) -> None:
    """Put a study's figures into its attributes, where optuna-dashboard shows them.

    A comparison's figure goes to the study whose weightings it compares as well.
    """
    rows = store.rows()
    if store.study.spec.comparison is not None:
        _save_comparison(store, compare(store.study, rows))
    elif ranked(rows):
        _save(store, _CURVES, _curves(store.study, rows))
        _save(store, _MAP, _map(store.study, rows))
        _save(store, _TRAINING, _training(store.study, rows))
        if marks.repeats(rows):
            _save(store, _NOISE, _noise(store.study, rows))
        if any(rung.metric or rung.surrogate for rung in rungs(store.study, rows)):
            _save(store, _EARLY, _early(store.study, rows))


def _save_comparison(store: StudyStore, comparison: Comparison) -> None:
    section, studies = store.study.spec.comparison, Studies(store.database)
    if section is None or not marks.effects(comparison):
        return
    source = studies.open(section.of) if section.of in studies.names() else None
    if source is not None and source.created != section.of_created:
        source = None  # another study of that name
    figure, identity = _forest(comparison, Colors(source.rows() if source else [])), _COMPARISON[section.kind]
    _save(store, identity, figure)
    if source is not None:  # which has one confirmation, and a transfer for each target and NFE
        _save(source, identity if section.kind == "confirm" else f"{identity}-{store.name}", figure)


def _save(store: StudyStore, identity: str, figure: Any) -> None:
    from optuna_dashboard import save_plotly_graph_object

    save_plotly_graph_object(store.optuna_study, figure, graph_object_id=identity)


def save_png(store: StudyStore, path: Path) -> None:
    """Draw weight curves, map and scores over training into one PNG.

    Raises:
        NothingFinished: no trial has run to its end.
        OSError: the file cannot be written.
    """
    study, rows = store.study, store.rows()
    if not ranked(rows):
        raise NothingFinished(f"study {store.name!r} has no finished trial to draw yet")

    def draw(figure: plots.Figure) -> None:
        left, middle, right = figure.subplots(1, 3)
        plots.draw_curves(left, study, rows)
        plots.draw_map(middle, study, rows)
        plots.draw_traces(right, study, rows)
        figure.suptitle(_title(study, rows))

    write_bytes_atomically(path, plots.png(_SIZE, draw))


def _title(study: Study, rows: list[Row]) -> str:
    floor = noise_floor(rows)
    noise = "noise floor not measured" if floor is None else f"sd between training seeds {floor.sd:.2g}"
    return f"{study.name}: {study.metric}, {noise}"


# -- plotly


def _curves(study: Study, rows: list[Row]) -> Any:
    kind, names = term_labels(study.spec.method.terms)
    figure, colors = _figure("Weight curves (shares): " + _title(study, rows), kind, "share"), Colors(rows)
    for curve in marks.curves(rows):
        figure.add_scatter(
            x=list(names), y=list(curve.shares), name=curve.label, mode="lines+markers",
            line=_line(curve.is_control, colors[curve.name]),
        )  # fmt: skip
    figure.update_xaxes(type="category")
    return figure


def _map(study: Study, rows: list[Row]) -> Any:
    drawn, (x, y) = points(study, rows), map_axes(study)
    figure = _figure(f"Map of {x} and {y}: {_title(study, rows)}", x, y)
    ended = [p for p in drawn if p.value is not None and not p.violates]
    values = [p.value for p in ended if p.value is not None]
    ends = {"cmin": min(values), "cmax": marks.scale_end(values)} if values else {}
    figure.add_scatter(
        x=[p.x for p in ended], y=[p.y for p in ended], mode="markers+text", text=[f"{p.value:.3g}" for p in ended],
        textposition="top center", hovertext=[f"{p.label}: {p.value:.4g}" for p in ended], showlegend=False,
        marker={
            "color": values, "colorscale": "Viridis", "size": 12, **ends,
            "symbol": ["diamond" if p.is_control else "circle" for p in ended],
            "showscale": True, "colorbar": {"title": {"text": study.metric}},
        },
    )  # fmt: skip
    crosses = {
        ("stopped early", "x-thin-open"): [p for p in drawn if p.pruned and p.y is not None],
        ("violates a constraint", "cross-thin-open"): [p for p in drawn if p.violates and not p.pruned],
    }
    for (name, symbol), group in crosses.items():
        if group:
            figure.add_scatter(
                x=[p.x for p in group], y=[p.y for p in group], mode="markers", name=name, showlegend=True,
                hovertext=[p.label for p in group], marker={"color": marks.OTHER, "symbol": symbol, "size": 9},
            )  # fmt: skip
    figure.update_xaxes(**_scale(study.spec.searched.get(x)))
    figure.update_yaxes(**_scale(study.spec.searched.get(y)))
    note = "◇ control"
    if flat := marks.flat_axis(study):
        across, along = ("xaxis", "yaxis") if flat == y else ("yaxis", "xaxis")
        dashed = {"showgrid": True, "griddash": "dash", "gridcolor": marks.OTHER}
        figure.update_layout({across: dashed, along: {"showgrid": False}})
        note += f" · dashed lines: equal shares, {flat} is flat"
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    figure.add_annotation(text=note, showarrow=False, xref="paper", yref="paper", x=0, y=1.07, xanchor="left")
    return figure


def _scale(axis: Axis | None) -> dict[str, Any]:
    """Choices by their names, and logarithmic where the search is."""
    if axis is not None and axis.choices:
        return {"tickvals": list(range(len(axis.choices))), "ticktext": list(map(value_text, axis.choices))}
    return {"type": "log"} if axis is not None and axis.log else {}


def _training(study: Study, rows: list[Row]) -> Any:
    figure, colors = _figure(f"{study.metric} over training: {_title(study, rows)}", "kimg", study.metric), Colors(rows)
    found = marks.traces(study, rows)
    if (noise := marks.band(rows)) is not None:
        cut = len(noise.steps) - any(trace.detached for trace in found)
        steps, lows, highs = noise.steps[:cut], noise.lows[:cut], noise.highs[:cut]
        figure.add_scatter(
            x=[*steps, *reversed(steps)], y=[*highs, *reversed(lows)], fill="toself",
            mode="lines", line={"width": 0}, fillcolor=colors[noise.name], opacity=0.25, hoverinfo="skip",
            name=f"{noise.name}, {marks.BAND}",
        )  # fmt: skip
    for trace in found:
        color = colors[trace.name] if trace.is_named else marks.OTHER
        x, y = list(trace.steps), list[float | None](trace.values)
        if trace.detached:  # a gap: the last score is of more samples
            x.insert(-1, x[-1])
            y.insert(-1, None)
        figure.add_scatter(
            x=x, y=y, name=trace.name, showlegend=trace.is_named, line=_line(trace.is_control, color),
            mode="lines+markers", opacity=1.0 if trace.is_named else 0.5,
            marker={"symbol": "x" if trace.is_pruned else "circle"},
        )  # fmt: skip
    if marks.log_is_better(value for trace in found for value in trace.values):
        figure.update_yaxes(type="log")
    return figure


def _noise(study: Study, rows: list[Row]) -> Any:
    """Each control's runs around their own mean: what the seed alone does."""
    figure = _figure(f"The noise floor: {_title(study, rows)}", "difference from the control's own mean", "")
    colors, found = Colors(rows), marks.repeats(rows)
    for what, symbol, values in (
        ("training seeds", "circle", {item.name: item.training for item in found}),
        ("evaluation seeds, one student", "circle-open", {item.name: item.evaluation for item in found}),
    ):
        dots = [(name, value - mean(scores)) for name, scores in values.items() for value in scores]
        figure.add_scatter(
            x=[around for _, around in dots], y=[name for name, _ in dots], mode="markers", name=what,
            marker={"color": [colors[name] for name, _ in dots], "symbol": symbol, "size": 9},
        )  # fmt: skip
    figure.add_vline(x=0, line={"width": 1})
    figure.update_yaxes(automargin=True)
    return figure


def _early(study: Study, rows: list[Row]) -> Any:
    """How far scores on the way, and the distance to the teacher, order the weightings as the final score does."""
    title = f"Rank correlation with the final {study.metric}, 95 % intervals: {_title(study, rows)}"
    figure, found = _figure(title, "kimg", "Spearman's rank correlation"), rungs(study, rows)
    for name, by_kimg in (
        (study.metric, {rung.step: rung.metric for rung in found}),
        ("distance to the teacher", {rung.step: rung.surrogate for rung in found}),
    ):
        known = {step: of for step, of in by_kimg.items() if of is not None}
        bars = {
            "array": [of.high - of.rho for of in known.values()],
            "arrayminus": [of.rho - of.low for of in known.values()],
        }
        figure.add_scatter(
            x=list(known), y=[of.rho for of in known.values()], name=name, mode="lines+markers", error_y=bars
        )
    figure.update_yaxes(range=[-1.05, 1.05])
    return figure


def _forest(comparison: Comparison, colors: Colors) -> Any:
    """One line for each candidate and control. Scales are shared here: the dashboard can zoom."""
    metric = comparison.study.metric
    figure = _figure(f"{comparison.study.name}: {comparison.verdict}", f"gain in {metric} on the same seed", "")
    for effect in reversed(marks.effects(comparison)):
        interval, color = effect.interval, colors[effect.candidate]
        label = f"{effect.candidate} against {effect.control}"
        bars = {"array": [interval.high - interval.mean], "arrayminus": [interval.mean - interval.low], "color": color}
        figure.add_scatter(
            x=[interval.mean], y=[label], mode="markers", showlegend=False, hovertext=f"mean of {interval.count}",
            error_x=bars if interval.count > 1 else None, marker={"color": color, "symbol": "diamond", "size": 11},
        )  # fmt: skip
        figure.add_scatter(
            x=list(effect.by_seed), y=[label] * len(effect.by_seed), mode="markers", showlegend=False,
            marker={"color": color, "symbol": "circle-open", "size": 7},
        )  # fmt: skip
    figure.add_vline(x=0, line={"width": 1})
    figure.update_yaxes(automargin=True)
    return figure


def _figure(title: str, x: str, y: str) -> Any:
    from plotly import graph_objects

    layout = {
        "template": None, "title": {"text": title, "font": {"size": 14}}, "height": 460,
        "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}},
    }  # fmt: skip
    return graph_objects.Figure(layout=layout)


def _line(is_control: bool, color: str) -> dict[str, str]:
    return {"dash": "dash" if is_control else "solid", "color": color}
