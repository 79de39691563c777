"""What a report says of comparisons: the verdict, the confirmation, transfers, and images side by side."""

import base64
import binascii
from itertools import groupby
from typing import NamedTuple

from search import marks, plots
from search.comparison import ArmResult, Comparison, noise_on_seeds
from search.labels import settings_text
from search.noise import ranked, verdict
from search.page.evidence import Compared, Evidence, target_of
from search.page.parts import Picture, Section, Strip, Table, counted, gain_of, listed, mean_of, number
from search.records import Row, count
from search.transfer import correlation, source_worth

_PNG = b"\x89PNG\r\n\x1a\n"


def judgement(evidence: Evidence) -> Section:
    """What may be said, and on what."""
    study, confirmation = evidence.study, evidence.confirmation
    counts = count(evidence.rows)
    progress = (
        f"{counts.counted} of {study.spec.budget.trials} searched trials have ended"
        + (f", {counts.running} are running" if counts.running else "")
        + (f", {counts.failed} failed" if counts.failed else "")
        + "."
    )
    search = f"The search alone: {verdict(study, evidence.rows)}."
    if confirmation is None:
        return Section(
            key="verdict", title="Verdict", lead="Not confirmed yet.",
            text=(
                search, "The best of many trials is partly luck: only fresh seeds tell whether it is better.", progress,
            ),
            missing=f"To confirm: `bdense-weights confirm --study {study.name} --top 3 --seeds 5`",
        )  # fmt: skip
    found = confirmation.comparison
    return Section(key="verdict", title="Verdict", lead=_headline(found), text=(_verdict(found), progress))


def _headline(found: Comparison) -> str:
    if found.winner is not None:
        return f"Confirmed: {marks.readable(found.winner)} is better than every control."
    if not found.is_complete:
        return "Not confirmed yet: runs of the confirmation are missing."
    return "Not confirmed: no candidate is shown to be better than every control."


def _verdict(found: Comparison) -> str:
    """The comparison's own sentence, with the weightings called as everywhere here."""
    text = found.verdict
    for arm in found.arms:
        text = text.replace(arm.name, marks.readable(arm.name))
    return text[:1].upper() + text[1:] + "."


def confirmation(evidence: Evidence) -> Section:
    """Paired gains over each control on fresh seeds."""
    key, title = "confirmation", "Confirmation on fresh seeds"
    if evidence.confirmation is None:
        return Section(
            key=key, title=title,
            missing=f"Not run yet: `bdense-weights confirm --study {evidence.name}` runs the best trials and the "
            "controls again, each on the same fresh training seeds.",
        )  # fmt: skip
    found, colors = evidence.confirmation.comparison, marks.Colors(evidence.rows)
    drawn = marks.effects(found)
    num_panels = len({effect.control for effect in drawn})
    forest = Picture(
        name=key, alt="gain of each candidate over each control, by seed and in the mean",
        size=(7.4, 0.6 + num_panels * 0.75 + 0.27 * len(drawn)),
        draw=lambda figure: plots.draw_forest(figure, found, colors),
    )  # fmt: skip
    return Section(
        key=key, title=title,
        text=(
            _verdict(found),
            f"{counted(len(found.seeds), 'fresh training seed')}, each with evaluation noise of its own; all "
            "weightings share both, so a gain is the control's value less the candidate's on the same seed. Small "
            "circles are seeds, diamonds their mean, bars its 95 % interval, two-sided and each for itself.",
            "A candidate is confirmed if it is better than every control, with all candidates together wrong in at "
            "most 5 % of such comparisons. Each panel has a scale of its own.",
        ),
        pictures=(forest,) if drawn else (),
        tables=(
            _arms_table(found, source=f"in {evidence.name}"),
            *((_gains_table(found),) if drawn else ()),
            *_further_tables(found),
        ),
    )  # fmt: skip


