"""Rows to tables: the best trials beside the controls, and how far both stand above the noise."""

from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from rich.markup import escape  # figures are called fd[guidance=1], for example
from rich.table import Table

from search import quality
from search.labels import settings_text, term_labels, value_text
from search.noise import (
    infeasible,
    is_of_other_samples,
    noise_floor,
    noise_line,
    ranked,
    rungs,
    samples_at,
    spreads,
    verdict,
    what_differs,
)
from search.records import Row, StudySummary
from search.samplers import importances
from search.space import log_linear_of
from search.spec import Study
from search.statistics import Correlation
from search.storage import StudyStore

_ENOUGH_FINISHED = 50
"""Trials of which a tenth, the best that importances are worked out from, are at least the five that Optuna advises."""


def spread_table(study: Study, rows: list[Row]) -> Table:
    """The spread between weightings beside the spread between training seeds."""
    table = Table(title="weightings against noise", title_justify="left", caption_justify="left")
    table.caption = (
        "sd over seeds: of one weighting on other training seeds, pooled over the controls; paired sd: of one run "
        "beside the others on its own seed"
    )
    columns = (
        "kimg",
        "samples",
        "weightings",
        "lowest",
        "highest",
        "range",
        "sd over seeds",
        "paired sd",
        "range / sd",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for item in spreads(rows):
        floor = item.floor
        table.add_row(
            str(item.step),
            _count(samples_at(study, item.step)),
            str(item.num_weightings),
            _number(item.lowest),
            _number(item.highest),
            f"{item.range:.2g}",
            f"{floor.sd:.2g}" if floor else "not measured",
            f"{floor.paired_sd:.2g}" if floor and floor.paired_sd is not None else "",
            f"{item.ratio:.1f}" if item.ratio is not None else "",
        )
    return table


def rung_table(study: Study, rows: list[Row]) -> Table:
    """How well scores on the way foretell the final one."""
    table = Table(title="scores on the way against the final one", title_justify="left", caption_justify="left")
    table.caption = (
        f"Spearman's rank correlation with the final {study.metric}, its 95% interval, and the number of weightings: "
        "only those that ran to the end, and among survivors it tends to be lower than among all"
    )
    for column in ("kimg", "samples", study.metric, "distance to the teacher"):
        table.add_column(column, justify="right")
    for rung in rungs(study, rows):
        table.add_row(str(rung.step), _count(rung.samples), _correlation(rung.metric), _correlation(rung.surrogate))
    return table


def _correlation(found: Correlation | None) -> str:
    return "" if found is None else f"{found.rho:.2f} ({found.low:.2f} to {found.high:.2f}, n={found.count})"


def trial_table(store: StudyStore, rows: list[Row], *, top: int | None = 5, wide: bool = True) -> Table:
    """The best trials and all controls, best first; below them trials that violate a constraint, and with `top` of
    None the pruned ones.

    A narrow table leaves out what the weights say anyway, rather than cut a name short; what a trial violates then
    stands for its role.
    """
    best, refused = ranked(rows, searched_only=True), infeasible(rows)
    controls = [row for row in rows if row.is_control and row.state in ("COMPLETE", "RUNNING")]
    pruned = [row for row in rows if row.state == "PRUNED"]
    shown = sorted([*best[:top], *controls], key=lambda row: (row.value is None, row.value, row.number))
    table = Table(title=f"{store.name}: {store.study.metric}, lower is better", title_justify="left")
    axes = list(store.study.spec.axes)
    listed = [*shown, *refused[:top], *(pruned if top is None else [])]
    columns = ["trial", "role", *axes, "shares", "settings", store.study.metric, "mean over seeds", "state"]
    settings = ["settings"] if any(row.settings for row in listed) else []
    narrow = ["trial", "role", *([] if settings else axes[:1]), "shares", *settings, store.study.metric]
    kept = [column for column in columns if column != "settings" or settings] if wide else narrow
    longest = max((len(word) for row in listed for word in settings_text(row.settings).split()), default=0)
    for column in kept:
        is_left, is_long = column in ("role", "shares", "settings", "state"), column == "settings"
        table.add_column(
            column, justify="left" if is_left else "right", no_wrap=not is_long, min_width=longest if is_long else None
        )
    for row in listed:
        cells = dict(zip(columns, _cells(store.study, row, axes, wide=wide), strict=True))
        style = "cyan" if not row.is_search else "dim" if row.state == "PRUNED" or row.violated else None
        table.add_row(*(cells[column] for column in kept), style=style)
    hidden = len(best) + len(refused) - len(best[:top]) - len(refused[:top])
    table.caption = noise_line(noise_floor(rows))
    if top is not None and (hidden or pruned):
        table.caption += f"\nnot shown: {hidden} more that ran to the end, {len(pruned)} pruned"
    return table


def metrics_table(study: Study, rows: list[Row], *, top: int | None = 5) -> Table | None:
    """The figures beside the metric, of the best trials, the controls and what violates a constraint; None without any.

    They are of each run's first training seed.
    """
    refused = infeasible(rows)[:top]
    chosen = {row.number for row in (*ranked(rows, searched_only=True)[:top], *refused)}
    shown = [row for row in ranked(rows) if row.metrics and (row.is_control or row.number in chosen)]
    if not shown:
        return None
    meanings = study.spec.method.metrics()
    names = list(dict.fromkeys([*meanings, *(name for row in shown for name in row.metrics)]))
    names = [name for name in names if any(name in row.metrics for row in shown)]
    table = Table(title=f"{study.name}: further figures", title_justify="left", caption_justify="left")
    lines = [f"{name}: {meanings[name]}{_bounds(study, name)}" for name in names if name in meanings]
    table.caption = escape("\n".join(lines))
    for column in ("trial", "role", *map(escape, names)):
        table.add_column(column, justify="left" if column == "role" else "right")
    for row in shown:
        style = "cyan" if row.is_control else "dim" if row.violated else None
        table.add_row(str(row.number), row.role, *(_number(row.metrics.get(name)) for name in names), style=style)
    return table


def _bounds(study: Study, name: str) -> str:
    """What the study asks of a figure."""
    if (asked := study.spec.constraints.get(name)) is None:
        return ""
    bounds = [("at least", asked.min), ("at most", asked.max)]
    return " (has to be " + " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None) + ")"


