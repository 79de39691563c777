"""What pictures of a study show, decided once for every drawing library: curves, points, traces, dots, effects.

A weighting has one name and one colour in all of them, whether it is a trial, a control or an arm of a comparison.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bdense_core.methods.base import Axis
from search.comparison import ArmResult, Comparison
from search.noise import noise_floor, ranked, rival
from search.records import CONTROL, Row
from search.spec import Study
from search.statistics import Interval, paired

NUM_CURVES = 3
"""So many of the best searched trials are drawn beside the controls."""
OTHER = "#8a8f98"
"""Whatever is not named by colour."""

# Okabe and Ito's palette for the colour-blind (https://jfly.uni-koeln.de/color/), with two further colours at each end;
# its black and yellow vanish on a dark or a white page.
_SEARCHED = ("#0072b2", "#56b4e9", "#e69f00", "#8c6d1f", "#7f3c8d")
_CONTROLS = {
    "endpoint only": "#d55e00", "uniform": "#009e73", "paper": "#cc79a7", "gate": "#b8a100", "meta": "#8c6bb1",
}  # fmt: skip
_OTHER_CONTROLS = ("#17a2a2", "#a65628", "#6a994e", "#d6409f")
"""Of controls that only some methods have, in the order of their trials."""
BAND = "± 2 sd of a difference"
"""What a noise band is, in its legend."""
_BAND_SDS = 2.0
"""Half its width: 19 in 20 differences of two runs that are equally good lie in it."""


# -- names and colours


def readable(name: str) -> str:
    """The name of a control or of an arm in words: `endpoint only`, `trial 12`."""
    return name.replace("_", " ").replace("-", " ")


def name_of(row: Row) -> str:
    """What a row's weighting is called in pictures and sentences."""
    return f"trial {row.number}" if row.is_search else readable(row.arm or row.role.removeprefix(CONTROL))


class Colors:
    """A colour for each weighting: the best searched trials by rank, the controls by name, grey for all others."""

    def __init__(self, rows: list[Row]) -> None:
        best = [name_of(row) for row in ranked(rows, searched_only=True)]
        controls = [name_of(row) for row in sorted(rows, key=lambda row: row.number) if row.is_control]
        others = [name for name in dict.fromkeys(controls) if name not in _CONTROLS]
        self._of = (
            dict(zip(best, _SEARCHED, strict=False)) | _CONTROLS | dict(zip(others, _OTHER_CONTROLS, strict=False))
        )

    def __getitem__(self, name: str) -> str:
        return self._of.get(name, OTHER)