def _arms_table(found: Comparison, source: str) -> Table:
    return Table(
        header=("weighting", source, f"{found.study.metric}, mean", ""),
        rows=[
            (marks.readable(arm.name), number(arm.arm.source_value), mean_of(arm.mean), _remark(arm))
            for arm in found.arms
        ],
        caption="Best mean first, with 95 % intervals. The value in the search was picked for being good; the mean "
        f"here was not. {_noise(found)}",
        marked=next((i for i, arm in enumerate(found.arms) if arm.name == found.winner), None),
    )


def _noise(found: Comparison) -> str:
    line = noise_on_seeds(found)
    return f"{line[:1].upper()}{line[1:]}."


def _gains_table(found: Comparison) -> Table:
    gains = [(marks.readable(arm.name), gain) for arm in found.arms for gain in arm.gains if gain.interval.count]
    return Table(
        header=("candidate", "over", f"gain in {found.study.metric}", "p"),
        rows=[
            (name, marks.readable(gain.control), gain_of(gain.interval), f"{gain.p_value:.2g}") for name, gain in gains
        ],
        caption="Positive is better, with 95 % intervals. p: how often so large a gain comes about where there is "
        "none, one-sided, of this pair alone.",
    )


def _further_tables(found: Comparison) -> list[Table]:
    """A table for each figure beside the metric: its means, and differences from one control."""
    reference = found.baseline or ""
    return [
        Table(
            header=("weighting", f"{name}, mean", f"less that of {marks.readable(reference)}"),
            rows=[
                (marks.readable(arm.name), mean_of(of.mean), gain_of(of.differences.get(reference)))
                for arm in found.arms
                if (of := by_arm.get(arm.name)) is not None
            ],
            caption=f"{name}: {found.study.spec.method.metrics().get(name, 'a further figure')}. Differences are on "
            "the same seeds, with 95 % intervals; the verdict does not ask for them.",
        )
        for name, by_arm in found.metrics.items()
    ]


def _remark(arm: ArmResult) -> str:
    if arm.missing:
        return "no result on seed " + listed([str(seed) for seed in arm.missing])
    if arm.same_as is not None:
        return f"the same weighting as {marks.readable(arm.same_as)}"
    found = ["better than every control"] if arm.is_confirmed else []
    broken = [f"violates {listed(arm.violated)}"] if arm.violated else []
    own = [settings_text(arm.arm.settings)] if arm.arm.settings else []
    return "; ".join([*found, *broken, *own])


def transfer(evidence: Evidence) -> Section:
    """What the weights are worth on other data, networks or NFE, without a new search."""
    key, title = "transfer", "Carried over"
    if not evidence.transfers:
        return Section(
            key=key, title=title,
            missing=f"Not run yet: `bdense-weights export --study {evidence.name} --output weights.json`, then "
            "`bdense-weights transfer --weights weights.json --to TARGET.yaml --nfe 2,3`.",
        )  # fmt: skip
    found = [item.comparison for item in evidence.transfers]
    return Section(
        key=key, title=title,
        text=(
            "The weights that this study found, run on targets without a new search, beside the targets' own controls. "
            "Gains are paired by seed; the verdict follows the rule of a confirmation.",
            "The rank correlation compares the order of the weightings where they come from with their order on the "
            "target. Of few weightings it is loose: look at its interval.",
            *(f"{_target(item)}: {_correlation(item)} {_verdict(item)}" for item in found),
        ),
        pictures=_transfer_pictures(evidence, found),
        tables=tuple(
            table for item in found for table in (_transfer_table(item, evidence.name), *_further_tables(item))
        ),
    )  # fmt: skip


def _target(found: Comparison) -> str:
    return f"{found.study.spec.dataset} at NFE {found.study.spec.method.nfe} ({found.study.name})"


def _correlation(found: Comparison) -> str:
    rho = correlation(source_worth(found.arms), found.arms)
    if rho is None:
        return "too few weightings with a value in both for a rank correlation."
    return f"rank correlation {rho.rho:.2f} (95 % interval {rho.low:.2f} to {rho.high:.2f}, {rho.count} weightings)."


