"""What weights found on one study are worth on a target: by weighting and NFE, and whether the order carried over."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from search.comparison import ArmResult, Comparison, noise_on_seeds, to_dict
from search.statistics import Correlation, Interval, rank_correlation


@dataclass(frozen=True)
class SourceWorth:
    """What weightings were worth where they come from, all of them by one measure."""

    values: dict[str, float]
    """By weighting, of those that are known there."""
    is_confirmed: bool
    """Whether these are means over a confirmation's fresh seeds; else scores of the search, which picked by them."""

    @property
    def what(self) -> str:
        return "mean over the confirmation's fresh seeds" if self.is_confirmed else "score in the search"


def source_worth(arms: Sequence[ArmResult]) -> SourceWorth:
    """Confirmed means if all weightings that the source knows have one, else the search's scores of all."""
    searched = {arm.name: arm.arm.source_value for arm in arms if arm.arm.source_value is not None}
    confirmed = {(arm.name, arm.arm.confirmed_value) for arm in arms if arm.name in searched}
    means = {name: value for name, value in confirmed if value is not None}
    if means and len(means) == len(confirmed):  # one for each
        return SourceWorth({name: means[name] for name in searched}, is_confirmed=True)
    return SourceWorth(searched, is_confirmed=False)


def correlation(worth: SourceWorth, arms: Sequence[ArmResult]) -> Correlation | None:
    """Of what weightings were worth at the source with their means here, those with all seeds; None of too few."""
    ended = [arm for arm in arms if arm.name in worth.values and arm.mean.count and not arm.missing]
    return rank_correlation([worth.values[arm.name] for arm in ended], [arm.mean.mean for arm in ended])


@dataclass(frozen=True)
class TransferTable:
    """A target's comparisons, one for each NFE, beside what the weightings were worth where they come from."""

    target: str
    source: str
    metric: str
    baseline: str
    """The control that gains are over: the primary loss term alone, where that is one, else the target's first."""
    comparisons: dict[int, Comparison]
    """By NFE, rising."""
    worth: SourceWorth
    correlations: dict[int, Correlation | None]
    """How far their worth at the source orders the weightings as the target does, by NFE; None of too few."""

    @property
    def names(self) -> tuple[str, ...]:
        """All weightings, best first at the first NFE."""
        return tuple(dict.fromkeys(arm.name for item in self.comparisons.values() for arm in item.arms))


def transfer_tables(compared: Sequence[Comparison]) -> list[TransferTable]:
    """The comparisons of kind "transfer" among these, those of one target and one source together."""
    groups: dict[tuple[str, str], dict[int, Comparison]] = {}
    for item in compared:
        section = item.study.spec.comparison
        if section is not None and section.kind == "transfer":
            groups.setdefault((section.target, section.of), {})[item.study.spec.method.nfe] = item
    return [_table_of(target, source, dict(sorted(found.items()))) for (target, source), found in groups.items()]


def _table_of(target: str, source: str, comparisons: dict[int, Comparison]) -> TransferTable:
    first = next(iter(comparisons.values()))
    worth = source_worth([arm for item in comparisons.values() for arm in item.arms])
    return TransferTable(
        target=target,
        source=source,
        metric=first.study.metric,
        baseline=first.baseline or "",
        comparisons=comparisons,
        worth=worth,
        correlations={nfe: correlation(worth, item.arms) for nfe, item in comparisons.items()},
    )


def to_object(found: TransferTable) -> dict[str, Any]:
    """What programs read."""
    return {
        "target": found.target,
        "source": found.source,
        "metric": found.metric,
        "baseline": found.baseline,
        "worth_at_source": {"what": found.worth.what, "by_weighting": found.worth.values},
        "by_nfe": [
            {
                "nfe": nfe,
                "rank_correlation": None if (of := found.correlations[nfe]) is None else asdict(of),
                **to_dict(comparison),
            }
            for nfe, comparison in found.comparisons.items()
        ],
    }


def transfer_table(found: TransferTable) -> Table:
    """Weightings down, NFEs across: the target's metric, and the gain over the baseline on the same seeds."""
    title = f"{found.source} -> {found.target}: {found.metric}, lower is better"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = _caption(found)
    table.add_column("weighting", no_wrap=True)
    table.add_column(f"on {found.source}", justify="right", no_wrap=True)
    for nfe in found.comparisons:
        table.add_column(f"NFE {nfe}", justify="right", no_wrap=True)
        table.add_column(f"gain over {found.baseline}", justify="right")
    for name in found.names:
        arms = {
            nfe: next((arm for arm in item.arms if arm.name == name), None) for nfe, item in found.comparisons.items()
        }
        known = [arm for arm in arms.values() if arm is not None]
        cells = [cell for arm in arms.values() for cell in _cells(arm, found.baseline)]
        source = found.worth.values.get(name)
        style = "cyan" if known[0].is_control else None
        table.add_row(name, "" if source is None else f"{source:.4g}", *cells, style=style)
    return table


def _cells(arm: ArmResult | None, baseline: str) -> tuple[str, str]:
    if arm is None or not arm.mean.count:
        return "", ""
    gain = next((gain.interval for gain in arm.gains if gain.control == baseline), None)
    return f"{arm.mean.mean:.4g}", "" if gain is None else _with_interval(gain)


def _with_interval(gain: Interval) -> str:
    return f"{gain.mean:+.2g} ({gain.low:+.2g} to {gain.high:+.2g})" if gain.count > 1 else f"{gain.mean:+.2g}"


def _caption(found: TransferTable) -> str:
    seeds = {nfe: len(item.seeds) for nfe, item in found.comparisons.items()}
    lines = [
        f"on {found.source}: {found.worth.what}",
        "means over " + ", ".join(f"{count} seeds at NFE {nfe}" for nfe, count in seeds.items())
        + "; gain: control - weighting on the same seeds, positive is better, 95 % intervals, each for itself",
    ]  # fmt: skip
    lines += [f"NFE {nfe}: {noise_on_seeds(item)}" for nfe, item in found.comparisons.items()]
    for nfe, of in found.correlations.items():
        what = "not known of fewer than 4 weightings" if of is None else _in_words(of)
        lines.append(f"rank correlation of {found.source} with {found.target} at NFE {nfe}: {what}")
    return "\n".join(lines)


def _in_words(of: Correlation) -> str:
    return f"{of.rho:.2f} (95 % interval {of.low:.2f} to {of.high:.2f}, {of.count} weightings)"
