"""Which weightings are better than the controls: paired differences over fresh seeds, and a verdict.

The rule, and what it was chosen from: docs/noise.md. A candidate is confirmed if it beats every control by a
one-sided paired t test, at 5 % in all after Holm's correction over the candidates, and every interval that is shown
for it lies above 0. Each pair is judged by its own differences alone, so a noisy control harms no other pair.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table

from bdense_core.errors import BadValue
from bdense_core.weights import Weights, shares
from search.records import Row
from search.scores import Scores
from search.spec import Arm, ComparisonSection, Study
from search.statistics import LEVEL, Interval, chance_of_no_gain, holm, mean_interval, paired

ERROR_RATE = 0.05
"""Share of comparisons in which a candidate that is no better than some control may be confirmed."""
_SAME = 1e-6
"""Weightings whose shares differ by less are one."""


@dataclass(frozen=True)
class Gain:
    """How much better a weighting is than one control, on the same seeds."""

    control: str
    interval: Interval
    """Of control - weighting: positive is better."""
    p_value: float
    """One-sided, of this pair alone."""


@dataclass(frozen=True)
class ArmResult:
    """What one weighting reached."""

    name: str
    arm: Arm
    mean: Interval
    by_seed: dict[int, float]
    gains: tuple[Gain, ...]
    """Over each control; none for a control."""
    is_control: bool
    missing: tuple[int, ...] = ()
    """Seeds without a result. Such a weighting is not ranked."""
    same_as: str | None = None
    """Another one with equal shares: the two differ by rounding, whatever their scores."""
    p_value: float | None = None
    """Of being no better than some control, corrected for the number of candidates. None where it was not tested."""

    @property
    def is_confirmed(self) -> bool:
        """Whether it is better than every control."""
        is_clear = self.p_value is not None and self.p_value <= ERROR_RATE
        return is_clear and all(gain.interval.low > 0 for gain in self.gains)


@dataclass(frozen=True)
class Comparison:
    """Weightings on the same fresh seeds."""

    study: Study
    seeds: tuple[int, ...]
    arms: tuple[ArmResult, ...]
    """Best mean first; those with missing seeds last."""
    winner: str | None
    """The confirmed candidate of the best mean, of those whose weights can be exported: none that learns them."""
    verdict: str
    is_complete: bool


def compare(study: Study, rows: list[Row]) -> Comparison:
    """What the runs of a comparison, as far as there are any, say.

    Raises:
        BadValue: the study is a search.
        UnlikeProtocols: a run was scored by another protocol.
    """
    section = study.spec.comparison
    if section is None:
        raise BadValue(f"study {study.name!r} is a search; `bdense-weights confirm --study {study.name}` compares")
    arms = _tested(_results(section, Scores.of(study, rows).values))
    arms = sorted(arms, key=lambda arm: (bool(arm.missing), arm.mean.mean if arm.by_seed else math.inf, arm.name))
    return Comparison(
        study=study,
        seeds=section.seeds,
        arms=tuple(arms),
        winner=next((arm.name for arm in arms if arm.is_confirmed and arm.arm.rule == "fixed"), None),
        verdict=_verdict(arms, len(section.seeds)),
        is_complete=not any(arm.missing for arm in arms),
    )


def _results(section: ComparisonSection, values: dict[str, dict[int, float]]) -> list[ArmResult]:
    """Every arm, controls first, with its gains."""
    controls = [arm for arm in section.arms if arm.is_control]
    arms = [*controls, *(arm for arm in section.arms if not arm.is_control)]
    by_seed = {arm.name: _of_seeds(values.get(arm.name, {}), section.seeds) for arm in arms}
    return [
        ArmResult(
            name=arm.name,
            arm=arm,
            mean=mean_interval(by_seed[arm.name].values()),
            by_seed=by_seed[arm.name],
            gains=() if arm.is_control else tuple(_gain(by_seed, arm.name, control.name) for control in controls),
            is_control=arm.is_control,
            missing=tuple(seed for seed in section.seeds if seed not in by_seed[arm.name]),
            same_as=next((other.name for other in arms[:index] if are_equal(arm, other)), None),
        )
        for index, arm in enumerate(arms)
    ]


def _of_seeds(values: dict[int, float], seeds: Sequence[int]) -> dict[int, float]:
    return {seed: values[seed] for seed in seeds if seed in values}


def _gain(by_seed: dict[str, dict[int, float]], name: str, control: str) -> Gain:
    interval = paired(by_seed[control], by_seed[name])
    return Gain(control, interval, chance_of_no_gain(interval))


def _tested(arms: list[ArmResult]) -> list[ArmResult]:
    """With p-values for the candidates that have all seeds, once the controls have them.

    One that beats every control is one whose least clear gain is clear, so the controls need no correction
    (Berger, Technometrics 24, 1982: an intersection-union test). A candidate that lacks runs counts in Holm's
    correction, so that nothing becomes clear by a failure.
    """
    candidates = [arm for arm in arms if not arm.is_control and arm.same_as is None]
    if not any(arm.is_control for arm in arms) or any(arm.missing for arm in arms if arm.is_control):
        return arms
    corrected = holm([1.0 if arm.missing else max(gain.p_value for gain in arm.gains) for arm in candidates])
    p_values = {arm.name: p for arm, p in zip(candidates, corrected, strict=True) if not arm.missing}
    return [replace(arm, p_value=p_values.get(arm.name)) for arm in arms]


def are_equal(first: Arm, second: Arm) -> bool:
    """Whether two arms are one weighting: Adam cancels a common factor."""
    if first.rule != second.rule:
        return False
    (shape, one), (other_shape, other) = _flat(first), _flat(second)
    return shape == other_shape and all(abs(a - b) < _SAME for a, b in zip(one, other, strict=True))


def _flat(arm: Arm) -> tuple[tuple[int, int], Weights]:
    """Times and intervals of an arm's schedule, and the shares at all of them; a constant schedule is none."""
    schedule = arm.schedule or ((arm.weights,),)
    rows = [shares(weights) for intervals in schedule for weights in intervals]
    if all(abs(a - b) < _SAME for row in rows for a, b in zip(row, rows[0], strict=True)):
        return (1, 1), rows[0]
    return (len(schedule), len(schedule[0])), tuple(share for row in rows for share in row)


