"""Rows to tables: the best trials beside the controls, and how far both stand above the noise."""

import math
from dataclasses import asdict, dataclass
from statistics import mean, variance
from typing import Any

from rich.table import Table

from search import quality
from search.records import Row, StudySummary
from search.samplers import importances
from search.space import log_linear_of
from search.spec import Study
from search.storage import StudyStore

_ENOUGH_FINISHED = 50
"""Trials of which a tenth, the best that importances are worked out from, are at least the five that Optuna advises."""


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """How much the metric moves when only the training seed changes: the controls' repeats at one kimg, pooled."""

    step: int
    sd: float
    largest_range: float
    num_seeds: int
    num_controls: int

    @property
    def finding(self) -> float:
        """The smallest difference of two single runs that is no mere noise: 2 standard deviations of a difference."""
        return 2 * math.sqrt(2) * self.sd


def noise_floor(rows: list[Row], step: int | None = None) -> NoiseFloor | None:
    """The spread between training seeds at `step`, by default at the end; None where no control has two seeds."""
    controls = [row for row in rows if row.state == "COMPLETE" and row.is_control]
    if step is None:
        step = max((row.last_step for row in controls if row.last_step is not None), default=0)
    groups = [list(row.over_seeds(step).values()) for row in controls]
    repeats = [values for values in groups if len(values) > 1]
    if not repeats:
        return None
    squares = sum(variance(values) * (len(values) - 1) for values in repeats)
    return NoiseFloor(
        step=step,
        sd=math.sqrt(squares / sum(len(values) - 1 for values in repeats)),
        largest_range=max(max(values) - min(values) for values in repeats),
        num_seeds=min(len(values) for values in repeats),
        num_controls=len(repeats),
    )


