"""The trials of a study, one a line: for people, programs and spreadsheets."""

import csv
import io
import json
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from search import report
from search.labels import settings_text
from search.records import Row
from search.spec import Study

_OF_THE_TRIAL = (
    "number", "state", "role", "params", "a", "b", "weights", "schedule", "rule", "settings", "value", "metrics",
    "violated", "last_step", "seeds",
)  # fmt: skip
_KEYS = (
    *_OF_THE_TRIAL, "duration_s", "started", "ended", "node", "owner", "retry_of", "resumed_from", "enqueued", "code",
    "protocol", "reason", "notes",
)  # fmt: skip

_WORDS = ("state", "role", "node", "reason")
"""Columns of words."""


def trial_record(study: Study, row: Row) -> dict[str, Any]:
    """A trial as `trials` prints it."""
    known = report.trial_object(study, row)
    return {
        **{key: known[key] for key in _OF_THE_TRIAL},
        "duration_s": row.duration_s,
        "started": _moment(row.started),
        "ended": _moment(row.ended),
        "node": row.progress.get("node"),
        "owner": row.owner,
        "retry_of": row.retry_of,
        "resumed_from": row.resumed_from,
        "enqueued": row.is_enqueued,
        "code": row.code,
        "protocol": row.protocol,
        "reason": row.reason,
        "notes": list(row.notes),
    }


def trials_csv(study: Study, rows: list[Row]) -> str:
    """One line for each trial: its record, with a column for each loss term's weight. What is not known is empty.

    Parameters, schedule, settings and further figures are JSON, and empty where there are none.
    """
    lines = [_flat(trial_record(study, row), study.num_branches) for row in rows]
    text = io.StringIO()
    columns = _flat(dict.fromkeys(_KEYS), study.num_branches)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(record: dict[str, Any], num_terms: int) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if key == "weights":
            flat |= {f"weight_{term}": None for term in range(num_terms)}
            flat |= {f"weight_{term}": weight for term, weight in enumerate(value or ())}
        elif key in ("params", "schedule", "settings", "metrics"):
            flat[key] = json.dumps(value) if value else None
        elif isinstance(value, list):
            flat[key] = ("; " if key == "notes" else " ").join(str(item) for item in value)
        else:
            flat[key] = str(value).lower() if isinstance(value, bool) else value
    return flat


def trials_table(study: Study, rows: list[Row]) -> Table:
    """One line for each trial, by number."""
    table = Table(title=f"{study.name}: {study.metric}", title_justify="left")
    settings = ["settings"] if any(row.settings for row in rows) else []
    columns = ("a", "b", *settings, "value", "kimg", "seconds", "node", "retry of", "reason")
    for column in ("trial", "state", "role", *columns):
        table.add_column(column, justify="left" if column in (*settings, *_WORDS) else "right")
    for row in rows:
        known = trial_record(study, row)
        known["settings"] = settings_text(row.settings)
        numbers = ("a", "b", *settings, "value", "last_step", "duration_s")
        misses = [f"misses {', '.join(row.violated)}"] if row.violated else []
        table.add_row(
            str(row.number), row.state, row.role, *(_text(known[key]) for key in numbers),
            known["node"], _text(row.retry_of), Text(row.reason or "; ".join([*misses, *row.notes])),
        )  # fmt: skip
    return table


def _text(value: float | str | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")