def _verdict(arms: list[ArmResult], num_seeds: int) -> str:
    """One sentence. `arms` are best first."""
    lacking = [arm for arm in arms if arm.missing]
    num_missing = sum(len(arm.missing) for arm in lacking)
    which = ", ".join(f"{arm.name} on {' '.join(map(str, arm.missing))}" for arm in lacking)
    missing = f"missing: {num_missing} of {len(arms) * num_seeds} runs ({which})"
    tested = [arm for arm in arms if arm.p_value is not None]
    if not tested and not lacking:
        return "no candidate stands beside a control of other weights"
    if not tested:
        return f"nothing can be said yet; {missing}"
    given = [arm for arm in tested if arm.arm.rule == "fixed"]
    found = [_finding(given, tested, f"over {num_seeds} fresh seeds")] if given else []
    for arm in tested:
        if arm not in given:
            word = "better" if arm.is_confirmed else "not clearly better"
            found.append(f"{arm.name}, which learns its weights, is {word} than every control")
    return "; ".join([*found, *([missing] if lacking else [])])


def _finding(given: list[ArmResult], tested: list[ArmResult], over: str) -> str:
    """Of the candidates with weights of their own; `tested` are those and the learned ones, which share the chances."""
    best = next((arm for arm in given if arm.is_confirmed), given[0])
    nearest = min(best.gains, key=lambda gain: gain.interval.mean)
    amount, against = _amount(nearest.interval), nearest.control
    if best.is_confirmed:
        return f"{best.name} is better than every control {over}: than {against}, the nearest, by {amount}"
    if _is_worse(nearest, len(tested) * len(best.gains)):
        return f"no candidate is better than {against} {over}: {best.name}, the best, is worse by {amount}"
    rivals = [gain.control for gain in best.gains if not _is_beaten(gain.control, tested)] or [against]
    word = "better" if nearest.interval.mean >= 0 else "worse"
    return f"not distinguishable from {', '.join(rivals)} {over}: {best.name} is {word} than {against} by {amount}"


def _is_worse(gain: Gain, num_pairs: int) -> bool:
    """Whether the best candidate is clearly worse than a control, which is the worst of so many pairs."""
    return gain.interval.high < 0 and (1 - gain.p_value) * num_pairs <= ERROR_RATE


