"""Which weightings are better than the controls: paired differences over fresh seeds, and a verdict.

The rule, and what it was chosen from: docs/noise.md. A candidate is confirmed if it beats every control by a
one-sided paired t test, at 5 % in all after Holm's correction over the candidates, and every interval that is shown
for it lies above 0. Each pair is judged by its own differences alone, so a noisy control harms no other pair.
The verdict is on the study's metric alone; further figures stand beside it, and a constraint on one may bar a winner.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import JustifyMethod
from rich.markup import escape  # figures are called fd[guidance=1], for example
from rich.table import Table

from bdense_core.errors import BadValue
from bdense_core.methods.base import with_settings
from bdense_core.weights import Weights, shares
from search.labels import settings_text
from search.records import Row
from search.scores import Scores
from search.sections import Arm, ComparisonSection
from search.spec import Study
from search.statistics import (
    LEVEL,
    Interval,
    chance_of_no_gain,
    holm,
    mean_interval,
    paired,
    pooled_deviation,
    residual_deviation,
)

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
class Further:
    """A figure beside the metric, of one weighting. Whether more of it is better, its name has to tell."""

    mean: Interval
    by_seed: dict[int, float]
    differences: dict[str, Interval]
    """Weighting - control on the same seeds, by control; none from itself."""


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
    """Another one with equal shares and settings: the two differ by rounding, whatever their scores."""
    p_value: float | None = None
    """Of being no better than some control, corrected for the number of candidates. None where it was not tested."""
    violated: tuple[str, ...] = ()
    """Constraints that its figures' means over the seeds break."""

    @property
    def may_win(self) -> bool:
        """Whether it can be exported for a winner: it has weights of its own, and keeps the constraints."""
        return self.arm.rule == "fixed" and not self.violated

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
    """The confirmed candidate of the best mean, of those that may win."""
    verdict: str
    is_complete: bool
    metrics: dict[str, dict[str, Further]] = field(default_factory=dict)
    """Figures beside the metric: name -> weighting. They decide nothing."""

    @property
    def baseline(self) -> str | None:
        """The control that single differences are from: the primary term alone if that is one, else the first."""
        section = self.study.spec.comparison
        controls = [arm for arm in section.arms if arm.is_control] if section else []
        plain = (arm for arm in controls if _is_plain(arm, self.study))
        return next((arm.name for arm in (*plain, *controls)), None)


def noise_on_seeds(comparison: Comparison) -> str:
    """How much the controls' runs scatter on these seeds, whose evaluation noise they have as well."""
    arms = [arm for arm in comparison.arms if arm.is_control and arm.arm.is_trained and not arm.missing]
    by_seed = [[arm.by_seed[seed] for seed in comparison.seeds] for arm in arms]
    alone, beside = pooled_deviation(by_seed), residual_deviation(by_seed)
    if alone is None:
        return "noise on these seeds: not known"
    shared = f", beside others on its seed {beside.sd:.2g} (df {beside.df})" if beside else ""
    return f"noise on these seeds, of {len(arms)} control(s): sd of one run {alone.sd:.2g}{shared}"


def compare(study: Study, rows: list[Row]) -> Comparison:
    """What the runs of a comparison, as far as there are any, say.

    Raises:
        BadValue: the study is a search.
        UnlikeProtocols: a run was scored by another protocol.
    """
    section = study.spec.comparison
    if section is None:
        raise BadValue(f"study {study.name!r} is a search; `bdense-weights confirm --study {study.name}` compares")
    scores = Scores.of(study, rows)
    metrics = _further(section, scores.metrics)
    arms = _tested(_results(study, section, scores.values, metrics))
    arms = sorted(arms, key=lambda arm: (bool(arm.missing), arm.mean.mean if arm.by_seed else math.inf, arm.name))
    return Comparison(
        study=study,
        seeds=section.seeds,
        arms=tuple(arms),
        winner=next((arm.name for arm in arms if arm.is_confirmed and arm.may_win), None),
        verdict=_verdict(arms, len(section.seeds), section.widened),
        is_complete=not any(arm.missing for arm in arms),
        metrics={name: metrics[name] for name in sorted(metrics, key=_places(study))},
    )


def _places(study: Study) -> Callable[[str], tuple[int, str]]:
    """The method's own order of its figures; what it does not know comes last."""
    known = list(study.spec.method.metrics())
    return lambda name: (known.index(name) if name in known else len(known), name)


def _further(
    section: ComparisonSection, metrics: dict[str, dict[str, dict[int, float]]]
) -> dict[str, dict[str, Further]]:
    """Means and differences of every figure, for the arms that have it."""
    controls = [arm.name for arm in section.arms if arm.is_control]
    found = {}
    for name, by_arm in metrics.items():
        by_seed = {arm.name: _of_seeds(by_arm.get(arm.name, {}), section.seeds) for arm in section.arms}
        found[name] = {
            arm: Further(
                mean=mean_interval(values.values()),
                by_seed=values,
                differences={
                    control: difference
                    for control in controls
                    if control != arm and (difference := paired(values, by_seed[control])).count
                },
            )
            for arm, values in by_seed.items()
            if values
        }
    return found


def _results(
    study: Study,
    section: ComparisonSection,
    values: dict[str, dict[int, float]],
    metrics: dict[str, dict[str, Further]],
) -> list[ArmResult]:
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
            violated=_violated(study, arm.name, metrics) if by_seed[arm.name] else (),
        )
        for index, arm in enumerate(arms)
    ]


