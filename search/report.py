"""Rows to tables: the best trials beside the controls, and how far both stand above the noise."""

import math
from dataclasses import dataclass
from statistics import mean, variance
from typing import Any

from rich.table import Table

from search.records import Row, StudySummary
from search.storage import StudyStore


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """How much the metric moves when only the training seed changes: the controls' repeats, pooled."""

    sd: float
    largest_range: float
    num_seeds: int
    num_controls: int


def noise_floor(rows: list[Row]) -> NoiseFloor | None:
    """Pooled standard deviation between training seeds, or None where no control has two."""
    repeats = [list(row.by_seed.values()) for row in rows if row.state == "COMPLETE" and len(row.by_seed) > 1]
    if not repeats:
        return None
    weighted = sum(variance(values) * (len(values) - 1) for values in repeats)
    return NoiseFloor(
        sd=math.sqrt(weighted / sum(len(values) - 1 for values in repeats)),
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


def spread_lines(rows: list[Row]) -> list[str]:
    """The spread between weightings and the spread between training seeds, said side by side."""
    values = [row.value for row in ranked(rows) if row.value is not None]
    values += [row.intermediate[row.last_step] for row in rows if row.state == "PRUNED" and row.last_step]
    finished = [row.value for row in ranked(rows) if row.value is not None]
    floor = noise_floor(rows)
    if len(finished) < 2:
        return []
    lines = [f"spread between weightings: {min(finished):.4g} to {max(finished):.4g} among trials run to the end"]
    if len(values) > len(finished):
        lines[0] += f", up to {max(values):.4g} where pruned trials stopped"
    if floor is None:
        lines.append("spread between training seeds: not measured; raise seeds.control_repeats")
        return lines
    ratio = (max(finished) - min(finished)) / floor.sd if floor.sd > 0 else math.inf
    lines.append(
        f"spread between training seeds: standard deviation {floor.sd:.3g}, largest range {floor.largest_range:.3g} "
        f"({floor.num_controls} controls on {floor.num_seeds} seeds each)"
    )
    lines.append(
        f"range between weightings / standard deviation between seeds: {ratio:.1f}; "
        f"differences below about {2 * math.sqrt(2) * floor.sd:.2g} are not findings"
    )
    return lines


def trial_table(store: StudyStore, rows: list[Row], *, top: int | None = 5) -> Table:
    """The best trials and all controls, best first, each with its weights and its seeds."""
    best = ranked(rows, searched_only=True)[:top]
    controls = [row for row in rows if not row.is_search and row.state in ("COMPLETE", "RUNNING")]
    shown = sorted([*best, *controls], key=lambda row: (row.value is None, row.value, row.number))
    table = Table(title=f"{store.name}: {store.study.metric}, lower is better", title_justify="left")
    for column in ("trial", "role", "a", "b", "shares", store.study.metric, "mean over seeds", "state"):
        table.add_column(column, justify="left" if column in ("role", "shares", "state") else "right")
    for row in shown:
        table.add_row(
            str(row.number), row.role, _number(row.params.get("a")), _number(row.params.get("b")),
            " ".join(f"{share:.3f}" for share in row.shares), _number(row.value), _over_seeds(row), row.state,
            style=None if row.is_search else "cyan",
        )  # fmt: skip
    return table


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
    for column in ("study", "metric", "trials", "controls", "running", "failed", "best", "created"):
        table.add_column(column)
    for item in summaries:
        counts = item.counts
        table.add_row(
            item.name, item.metric, str(counts.counted), str(counts.controls_done), str(counts.running),
            str(counts.failed), _number(item.best), item.created,
        )  # fmt: skip
    return table


def show_object(store: StudyStore, rows: list[Row]) -> dict[str, Any]:
    """What `show --format json` prints."""
    floor = noise_floor(rows)
    return {
        "study": store.name,
        "directions": ["minimize"],
        "metric": store.study.metric,
        "noise_floor": None if floor is None else {"sd": floor.sd, "largest_range": floor.largest_range},
        "trials": [trial_object(row) for row in rows],
    }


def trial_object(row: Row) -> dict[str, Any]:
    return {
        "number": row.number,
        "state": row.state,
        "role": row.role,
        "a": row.params.get("a"),
        "b": row.params.get("b"),
        "weights": list(row.weights),
        "shares": list(row.shares),
        "value": row.value,
        "last_step": row.last_step,
        "intermediate": {str(step): value for step, value in sorted(row.intermediate.items())},
        "seeds": list(row.seeds),
        "by_seed": {str(seed): value for seed, value in row.by_seed.items()},
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