def _is_beaten(control: str, tested: list[ArmResult]) -> bool:
    """Whether some candidate is clearly better than this control, whatever the others."""
    gains = [gain for arm in tested for gain in arm.gains if gain.control == control]
    return any(gain.p_value * len(tested) <= ERROR_RATE and gain.interval.low > 0 for gain in gains)


def _amount(interval: Interval) -> str:
    """How large a difference is, whichever sign it has."""
    if interval.count < 2:
        return f"{abs(interval.mean):.2g} (one seed has no interval)"
    low, high = (interval.low, interval.high) if interval.mean >= 0 else (-interval.high, -interval.low)
    return f"{abs(interval.mean):.2g} ({LEVEL:.0%} interval {low:.2g} to {high:.2g})"


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """What programs read. Numbers that do not exist, such as an interval from one seed, are null."""
    section = comparison.study.spec.comparison
    return {
        "study": comparison.study.name,
        "kind": section.kind if section else None,
        "of": section.of if section else None,
        "metric": comparison.study.metric,
        "protocol": comparison.study.protocol_hash(),
        "seeds": list(comparison.seeds),
        "is_complete": comparison.is_complete,
        "winner": comparison.winner,
        "verdict": comparison.verdict,
        "arms": [_arm_object(arm) for arm in comparison.arms],
    }


def _arm_object(arm: ArmResult) -> dict[str, Any]:
    return {
        **arm.arm.model_dump(mode="json"),
        "shares": list(shares(arm.arm.weights)),
        "mean": _interval_object(arm.mean),
        "by_seed": {str(seed): value for seed, value in arm.by_seed.items()},
        "missing": list(arm.missing),
        "same_as": arm.same_as,
        "gains": [
            {"control": gain.control, "interval": _interval_object(gain.interval), "p_value": gain.p_value}
            for gain in arm.gains
        ],
        "p_value": arm.p_value,
        "is_confirmed": arm.is_confirmed,
    }


def _interval_object(interval: Interval) -> dict[str, Any]:
    values = asdict(interval)
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def table(comparison: Comparison) -> Table:
    """The weightings, best first, each with its gain over every control."""
    section, controls = comparison.study.spec.comparison, [arm.name for arm in comparison.arms if arm.is_control]
    has_source = any(arm.arm.source_value is not None for arm in comparison.arms)
    source = [f"in {section.of}"] if section and has_source else []
    shown = Table(
        title=f"{comparison.study.name}: {comparison.study.metric}, lower is better", title_justify="left",
        caption_justify="left", show_lines=True,
    )  # fmt: skip
    shown.caption = (
        f"mean over {len(comparison.seeds)} fresh seeds; gain: control - weighting on the same seeds, positive is "
        f"better; below them {LEVEL:.0%} intervals, two-sided, each for itself. p: of being no better than some "
        "control, corrected for the number of candidates (docs/noise.md)"
    )
    for column in ("weighting", "shares", *source, "mean", *(f"gain over\n{name}" for name in controls), "p"):
        justify: JustifyMethod = "left" if column in ("weighting", "shares") else "right"
        shown.add_column(column, justify=justify, no_wrap=column == "weighting", overflow="fold")
    for arm in comparison.arms:
        style = "bold green" if arm.name == comparison.winner else "cyan" if arm.is_control else None
        shown.add_row(*_cells(arm, controls, has_source=bool(source)), style=style)
    return shown


def _cells(arm: ArmResult, controls: Sequence[str], *, has_source: bool) -> list[str]:
    gains = {gain.control: gain.interval for gain in arm.gains}
    value = arm.arm.source_value
    return [
        arm.name + _remark(arm),
        " ".join(f"{share:.2f}" for share in shares(arm.arm.weights)),
        *(["" if value is None else f"{value:.4g}"] if has_source else []),
        _cell(arm.mean, ".4g"),
        *(_cell(gains[name], "+.2g") if name in gains else "" for name in controls),
        "" if arm.p_value is None else f"{arm.p_value:.2g}",
    ]


def _cell(interval: Interval, form: str) -> str:
    if interval.count == 0:
        return ""
    if interval.count == 1:
        return format(interval.mean, form)
    return f"{interval.mean:{form}}\n{interval.low:{form}} to {interval.high:{form}}"


def _remark(arm: ArmResult) -> str:
    if arm.missing:
        return "\nlacks " + " ".join(map(str, arm.missing))
    if arm.same_as is not None:
        return f"\nis {arm.same_as}"
    return "\nbeats every control" if arm.is_confirmed else ""