def _violated(study: Study, arm: str, metrics: dict[str, dict[str, Further]]) -> tuple[str, ...]:
    means = {name: by_arm[arm].mean.mean for name, by_arm in metrics.items() if arm in by_arm}
    return study.violations(means)


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
    """Whether two arms are one weighting with the same settings: Adam cancels a common factor."""
    if (first.rule, first.settings, first.is_trained) != (second.rule, second.settings, second.is_trained):
        return False
    (shape, one), (other_shape, other) = _flat(first), _flat(second)
    return shape == other_shape and all(abs(a - b) < _SAME for a, b in zip(one, other, strict=True))


def _is_plain(arm: Arm, study: Study) -> bool:
    """Whether it is the study's method as it stands there, with the primary term alone, all through training."""
    shape, flat = _flat(arm)
    is_alone = shape == (1, 1) and not any(flat[:-1])
    as_it_stands = with_settings(study.spec.method, arm.settings) == study.spec.method
    return is_alone and as_it_stands and arm.rule == "fixed" and arm.is_trained


def _flat(arm: Arm) -> tuple[tuple[int, int], Weights]:
    """Times and intervals of an arm's schedule, and the shares at all of them; a constant schedule is none."""
    schedule = arm.schedule or ((arm.weights,),)
    rows = [shares(weights) for intervals in schedule for weights in intervals]
    if all(abs(a - b) < _SAME for row in rows for a, b in zip(row, rows[0], strict=True)):
        return (1, 1), rows[0]
    return (len(schedule), len(schedule[0])), tuple(share for row in rows for share in row)


def _verdict(arms: list[ArmResult], num_seeds: int, widened: int) -> str:
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
    given = [arm for arm in tested if arm.may_win]
    found = [_finding(given, tested, f"over {num_seeds} fresh seeds")] if given else []
    for arm in tested:
        if arm.arm.rule != "fixed":
            word = "better" if arm.is_confirmed else "not clearly better"
            found.append(f"{arm.name}, which learns its weights, is {word} than every control")
        if arm.violated:
            found.append(f"{arm.name} violates {', '.join(arm.violated)} and cannot win")
    more = f"weightings or seeds were added {widened} time(s) after it had begun, so luck is likelier than 5 %"
    looked = [more] if widened and any(arm.is_confirmed for arm in tested) else []
    return "; ".join([*found, *looked, *([missing] if lacking else [])])


def _finding(given: list[ArmResult], tested: list[ArmResult], over: str) -> str:
    """Of the candidates that may win; `tested` are those and the others, which share the chances."""
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
        "baseline": comparison.baseline,
        "metrics": {
            name: {arm: _further_object(of) for arm, of in by_arm.items()}
            for name, by_arm in comparison.metrics.items()
        },
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
        "violated": list(arm.violated),
    }


def _further_object(of: Further) -> dict[str, Any]:
    return {
        "mean": _interval_object(of.mean),
        "by_seed": {str(seed): value for seed, value in of.by_seed.items()},
        "differences": [
            {"control": control, "interval": _interval_object(interval)} for control, interval in of.differences.items()
        ],
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
        f"control, corrected for the number of candidates (docs/noise.md)\n{noise_on_seeds(comparison)}"
    )
    settings = ["settings"] if any(arm.arm.settings for arm in comparison.arms) else []
    gains = [f"gain over\n{name}" for name in controls]
    for column in ("weighting", "shares", *settings, *source, "mean", *gains, "p"):
        justify: JustifyMethod = "left" if column in ("weighting", "shares", "settings") else "right"
        shown.add_column(column, justify=justify, no_wrap=column == "weighting", overflow="fold")
    for arm in comparison.arms:
        style = "bold green" if arm.name == comparison.winner else "cyan" if arm.is_control else None
        style = "dim" if arm.violated and not arm.is_control else style
        shown.add_row(*_cells(arm, controls, has_settings=bool(settings), has_source=bool(source)), style=style)
    return shown


def further_table(comparison: Comparison) -> Table | None:
    """The figures beside the metric: means over the seeds, and differences from one control. None without any."""
    if not comparison.metrics:
        return None
    reference = comparison.baseline
    shown = Table(
        title=f"{comparison.study.name}: further figures", title_justify="left", caption_justify="left", show_lines=True
    )
    shown.caption = (
        f"mean over {len(comparison.seeds)} fresh seeds; below it weighting - {reference} on the same seeds, with its "
        f"{LEVEL:.0%} interval, two-sided, each for itself. The verdict does not ask for them"
    )
    shown.add_column("weighting", no_wrap=True, overflow="fold")
    for name in comparison.metrics:
        shown.add_column(escape(name), justify="right", overflow="fold")
    for arm in comparison.arms:
        cells = [_further_cell(by_arm.get(arm.name), reference) for by_arm in comparison.metrics.values()]
        shown.add_row(arm.name, *cells, style="cyan" if arm.is_control else None)
    return shown


def _further_cell(of: Further | None, reference: str | None) -> str:
    if of is None:
        return ""
    found = of.differences.get(reference or "")
    if found is None:
        return f"{of.mean.mean:.4g}"
    around = f" ({found.low:+.2g} to {found.high:+.2g})" if found.count > 1 else ""
    return f"{of.mean.mean:.4g}\n{found.mean:+.2g}{around}"


def _cells(arm: ArmResult, controls: Sequence[str], *, has_settings: bool, has_source: bool) -> list[str]:
    gains = {gain.control: gain.interval for gain in arm.gains}
    value = arm.arm.source_value
    return [
        arm.name + escape(_remark(arm)),
        " ".join(f"{share:.2f}" for share in shares(arm.arm.weights) if arm.arm.is_trained),
        *([escape(settings_text(arm.arm.settings))] if has_settings else []),
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
    found = ["\nbeats every control"] if arm.is_confirmed else []
    return "".join([*found, *([f"\nviolates {', '.join(arm.violated)}"] if arm.violated else [])])
