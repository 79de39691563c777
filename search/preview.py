"""After a study: what its trials were expected to take, beside what they took."""

from collections import defaultdict
from typing import Any

from search import throughput
from search.plan import Cost, devices, is_cached
from search.records import Row
from search.settings import Settings
from search.spec import Study
from search.throughput import Throughput


def preview(study: Study, rows: list[Row], settings: Settings) -> dict[str, Any] | None:
    """Device hours expected and used by the trials that have ended; None unless the study's speed was measured here.

    Like with like: a trial that was pruned is expected to take what leads to its last score, and the teacher is asked
    once for each seed that was run where trials share it. Trials that failed, or went on from a checkpoint, are left
    out on both sides. What was used is from a trial's start to its end, with the starting of its process, the loading
    of files and the distance itself, which nothing here expects.
    """
    found = throughput.stored(study, settings)
    ended = [row for row in rows if row.state in ("COMPLETE", "PRUNED") and row.resumed_from is None and row.duration_s]
    if found is None or not ended:
        return None
    expected = _expected_s(study, ended, found) * devices(study) / 3600
    used = sum(row.duration_s or 0.0 for row in ended) * devices(study) / 3600
    return {
        "trials": len(ended),
        "expected_device_hours": expected,
        "used_device_hours": used,
        "error": used / expected - 1 if expected else None,
        "source": found.source,
    }


def line(found: dict[str, Any]) -> str:
    """A preview in one line for people."""
    error = "" if found["error"] is None else f" ({100 * found['error']:+.0f} %)"
    return (
        f"preview: {found['expected_device_hours']:.3g} device hours were expected, "
        f"{found['used_device_hours']:.3g} were used{error}"
    )


def _expected_s(study: Study, rows: list[Row], found: Throughput) -> float:
    student = scores = 0
    teacher: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        cost = Cost.of(study, row, until=row.last_step)
        seeds = row.seeds if row.state == "COMPLETE" else row.seeds[:1]  # a trial is pruned on its first seed
        student += cost.student * len(seeds)
        scores += cost.scores * len(seeds) + cost.again
        for seed in seeds:
            teacher[seed].append(cost.teacher)
    shared = max if is_cached(study) else sum
    seconds = found.seconds
    return (
        sum(shared(of_seed) for of_seed in teacher.values()) * seconds["teacher_cache"]
        + student * seconds["student_training"]
        + scores * seconds["student_scoring"]
    )