def _transfer_pictures(evidence: Evidence, found: list[Comparison]) -> tuple[Picture, ...]:
    """One figure for each target that was scored alike, all its NFEs in it; without gains there is none."""
    targets = [list(group) for _, group in groupby(filter(_has_gains, found), key=lambda item: target_of(item.study))]
    colors = marks.Colors(evidence.rows)

    def picture(number: int, shown: list[Comparison]) -> Picture:
        baseline = shown[0].baseline or ""
        return Picture(
            name=f"transfer-{number}", size=(7.4, 3.4),
            alt=f"gain over {marks.readable(baseline)} on {shown[0].study.spec.dataset} by NFE",
            draw=lambda figure: plots.draw_transfer(figure.subplots(), shown, colors, baseline),
        )  # fmt: skip

    return tuple(picture(number, shown) for number, shown in enumerate(targets, start=1))


def _has_gains(found: Comparison) -> bool:
    baseline = found.baseline or ""
    return any(marks.gain_over(found, arm.name, baseline) for arm in found.arms if arm.name != baseline)


def _transfer_table(found: Comparison, source: str) -> Table:
    baseline, worth = found.baseline or "", source_worth(found.arms)
    rows = tuple(
        (
            marks.readable(arm.name), number(worth.values.get(arm.name)), mean_of(arm.mean),
            "" if arm.name == baseline else gain_of(marks.gain_over(found, arm.name, baseline)), _remark(arm),
        )
        for arm in found.arms
    )  # fmt: skip
    return Table(
        header=(
            "weighting",
            f"in {source}",
            f"{found.study.metric}, mean",
            f"gain over {marks.readable(baseline)}",
            "",
        ),
        rows=rows,
        caption=f"{_target(found)}, {counted(len(found.seeds), 'seed')}. Best mean first; intervals: 95 %. "
        f"In {source}: {worth.what}. {_noise(found)}",
        marked=next((i for i, arm in enumerate(found.arms) if arm.name == found.winner), None),
    )


class _Shown(NamedTuple):
    where: str
    rows: list[Row]


def samples(evidence: Evidence) -> Section:
    """Images of students above their teacher's, on the same noise."""
    key, title = "samples", "Images"
    strips = [strip for shown in _with_samples(evidence) for strip in _strips(shown)]
    if not strips:
        return Section(
            key=key, title=title,
            missing="No images were kept. Controls and the arms of a confirmation keep some, where the method makes "
            "images.",
        )  # fmt: skip
    return Section(
        key=key, title=title,
        text=(
            "Of each strip the upper row is the student's, the lower one the teacher's on the same noise. Strips "
            "of one study and seed show the same noise. A few images say little of a distance over thousands; they "
            "show gross faults.",
        ),
        strips=tuple(strips),
    )  # fmt: skip


def _with_samples(evidence: Evidence) -> list[_Shown]:
    """The controls of the search, the confirmation's arms on its first seed, and each transfer's."""
    kept = [_Shown(evidence.name, [row for row in ranked(evidence.rows) if row.samples])]
    for item in (evidence.confirmation, *evidence.transfers):
        if item is not None:
            kept.append(_Shown(item.comparison.study.name, _of_first_seed(item)))
    return kept


def _of_first_seed(item: Compared) -> list[Row]:
    first = item.comparison.seeds[0]
    return [row for row in ranked(item.rows) if row.samples and row.seeds == (first,)]


def _strips(shown: _Shown) -> list[Strip]:
    return [
        Strip(
            name=f"{shown.where}-{row.number}", content=row.samples,
            label=f"{marks.name_of(row)}: {number(row.value)} ({shown.where}, seed {row.seeds[0]})",
        )
        for row in shown.rows
        if row.samples and _is_png(row.samples)
    ]  # fmt: skip


def _is_png(content: str) -> bool:
    try:
        return base64.b64decode(content, validate=True).startswith(_PNG)
    except binascii.Error:
        return False