def _cells(study: Study, row: Row, axes: list[str], *, wide: bool) -> tuple[str, ...]:
    value, state = _number(row.value), row.state
    if row.state == "PRUNED" and row.last_step is not None:
        value, state = f"({value})", f"PRUNED at {row.last_step} kimg"
        if is_of_other_samples(study, row):
            value, state = "", f"{state} with {_number(row.value)} {what_differs(study, row.last_step)}"
    if row.violated:
        state = escape(f"violates {', '.join(row.violated)}")
    return (
        str(row.number),
        state if row.violated and row.is_search and not wide else row.role,
        *(value_text(row.params[axis]) if axis in row.params else "" for axis in axes),
        " ".join(f"{share:.3f}" if wide else f"{share:.2f}" for share in row.shares if row.is_trained),
        escape(settings_text(row.settings)),
        value,
        _over_seeds(row),
        state,
    )


def curve_of(study: Study, row: Row) -> tuple[float, float] | None:
    """The log-linear (a, b) of a row's weights, whatever family the study searches; None where they have none."""
    if row.schedule:
        return None
    if row.is_search and row.params:
        of_weights = {axis: float(row.params[axis]) for axis in study.spec.axes}
        return study.spec.space.curve(of_weights, study.num_branches)
    return log_linear_of(row.weights, index_origin=study.spec.space.index_origin)


def notes(store: StudyStore, rows: list[Row]) -> list[str]:
    """One line each: how the study's space may mislead, what its best trial says about it, and which axis mattered."""
    found = [*quality.notes(store.study), *quality.findings(store.study, rows)]
    if shares_of_axes := importances(store.optuna_study, store.study):
        found.append(importance_line(shares_of_axes, len(ranked(rows, searched_only=True))))
    return found


