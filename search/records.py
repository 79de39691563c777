"""What the database holds, as plain records: no Optuna here, so tables and figures need none."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bdense_core.weights import Rule, Schedule, Weights, shares
from search.version import NUMERIC

Params = dict[str, float | int | str | bool]
"""A proposal: values of the axes of the weights and of the tuned settings, by name."""

SEARCH = "search"
CONTROL = "control:"
ARM = "arm:"
"""A run of a comparison: one weighting on one training seed."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this launcher owns: what to run."""

    number: int
    origin: int
    """The first trial of its chain of retries: itself, if it is none."""
    role: str
    weights: Weights
    seeds: tuple[int, ...]
    params: Params = field(default_factory=dict)
    """The proposal; empty for a control outside the space."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of the method's settings that take the place of the study's."""
    schedule: Schedule = ()
    rule: Rule = "fixed"
    reported: tuple[int, ...] = ()
    """Steps that an earlier owner has reported already."""

    @property
    def is_search(self) -> bool:
        return self.role == SEARCH


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trial as the database holds it."""

    number: int
    state: str
    role: str
    params: Params
    weights: Weights
    seeds: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of the method's settings that took the place of the study's."""
    is_trained: bool = True
    """Whether the training seed mattered; not so of a control for which nothing is trained."""
    value: float | None
    intermediate: dict[int, float]
    repeats: tuple[tuple[int, int, float], ...]
    """Scores on further training seeds: (seed, kimg, value)."""
    surrogate: dict[int, float] = field(default_factory=dict)
    """The student's distance to its teacher on fixed noise, by kimg."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further figures of the trained student, by the method's names for them."""
    violated: tuple[str, ...] = ()
    """The study's constraints that it does not keep, by the figures' names. Such a trial is never the best."""
    evaluations: tuple[float, ...] = ()
    """The trained student's score on further evaluation seeds."""
    samples: str | None = None
    """Images of the trained student, and of its teacher on the same noise: a PNG in base64."""
    schedule: Schedule = ()
    rule: Rule = "fixed"
    shares_learned: Weights = ()
    """What a rule that learns ended with, in the mean over the intervals."""
    duration_s: float | None
    reason: str | None
    is_final: bool
    """A failure of the run itself: it would fail again, so nobody retries it."""
    is_retried: bool = False
    """Failed, and tried again by another row, which comes within seconds if it is not there."""
    is_enqueued: bool = False
    """A person's own proposal."""
    owner: str | None
    retry_of: int | None
    """The first trial of its chain of retries."""
    protocol: str | None
    code: str | None = None
    """The version of the code that ran it."""
    packages: dict[str, str] = field(default_factory=dict)
    """The versions of Python and of the packages that ran it, by name; empty for trials from before they were kept."""
    progress: dict[str, Any] = field(default_factory=dict)
    """What a running trial said last: node, pid, kimg, fraction, phase, kimg_per_s."""
    notes: tuple[str, ...] = ()
    """What its worker had to say, such as a checkpoint that could not be written."""
    resumed_from: float | None = None
    """The kimg at which it went on from a checkpoint."""
    started: datetime | None = None
    ended: datetime | None = None

    @property
    def shares(self) -> Weights:
        return shares(self.weights) if self.weights else ()

    @property
    def last_step(self) -> int | None:
        return max(self.intermediate, default=None)

    def over_seeds(self, step: int) -> dict[int, float]:
        """The score at `step` on every training seed that has one."""
        own = {self.seeds[0]: self.intermediate[step]} if self.seeds and step in self.intermediate else {}
        return own | {seed: value for seed, at, value in self.repeats if at == step}

    @property
    def by_seed(self) -> dict[int, float]:
        """The last score on every training seed."""
        return {} if self.last_step is None else self.over_seeds(self.last_step)

    @property
    def origin(self) -> int:
        """The first trial of its chain of retries: itself, if it is none."""
        return self.number if self.retry_of is None else self.retry_of

    @property
    def runs_in_any_case(self) -> bool:
        """Whether it runs although the study's total is reached."""
        return not self.is_search or self.is_enqueued

    @property
    def is_search(self) -> bool:
        return self.role == SEARCH

    @property
    def is_control(self) -> bool:
        return self.role.startswith(CONTROL)

    @property
    def arm(self) -> str | None:
        """The weighting of a comparison that it is a run of."""
        return self.role.removeprefix(ARM) if self.role.startswith(ARM) else None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How far a study is. Searched trials are counted apart from controls and the runs of a comparison."""

    counted: int
    controls_done: int
    running: int
    waiting: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """One line of `list`."""

    name: str
    metric: str
    counts: Counts
    best: float | None
    created: str


def last_of_chains(rows: list[Row]) -> list[Row]:
    """Of each trial the newest attempt, by the number of the first one."""
    return list({row.origin: row for row in rows}.values())


def count(rows: list[Row]) -> Counts:
    """How far a study with these rows is."""
    ended = [row for row in rows if row.state in ("COMPLETE", "PRUNED")]
    return Counts(
        counted=sum(row.is_search for row in ended),
        controls_done=sum(not row.is_search for row in ended),
        running=sum(row.state == "RUNNING" for row in rows),
        waiting=sum(row.state == "WAITING" for row in rows),
        failed=sum(row.state == "FAIL" for row in rows),
    )


def mixed_versions(rows: Iterable[Row]) -> str:
    """On which versions the rows ran, where they are more than one: they may differ for that alone. Else empty."""
    ran = [row for row in rows if row.code]
    versions = {"the code": {row.code for row in ran if row.code}} | {
        name: {row.packages[name] for row in ran if name in row.packages} for name in NUMERIC
    }
    mixed = [f"{name} ({', '.join(sorted(found))})" for name, found in versions.items() if len(found) > 1]
    return f"trials ran on several versions of {', '.join(mixed)}, and may differ for that alone" if mixed else ""
