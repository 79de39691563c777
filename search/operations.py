"""A study seen and steered from outside of its launchers: how it stands, what may be edited, its end."""

import math
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from statistics import mean
from typing import Any

from rich.table import Table
from rich.text import Text

from bdense_core.errors import BadValue
from search.lifecycle import Lease
from search.owner import host_and_pid, is_dead_here
from search.progress import clock
from search.records import Counts, Params, Row, count
from search.spec import Study, mutable_values
from search.storage import StudyStore

_HOUR_S = 3600.0
_LOOK_EVERY_S = 0.5
_AT_ONCE, _NEXT_TRIAL, _NEXT_LAUNCH = "at once", "with the next trial", "with the next launch"
_TAKES_EFFECT = {
    "description": _AT_ONCE,
    "budget": _AT_ONCE,
    "lease": _AT_ONCE,
    "lease.outage_s": _NEXT_LAUNCH,
    "cache": _NEXT_TRIAL,
    "checkpoints": _NEXT_LAUNCH,
    "checkpoints.every_s": _NEXT_TRIAL,
    "resources": _NEXT_LAUNCH,
}
"""By key, else by section: when the launchers that run use another value (`scheduling` and `launch` say so)."""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A process that runs trials of the study, and how many of them."""

    host: str
    pid: int
    trials: int

    def __str__(self) -> str:
        return f"{self.host} (pid {self.pid}, {self.trials} trial(s))"


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A RUNNING trial: who runs it, how far it is, and whether anything was heard of it."""

    number: int
    role: str
    node: str | None
    pid: int | None
    """Of the worker; where it has said nothing yet, it is not known, nor is its node."""
    owner: str | None
    launcher_host: str | None
    launcher_pid: int | None
    lease_alive: bool
    heartbeat_age_s: float | None
    phase: str
    kimg: float | None
    fraction: float | None
    """The share of all its training runs that is done."""
    images_per_s: float | None
    loss: float | None
    resumed_from: float | None
    """The kimg at which it went on from a checkpoint."""
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a study stands."""

    study: str
    metric: str
    is_comparison: bool
    """It searches nothing: all that it runs are counted as `controls`."""
    paused: bool
    trials: int
    """The total of searched trials that is asked for."""
    controls: int
    counts: Counts
    running: tuple[RunningTrial, ...]
    launchers: tuple[Launcher, ...]
    """Those with a live lease; one that waits for work has none."""
    finished_per_hour: float | None
    """Trials that ended in the last hour, or since the first one began; None before the first one ended."""
    left_s: float | None
    """None where it is not known, as of a study that is paused."""


def status(store: StudyStore) -> Status:
    """How a study stands now."""
    leases = {lease.number: lease for lease in store.trials.leases()}
    rows, paused = store.rows(), store.follow().paused
    grace_s = store.study.spec.lease.grace_s
    at_work = launchers(list(leases.values()), grace_s)
    held = [(row, leases[row.number]) for row in rows if row.state == "RUNNING" and row.number in leases]
    return Status(
        study=store.name,
        metric=store.study.metric,
        is_comparison=store.study.spec.comparison is not None,
        paused=paused,
        trials=store.study.spec.budget.trials,
        controls=len(store.study.fixed_runs()),
        counts=count(rows),
        running=tuple(_running(row, lease, grace_s) for row, lease in held),
        launchers=at_work,
        finished_per_hour=finished_per_hour(rows, datetime.now()),
        left_s=time_left(store.study, rows) if at_work and not paused else None,
    )


def _running(row: Row, lease: Lease, grace_s: float) -> RunningTrial:
    said = row.progress
    rate = said.get("kimg_per_s")
    host, pid = host_and_pid(lease.owner) if lease.owner else (None, None)
    return RunningTrial(
        number=row.number,
        role=row.role,
        node=said.get("node"),
        pid=said.get("pid"),
        owner=lease.owner,
        launcher_host=host,
        launcher_pid=pid,
        lease_alive=is_alive(lease, grace_s),
        heartbeat_age_s=None if lease.silent_s is None else round(lease.silent_s, 1),
        phase=said.get("phase") or ("scored" if said else "starting"),
        kimg=said.get("kimg"),
        fraction=said.get("fraction"),
        images_per_s=None if rate is None else round(1000 * rate, 3),
        loss=said.get("loss"),
        resumed_from=row.resumed_from,
        notes=row.notes,
    )


def is_alive(lease: Lease, grace_s: float) -> bool:
    """Whether somebody still works on it: heard of within the grace period, and no process of ours that is gone."""
    heard = lease.silent_s is not None and lease.silent_s < grace_s
    return heard and lease.owner is not None and not is_dead_here(lease.owner)


def launchers(leases: list[Lease], grace_s: float) -> tuple[Launcher, ...]:
    """Who holds live leases."""
    held = Counter(host_and_pid(lease.owner) for lease in leases if lease.owner and is_alive(lease, grace_s))
    return tuple(Launcher(host=host, pid=pid, trials=number) for (host, pid), number in sorted(held.items()))


def live_launchers(store: StudyStore) -> tuple[Launcher, ...]:
    """Who runs trials of the study now."""
    return launchers(store.trials.leases(), store.study.spec.lease.grace_s)


def wait_for_end(store: StudyStore, asked: tuple[Launcher, ...], timeout_s: float) -> tuple[Launcher, ...]:
    """Wait until these launchers hold no trial any more; those that still do when the time is over."""
    processes = {(launcher.host, launcher.pid) for launcher in asked}
    until = time.monotonic() + timeout_s
    while True:
        left = tuple(launcher for launcher in live_launchers(store) if (launcher.host, launcher.pid) in processes)
        if not left or time.monotonic() > until:
            return left
        time.sleep(_LOOK_EVERY_S)


def finished_per_hour(rows: list[Row], now: datetime) -> float | None:
    """Trials that ended, pruned or not, in the last hour; of a younger study, scaled to an hour."""
    ended = [row.ended for row in rows if row.state in ("COMPLETE", "PRUNED") and row.ended]
    if not ended:
        return None
    age_s = (now - min(row.started for row in rows if row.started)).total_seconds()
    recent = sum((now - moment).total_seconds() < _HOUR_S for moment in ended)
    return recent * _HOUR_S / min(_HOUR_S, max(1.0, age_s))


def time_left(study: Study, rows: list[Row]) -> float | None:
    """Seconds until all is done, if as many trials run on as do now; None where none runs or none has ended."""
    still_open = [row for row in rows if row.state in ("RUNNING", "WAITING")]
    running = [row for row in still_open if row.state == "RUNNING"]
    certain = sum(row.is_search and (row.is_enqueued or row.state == "RUNNING") for row in still_open)
    searches = max(study.spec.budget.trials - count(rows).counted, certain)
    searched_runs = searches * len(study.trial_seeds())
    runs = searched_runs + sum(len(row.seeds) for row in still_open if not row.is_search)
    if runs == 0:
        return 0.0
    ended = [row for row in rows if row.state in ("COMPLETE", "PRUNED") and row.duration_s]
    if not running or not ended:
        return None
    behind = sum((row.progress.get("fraction") or 0.0) * len(row.seeds) for row in running)
    a_run_s = mean((row.duration_s or 0.0) / max(1, len(row.seeds)) for row in ended)
    return max(0.0, runs - behind) * a_run_s / len(running)


def summary(found: Status) -> str:
    """The status in words, less its running trials."""
    counts = found.counts
    per_hour = "not known yet" if found.finished_per_hour is None else f"{found.finished_per_hour:.1f}"
    unknown = "not while it is paused" if found.paused else "not known yet"
    left = unknown if found.left_s is None else f"about {clock(found.left_s)}" if found.left_s else "none"
    return "\n".join(
        [
            f"{found.study}: {found.metric}{', PAUSED' if found.paused else ''}",
            f"{how_far(found)}, {counts.running} running, {counts.waiting} waiting, {counts.failed} failed",
            f"launchers: {', '.join(str(launcher) for launcher in found.launchers) or 'none at work'}",
            f"finished per hour: {per_hour}; time left: {left}",
        ]
    )


def how_far(found: Status) -> str:
    """What has ended of all that is asked for."""
    controls = f"{found.counts.controls_done}/{found.controls}"
    if found.is_comparison:
        return f"{controls} runs"
    return f"{found.counts.counted}/{found.trials} trials, {controls} controls"


def running_table(found: Status) -> Table:
    """One line for each running trial, and its notes below the table."""
    table = Table(title="running", title_justify="left", caption_justify="left")
    for column in (
        "trial",
        "role",
        "node",
        "pid",
        "launcher",
        "phase",
        "kimg",
        "done",
        "images/s",
        "heartbeat",
        "from",
    ):
        table.add_column(column, justify="left" if column in ("role", "node", "launcher", "phase") else "right")
    for trial in found.running:
        age = "none" if trial.heartbeat_age_s is None else f"{trial.heartbeat_age_s:.0f} s"
        table.add_row(
            str(trial.number),
            trial.role,
            trial.node,
            _text(trial.pid),
            f"{trial.launcher_host} {trial.launcher_pid}" if trial.owner else "none",
            trial.phase,
            _text(trial.kimg),
            "" if trial.fraction is None else f"{trial.fraction:.0%}",
            "" if trial.images_per_s is None else f"{trial.images_per_s:.3g}",
            age if trial.lease_alive else f"LOST, {age}",
            "" if trial.resumed_from is None else f"{trial.resumed_from:g} kimg",
        )
    notes = [f"trial {trial.number}: {note}" for trial in found.running for note in trial.notes]
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def takes_effect(key: str) -> str:
    """When launchers that run use another value of a key that may change."""
    return _TAKES_EFFECT.get(key) or _TAKES_EFFECT[key.partition(".")[0]]


def edit(store: StudyStore, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Change keys of a study that may be running.

    Returns:
        The old and the new value of each key; of a section, of all keys in it.

    Raises:
        BadValue: a key that may not change, or a value that is none; nothing was changed.
    """
    if "budget.trials" in values:
        _check_searches(store.study, "budget.trials stays 0")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadValue(f"{key} must be finite, got {value}")
    before = mutable_values(store.study)
    store.edit(values)
    after = mutable_values(store.study)
    return {
        key: (before.get(key), value)
        for key, value in after.items()
        if any(key == given or key.startswith(given + ".") for given in values)
    }


def propose(store: StudyStore, params: Params) -> int:
    """Queue a proposal of a person's own; the number of its trial.

    Raises:
        BadValue: a parameter that the study does not search, lacks, or has within another range, or no search at all.
    """
    _check_searches(store.study, "it takes no proposal")
    return store.enqueue(params)


def _check_searches(study: Study, consequence: str) -> None:
    if study.spec.comparison is not None:
        raise BadValue(
            f"study {study.name!r} is a comparison, which searches nothing, so {consequence}; `bdense-weights confirm` "
            "or `transfer` with a larger --top or --seeds adds runs"
        )


def _settings(study: Study) -> dict[str, Any]:
    """The keys that people may change, with their values."""
    known = mutable_values(study)
    if study.spec.comparison is not None:
        del known["budget.trials"]
    return {key: value for key, value in known.items() if key.partition(".")[0] != "comparison"}


def settings_table(study: Study) -> Table:
    """The keys that may change."""
    table = Table()
    for column in ("key", "value", "a change takes effect"):
        table.add_column(column)
    for key, value in _settings(study).items():
        table.add_row(key, "" if value is None else str(value), takes_effect(key))
    return table


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