def importance_line(shares_of_axes: dict[str, float], num_finished: int) -> str:
    """Parameter importances for people, with a caution where few trials stand behind them."""
    values = ", ".join(f"{axis} {share:.0%}" for axis, share in shares_of_axes.items())
    line = f"importance of the axes, from {num_finished} finished trials: {values}"
    if num_finished < _ENOUGH_FINISHED:
        line += f"; from fewer than {_ENOUGH_FINISHED}, hardly more than noise"
    return line


def curve_table(study: Study, row: Row) -> Table:
    """The weight curve of one trial, term by term."""
    kind, names = term_labels(study.spec.method.terms)
    table = Table(title=f"weights of trial {row.number} ({row.role})", title_justify="left")
    for column in (kind, "weight", "share", ""):
        table.add_column(column, justify="left" if not column else "right")
    for name, weight, share in zip(names, row.weights, row.shares, strict=True):
        table.add_row(name, f"{weight:.6g}", f"{share:.4f}", "█" * round(40 * share))
    return table


def study_table(summaries: list[StudySummary]) -> Table:
    """One line a study."""
    table = Table()
    for column in ("study", "metric", "trials", "controls", "running", "waiting", "failed", "best", "created"):
        table.add_column(column, no_wrap=column != "created")
    for item in summaries:
        counts = item.counts
        table.add_row(
            item.name, item.metric, str(counts.counted), str(counts.controls_done), str(counts.running),
            str(counts.waiting), str(counts.failed), _number(item.best), item.created,
        )  # fmt: skip
    return table


def show_object(store: StudyStore, rows: list[Row]) -> dict[str, Any]:
    """What `show --format json` prints."""
    floor = noise_floor(rows)
    return {
        "study": store.name,
        "directions": ["minimize"],
        "metric": store.study.metric,
        "metrics": store.study.spec.method.metrics(),
        "terms": list(store.study.spec.method.terms),
        "noise_floor": None if floor is None else asdict(floor),
        "rungs": [asdict(rung) for rung in rungs(store.study, rows)],
        "verdict": verdict(store.study, rows),
        "notes": notes(store, rows),
        "trials": [trial_object(store.study, row) for row in rows],
    }


def trial_object(study: Study, row: Row) -> dict[str, Any]:
    """A trial as programs read it: `params` are the family's and the tuned settings', `a` and `b` the log-linear ones
    of the same weights, `metrics` the figures beside the metric.

    What was pruned at an early score of other samples has no value, nor any by seed; `intermediate` has its scores.
    """
    is_other = is_of_other_samples(study, row)
    a, b = curve_of(study, row) or (None, None)
    return {
        "number": row.number,
        "state": row.state,
        "role": row.role,
        "params": row.params,
        "a": a,
        "b": b,
        "weights": list(row.weights),
        "shares": list(row.shares),
        "settings": row.settings,
        "is_trained": row.is_trained,
        "schedule": [[list(weights) for weights in intervals] for intervals in row.schedule],
        "rule": row.rule,
        "shares_learned": list(row.shares_learned),
        "value": None if is_other else row.value,
        "last_step": row.last_step,
        "intermediate": {str(step): value for step, value in sorted(row.intermediate.items())},
        "surrogate": {str(step): value for step, value in sorted(row.surrogate.items())},
        "evaluations": list(row.evaluations),
        "metrics": row.metrics,
        "violated": list(row.violated),
        "seeds": list(row.seeds),
        "by_seed": {} if is_other else {str(seed): value for seed, value in row.by_seed.items()},
        "repeats": [list(score) for score in row.repeats],
        "duration_s": row.duration_s,
        "reason": row.reason,
        "retry_of": row.retry_of,
        "protocol": row.protocol,
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _over_seeds(row: Row) -> str:
    values = list(row.by_seed.values())
    if len(values) < 2:
        return ""
    return f"{mean(values):.4g} ± {stdev(values):.2g} (n={len(values)})"