def ranked(rows: list[Row], *, searched_only: bool = False) -> list[Row]:
    """Finished rows, best first; equal values by number."""
    finished = [row for row in rows if row.state == "COMPLETE" and row.value is not None]
    return sorted(
        (row for row in finished if row.is_search or not searched_only),
        key=lambda row: (row.value, row.number),
    )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far apart weightings are at one kimg, beside what the training seed alone does there."""

    step: int
    num_weightings: int
    lowest: float
    highest: float
    floor: NoiseFloor | None

    @property
    def range(self) -> float:
        return self.highest - self.lowest

    @property
    def ratio(self) -> float | None:
        """Range in standard deviations between seeds."""
        return self.range / self.floor.sd if self.floor and self.floor.sd > 0 else None


def spreads(rows: list[Row]) -> list[Spread]:
    """At the end, and, where trials were pruned before it, at the last kimg that all trials reached."""
    complete = ranked(rows)
    if len(complete) < 2:
        return []
    last = max(row.last_step or 0 for row in complete)
    shown = [row for row in rows if row.state in ("COMPLETE", "PRUNED") and row.intermediate]
    common = max(set.intersection(*(set(row.intermediate) for row in shown)), default=last)
    found = []
    for step in dict.fromkeys((last, common)):
        values = [row.intermediate[step] for row in shown if step in row.intermediate]
        floor = noise_floor(rows, step)
        found.append(
            Spread(step=step, num_weightings=len(values), lowest=min(values), highest=max(values), floor=floor)
        )
    return found


def spread_table(rows: list[Row]) -> Table:
    """The spread between weightings beside the spread between training seeds."""
    table = Table(title="weightings against noise", title_justify="left", caption_justify="left")
    table.caption = "sd over seeds: of one weighting on other training seeds, pooled over the controls"
    for column in ("kimg", "weightings", "lowest", "highest", "range", "sd over seeds", "range / sd"):
        table.add_column(column, justify="right")
    for item in spreads(rows):
        floor = item.floor
        table.add_row(
            str(item.step),
            str(item.num_weightings),
            _number(item.lowest),
            _number(item.highest),
            f"{item.range:.2g}",
            f"{floor.sd:.2g}" if floor else "not measured",
            f"{item.ratio:.1f}" if item.ratio is not None else "",
        )
    return table


def verdict(rows: list[Row]) -> str:
    """What may be said of the best searched trial: beside the best control, above the noise or not."""
    best, floor = ranked(rows, searched_only=True)[:1], noise_floor(rows)
    controls = [row for row in ranked(rows) if row.is_control]
    if not best or not controls:
        return "no trial to compare with a control yet"
    if floor is None:
        return "the spread between training seeds is not known: raise seeds.control_repeats"
    rival = min(controls, key=lambda row: mean(row.by_seed.values()))  # over its seeds, not by one lucky one
    gain = (rival.value or 0.0) - (best[0].value or 0.0)
    pair = f"best trial {best[0].number} against {rival.role}"
    noise = f"the {floor.finding:.2g} that two single runs may differ by through their seeds alone (2 √2 sd)"
    if gain > floor.finding:
        picked = "it was picked from many, so confirm it on fresh seeds"
        return f"{pair}: better by {gain:.2g}, more than {noise}; {picked}"
    if gain < -floor.finding:
        return f"{pair}: worse by {-gain:.2g}, more than {noise}"
    return f"{pair}: not distinguishable, {-gain:+.2g} lies within {noise}"


def trial_table(store: StudyStore, rows: list[Row], *, top: int | None = 5, wide: bool = True) -> Table:
    """The best trials and all controls, best first, and with `top` of None the pruned ones below.

    A narrow table leaves out what the weights say anyway, rather than cut a name short.
    """
    best = ranked(rows, searched_only=True)
    controls = [row for row in rows if row.is_control and row.state in ("COMPLETE", "RUNNING")]
    pruned = [row for row in rows if row.state == "PRUNED"]
    shown = sorted([*best[:top], *controls], key=lambda row: (row.value is None, row.value, row.number))
    table = Table(title=f"{store.name}: {store.study.metric}, lower is better", title_justify="left")
    axes = list(store.study.spec.space.axes())
    columns = ["trial", "role", *axes, "shares", store.study.metric, "mean over seeds", "state"]
    kept = columns if wide else ["trial", "role", axes[0], "shares", store.study.metric]
    for column in kept:
        table.add_column(column, justify="left" if column in ("role", "shares", "state") else "right", no_wrap=True)
    for row in [*shown, *(pruned if top is None else [])]:
        cells = dict(zip(columns, _cells(row, axes, wide=wide), strict=True))
        style = "dim" if row.state == "PRUNED" else None if row.is_search else "cyan"
        table.add_row(*(cells[column] for column in kept), style=style)
    hidden = len(best) - len(best[:top])
    if top is not None and (hidden or pruned):
        table.caption = f"not shown: {hidden} more that ran to the end, {len(pruned)} pruned"
    return table


def _cells(row: Row, axes: list[str], *, wide: bool) -> tuple[str, ...]:
    is_pruned = row.state == "PRUNED"
    return (
        str(row.number),
        row.role,
        *(_number(row.params.get(axis)) for axis in axes),
        " ".join(f"{share:.3f}" if wide else f"{share:.2f}" for share in row.shares),
        f"({_number(row.value)})" if is_pruned else _number(row.value),
        _over_seeds(row),
        f"PRUNED at {row.last_step} kimg" if is_pruned else row.state,
    )


def curve_of(study: Study, row: Row) -> tuple[float, float] | None:
    """The log-linear (a, b) of a row's weights, whatever family the study searches; None where they have none."""
    if row.is_search and row.params:
        return study.spec.space.curve(row.params, study.num_branches)
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


def curve_table(row: Row) -> Table:
    """The weight curve of one trial, branch by branch."""
    table = Table(title=f"weights of trial {row.number} ({row.role})", title_justify="left")
    for column in ("branch", "weight", "share", ""):
        table.add_column(column, justify="left" if not column else "right")
    for branch, (weight, share) in enumerate(zip(row.weights, row.shares, strict=True), start=1):
        table.add_row(str(branch), f"{weight:.6g}", f"{share:.4f}", "█" * round(40 * share))
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
        "noise_floor": None if floor is None else asdict(floor),
        "notes": notes(store, rows),
        "trials": [trial_object(store.study, row) for row in rows],
    }


def trial_object(study: Study, row: Row) -> dict[str, Any]:
    """A trial as programs read it: `params` are the family's, `a` and `b` the log-linear ones of the same weights."""
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
        "value": row.value,
        "last_step": row.last_step,
        "intermediate": {str(step): value for step, value in sorted(row.intermediate.items())},
        "seeds": list(row.seeds),
        "by_seed": {str(seed): value for seed, value in row.by_seed.items()},
        "repeats": [list(score) for score in row.repeats],
        "duration_s": row.duration_s,
        "reason": row.reason,
        "retry_of": row.retry_of,
        "protocol": row.protocol,
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _over_seeds(row: Row) -> str:
    values = list(row.by_seed.values())
    if len(values) < 2:
        return ""
    return f"{mean(values):.4g} ± {math.sqrt(variance(values)):.2g} (n={len(values)})"