# -- one study


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Shares of one weighting's terms, in their order; where they change over training, their mean."""

    number: int
    name: str
    value: float
    shares: tuple[float, ...]
    is_control: bool

    @property
    def label(self) -> str:
        return f"{self.name}: {self.value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trial on the map: in the plane of two axes, or above a single one.

    Attributes:
        x: a number, or of an axis of choices the place among them; likewise y.
        value: the final value; None for a trial that was stopped early, whose last score is of another budget.
        y: None on a map of one axis where there is no final value.
        violates: whether it breaks a constraint, so that it is never the best.
    """

    x: float
    y: float | None
    value: float | None
    label: str
    is_control: bool
    violates: bool = False

    @property
    def pruned(self) -> bool:
        return self.value is None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One trial's scores over training, on its first training seed.

    Attributes:
        detached: the last score is of other samples (more, or in other numbers of steps), so no line leads to it.
    """

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    is_named: bool
    is_control: bool
    is_pruned: bool
    detached: bool


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where single runs cannot be told from a control, by kimg: two sd of a difference on one seed to either side."""

    name: str
    steps: tuple[int, ...]
    scores: tuple[float, ...]
    """The control's on its first training seed, which trials share."""
    halves: tuple[float, ...]
    value: float
    """The control's final one, as trials have theirs: the mean over as many seeds."""
    half: float
    """Of the band around that."""

    @property
    def lows(self) -> list[float]:
        return [score - half for score, half in zip(self.scores, self.halves, strict=True)]

    @property
    def highs(self) -> list[float]:
        return [score + half for score, half in zip(self.scores, self.halves, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """One control's final scores: by training seed, and of its first student by evaluation seed (its own first).

    A control that trains nothing has one score for all training seeds.
    """

    name: str
    training: tuple[float, ...]
    evaluation: tuple[float, ...]


def named(rows: list[Row]) -> list[Row]:
    """The best searched trials and every control, best first: what pictures call by name."""
    best = {row.number for row in ranked(rows, searched_only=True)[:NUM_CURVES]}
    return [row for row in ranked(rows) if row.is_control or row.number in best]


def curves(rows: list[Row]) -> list[Curve]:
    """The weights of all that is named and trained, best first; but those that are learned in training."""
    return [
        Curve(number=row.number, name=name_of(row), value=row.value, shares=row.shares, is_control=row.is_control)
        for row in named(rows)
        if row.value is not None and row.rule == "fixed" and row.is_trained
    ]


def map_axes(study: Study) -> tuple[str, str]:
    """What the map shows along x and y: the first two searched axes, or a single one and the metric."""
    axes = list(study.spec.searched or study.spec.axes)
    return (axes[0], axes[1]) if len(axes) > 1 else (axes[0], study.metric)


def place(axis: Axis | None, value: object) -> float | None:
    """Where a parameter's value stands along an axis: a number itself, a choice by its place among them; else None."""
    if axis is not None and axis.choices:
        return float(axis.choices.index(value)) if value in axis.choices else None
    return float(value) if isinstance(value, int | float) else None


def flat_axis(study: Study) -> str | None:
    """The axis of the map along which all shares are equal, if there is one."""
    return next((axis for axis in map_axes(study) if axis in study.spec.space.scale_axes), None)


def points(study: Study, rows: list[Row]) -> list[Point]:
    """Every finished or pruned trial that has a place on the map."""
    return _points(study, rows, *map_axes(study))


def slices(study: Study, rows: list[Row]) -> dict[str, list[Point]]:
    """Values over each searched setting of the method, for whatever has one; settings without any are left out."""
    found = {name: _points(study, rows, name, study.metric) for name in study.spec.tuned}
    return {name: drawn for name, drawn in found.items() if drawn}


def _points(study: Study, rows: list[Row], x: str, y: str) -> list[Point]:
    found, axes = [], study.spec.searched
    for row in rows:
        value = row.value if row.state == "COMPLETE" else None
        at = place(axes.get(x), row.params.get(x))
        height = value if y == study.metric else place(axes.get(y), row.params.get(y))
        if row.value is None or at is None or (height is None and y != study.metric):
            continue
        found.append(
            Point(
                x=at, y=height, value=value, label=name_of(row), is_control=row.is_control,
                violates=row.is_search and bool(row.violated),
            )
        )  # fmt: skip
    return found


def traces(study: Study, rows: list[Row]) -> list[Trace]:
    """The scores of every trial that has any; the best and the controls are named."""
    numbers = {row.number for row in named(rows)}
    found = []
    for row in rows:
        if steps := tuple(sorted(row.intermediate)):
            found.append(
                Trace(
                    name=name_of(row), steps=steps, values=tuple(row.intermediate[step] for step in steps),
                    is_named=row.number in numbers, is_control=row.is_control, is_pruned=row.state == "PRUNED",
                    detached=study.early_is_other and steps[-1] == study.steps[-1],
                )
            )  # fmt: skip
    return found


def band(rows: list[Row]) -> Band | None:
    """The noise around the best trained control wherever it is known; None where none has two training seeds."""
    row = rival(rows, trained_only=True)
    floors = {step: noise_floor(rows, step) for step in sorted(row.intermediate)} if row else {}
    known = {step: floor for step, floor in floors.items() if floor is not None}
    if row is None or row.value is None or not known:
        return None
    num_seeds = max((len(other.seeds) for other in rows if other.is_search), default=1)
    width = _BAND_SDS * math.sqrt(2)
    halves = tuple(width * floor.beside(row, num_seeds=1).sd for floor in known.values())
    return Band(
        name=name_of(row), steps=tuple(known), scores=tuple(row.intermediate[step] for step in known), halves=halves,
        value=row.value, half=width * known[max(known)].beside(row, num_seeds).sd,
    )  # fmt: skip


def repeats(rows: list[Row]) -> list[Repeats]:
    """The fixed controls that ran on several seeds, best first: what the noise floor is of."""
    return [
        Repeats(
            name=name_of(row), training=tuple(row.by_seed.values())[: None if row.is_trained else 1],
            evaluation=(row.intermediate[row.last_step], *row.evaluations) if row.evaluations else (),
        )
        for row in ranked(rows)
        if row.is_control and row.rule == "fixed" and row.last_step is not None
        if (row.is_trained and len(row.by_seed) > 1) or row.evaluations
    ]  # fmt: skip


# -- comparisons


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a candidate gains over a control: the mean of the differences by seed, its interval, and each of them."""

    candidate: str
    control: str
    interval: Interval
    by_seed: tuple[float, ...]


def effects(comparison: Comparison) -> list[Effect]:
    """Every candidate against every control that it shares seeds with, by control, best first; positive is better."""
    candidates = [arm for arm in comparison.arms if not arm.is_control]
    return [
        Effect(
            candidate=readable(arm.name), control=readable(control.name), interval=gain.interval,
            by_seed=_paired(control, arm),
        )
        for control in comparison.arms
        if control.is_control
        for arm in candidates
        for gain in arm.gains
        if gain.control == control.name and gain.interval.count
    ]  # fmt: skip


def _paired(control: ArmResult, arm: ArmResult) -> tuple[float, ...]:
    return tuple(control.by_seed[seed] - value for seed, value in arm.by_seed.items() if seed in control.by_seed)


def gain_over(comparison: Comparison, name: str, control: str) -> Interval | None:
    """What an arm, which may be a control too, gains over a control on the same seeds; None where they share none."""
    by_seed = {arm.name: arm.by_seed for arm in comparison.arms}
    found = paired(by_seed.get(control, {}), by_seed.get(name, {}))
    return found if found.count else None


def scale_end(values: list[float]) -> float:
    """Where colours end: one bad trial in a corner shall not leave a single colour to all others."""
    return sorted(values)[round(0.8 * (len(values) - 1))]


def log_is_better(values: Iterable[float]) -> bool:
    """Whether a logarithmic axis shows these values better: positive, and half an order of magnitude apart."""
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) / min(known) > 3
