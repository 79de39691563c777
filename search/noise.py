"""What the scores of a search can say: how noisy they are, and what may be said of the best trial.

What each number means, for users: docs/noise.md.
"""

import math
from dataclasses import dataclass
from statistics import mean

from search.errors import NothingFinished
from search.records import Row, count
from search.scores import finished
from search.spec import Study
from search.statistics import (
    Correlation,
    Deviation,
    chance_of_best,
    pooled_deviation,
    rank_correlation,
    residual_deviation,
    summed,
)

ABOVE_LUCK = "better than luck alone would make it"
_LUCK = 0.05
"""A gain that pure noise reaches in a larger share of studies is not distinguishable from it."""


def ranked(rows: list[Row], *, searched_only: bool = False) -> list[Row]:
    """Finished rows, best first; equal values by number.

    Args:
        searched_only: those alone that a search may choose: no controls, and none that violates a constraint.

    Raises:
        UnlikeProtocols: their values were not measured alike.
    """
    return sorted(
        (row for row in finished(rows) if not searched_only or (row.is_search and not row.violated)),
        key=lambda row: (row.value, row.number),
    )


def infeasible(rows: list[Row]) -> list[Row]:
    """Finished searched trials that violate a constraint, best value first: they are shown, and never chosen."""
    return [row for row in ranked(rows) if row.is_search and row.violated]


def choosable(name: str, rows: list[Row]) -> list[Row]:
    """The searched trials of a study that may be confirmed or exported, best first; at least one.

    Raises:
        NothingFinished: there is none; the message says whether they are still to come, or violate a constraint.
    """
    if best := ranked(rows, searched_only=True):
        return best
    if refused := infeasible(rows):
        raise NothingFinished(f"study {name!r}: {_all_refused(refused)}; loosen them in a new study, or search more")
    counts = count(rows)
    raise NothingFinished(
        f"study {name!r} has no searched trial that ran to its end ({counts.running} running, "
        f"{counts.waiting} waiting, {counts.failed} failed); run the launcher again, or wait for it"
    )


def _all_refused(refused: list[Row]) -> str:
    names = ", ".join(dict.fromkeys(name for row in refused for name in row.violated))
    return f"all searched trials that ran to their end ({len(refused)}) violate the study's constraints ({names})"


def samples_at(study: Study, step: int) -> int | None:
    """How many images a score at this kimg is of; None where scores are not of images."""
    if study.evaluation is None:
        return None
    early = study.evaluation.early_samples if step < study.steps[-1] else None
    return early or study.evaluation.n_samples


def what_differs(study: Study, step: int) -> str:
    """What a score at this kimg is of other than a final one: "on 200 samples", "at NFE 8", both or nothing."""
    samples, nfe = samples_at(study, step), study.nfe_at(step)
    of_samples = [f"on {samples} samples"] if samples != samples_at(study, study.steps[-1]) else []
    return " ".join([*of_samples, *([f"at NFE {nfe}"] if nfe != study.spec.method.nfe else [])])


def is_of_other_samples(study: Study, row: Row) -> bool:
    """Whether a row was pruned at an early score of other samples than a final one's: it stands beside none."""
    return row.state == "PRUNED" and row.last_step is not None and what_differs(study, row.last_step) != ""


def rival(rows: list[Row], *, trained_only: bool = False) -> Row | None:
    """The best control by its mean over training seeds: what a searched trial has to beat.

    One that learns its weights is none: it is a candidate like the trials, only not searched for.

    Raises:
        UnlikeProtocols: values of the rows were not measured alike.
    """
    controls = [row for row in _fixed_controls(rows) if row.is_trained or not trained_only]
    return min(controls, key=lambda row: mean(row.by_seed.values() or (row.value or 0.0,)), default=None)


def _fixed_controls(rows: list[Row]) -> list[Row]:
    return [row for row in ranked(rows) if row.is_control and row.rule == "fixed"]


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """How much the metric moves although the weights stay: the fixed controls at one kimg, pooled (docs/noise.md).

    Controls that train nothing say nothing of training seeds, and have a part in `evaluation_sd` alone.
    """

    step: int
    sd: float
    """Of one weighting over training seeds."""
    df: int
    """Degrees of freedom behind `sd`."""
    paired_sd: float | None
    """Of one run beside others on its own seed: what is left of `sd` when the seed's common part is taken out.

    A difference of two weightings on one seed has √2 of it. None with fewer than two controls on the same seeds.
    """
    paired_df: int
    evaluation_sd: float | None
    """Of one student over evaluation seeds: the metric's own noise. None where it was not measured."""
    evaluation_paired_sd: float | None
    """Of one student beside others on the same evaluation seed: what is left of it when their common part is out.

    No training seed takes it away: all trials of a search are scored on one evaluation seed.
    """
    evaluation_paired_df: int
    largest_range: float
    num_seeds: int
    num_controls: int

    @property
    def finding(self) -> float:
        """The smallest difference of two runs on unlike seeds that is no mere noise: 2 sd of such a difference."""
        return 2 * math.sqrt(2) * self.sd

    def beside(self, control: Row, num_seeds: int) -> Deviation:
        """The noise of a trial's mean over `num_seeds` training seeds beside a control on the same ones.

        Where the control shares no training, all that a seed does counts. What the one evaluation seed does to each
        weighting is added in either case; its measure holds a little of the training's as well, so it is rather large.
        """
        is_alike = control.is_trained and self.paired_sd is not None
        training = Deviation(self.paired_sd or 0.0, self.paired_df) if is_alike else Deviation(self.sd, self.df)
        parts = [Deviation(training.sd / math.sqrt(num_seeds), training.df)]
        if self.evaluation_paired_sd is not None:
            parts.append(Deviation(self.evaluation_paired_sd, self.evaluation_paired_df))
        return summed(parts)


def noise_floor(rows: list[Row], step: int | None = None) -> NoiseFloor | None:
    """The noise of the fixed controls at `step`, by default at the end; None where none has two training seeds."""
    controls = _fixed_controls(rows)
    if step is None:
        step = max((row.last_step for row in controls if row.last_step is not None), default=0)
    repeats = [scores for row in controls if row.is_trained and len(scores := row.over_seeds(step)) > 1]
    pooled = pooled_deviation(list(scores.values()) for scores in repeats)
    if pooled is None:
        return None
    shared = sorted(set.intersection(*(set(scores) for scores in repeats)))
    residual = residual_deviation([[scores[seed] for seed in shared] for scores in repeats])
    scored = [[row.intermediate[step], *row.evaluations] for row in controls if row.last_step == step]
    over_evaluations = pooled_deviation(scored)
    beside = residual_deviation([scores for scores in scored if len(scores) == max(map(len, scored))])
    return NoiseFloor(
        step=step,
        sd=pooled.sd,
        df=pooled.df,
        paired_sd=residual.sd if residual else None,
        paired_df=residual.df if residual else 0,
        evaluation_sd=over_evaluations.sd if over_evaluations else None,
        evaluation_paired_sd=beside.sd if beside else None,
        evaluation_paired_df=beside.df if beside else 0,
        largest_range=max(max(scores.values()) - min(scores.values()) for scores in repeats),
        num_seeds=min(len(scores) for scores in repeats),
        num_controls=len(repeats),
    )


def noise_line(floor: NoiseFloor | None) -> str:
    """The parts of the noise in one line."""
    if floor is None:
        return "noise: not measured, since no control has run on two training seeds (seeds.control_repeats)"
    parts = [f"sd of one run over training seeds {floor.sd:.2g} (df {floor.df})"]
    if floor.paired_sd is not None:
        parts.append(f"beside others on its seed {floor.paired_sd:.2g} (df {floor.paired_df})")
    if floor.evaluation_sd is not None:
        parts.append(f"over evaluation seeds {floor.evaluation_sd:.2g}")
    if floor.evaluation_paired_sd is not None:
        parts.append(f"beside others on those {floor.evaluation_paired_sd:.2g} (df {floor.evaluation_paired_df})")
    return f"noise of {floor.num_controls} control(s): " + ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far apart weightings are at one kimg, beside what the training seed alone does there."""

    step: int
    num_weightings: int
    lowest: float
    highest: float
    floor: NoiseFloor | None

    @property
    def range(self) -> float:
        return self.highest - self.lowest

    @property
    def ratio(self) -> float | None:
        """Range in standard deviations between seeds."""
        return self.range / self.floor.sd if self.floor and self.floor.sd > 0 else None


def spreads(rows: list[Row]) -> list[Spread]:
    """At the end, and, where trials were pruned before it, at the last kimg that all trials reached.

    What trains nothing is no weighting.
    """
    complete = _trained(ranked(rows))
    if len(complete) < 2:
        return []
    last = max(row.last_step or 0 for row in complete)
    shown = [row for row in _trained(rows) if row.state in ("COMPLETE", "PRUNED") and row.intermediate]
    common = max(set.intersection(*(set(row.intermediate) for row in shown)), default=last)
    found = []
    for step in dict.fromkeys((last, common)):
        values = [row.intermediate[step] for row in shown if step in row.intermediate]
        floor = noise_floor(rows, step)
        found.append(
            Spread(step=step, num_weightings=len(values), lowest=min(values), highest=max(values), floor=floor)
        )
    return found


def _trained(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.is_trained]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What a score on the way says about the final one, over the weightings that ran to the end."""

    step: int
    samples: int | None
    metric: Correlation | None
    """Of the metric at this kimg with the final one; None at the end, and of fewer than 4 weightings."""
    surrogate: Correlation | None
    """Of the student's distance to its teacher at this kimg with the final metric."""


def rungs(study: Study, rows: list[Row]) -> list[Rung]:
    """The measured rank correlations with the final score, at each kimg at which trials are scored."""
    ended = _trained(ranked(rows))
    last = max((row.last_step or 0 for row in ended), default=0)
    steps = sorted({step for row in ended for step in (*row.intermediate, *row.surrogate)})
    return [
        Rung(
            step=step,
            samples=samples_at(study, step),
            metric=_with_final(step, ended, [row.intermediate for row in ended]) if step < last else None,
            surrogate=_with_final(step, ended, [row.surrogate for row in ended]),
        )
        for step in steps
    ]


def _with_final(step: int, rows: list[Row], scores: list[dict[int, float]]) -> Correlation | None:
    pairs = [(of[step], row.value or 0.0) for row, of in zip(rows, scores, strict=True) if step in of]
    return rank_correlation([early for early, _ in pairs], [final for _, final in pairs])


@dataclass(frozen=True, kw_only=True)
class Luck:
    """The best searched trial beside the best control, and how often noise alone would look as good."""

    best: Row
    rival: Row
    gain: float
    """The control's value less the trial's, each the mean over the trial's seeds: positive is better."""
    num_trials: int
    """That the best one was picked from, pruned ones among them."""
    num_seeds: int
    """Of a trial."""
    floor: NoiseFloor
    noise: Deviation
    """Of a trial's value beside that control's."""
    chance: float
    """Share of studies in which the best of as many trials, all as good as the control, looks at least so good."""

    @property
    def is_worse(self) -> bool:
        """Whether the trial is worse by more than two runs differ by through their seeds."""
        return self.gain < -self.floor.finding

    @property
    def is_distinguishable(self) -> bool:
        """Whether luck alone would hardly make the trial look so good."""
        return self.chance <= _LUCK


def luck(study: Study, rows: list[Row]) -> Luck | None:
    """How lucky the best searched trial looks; None without a finished trial, a fixed control, or a noise floor."""
    best, beside, floor = ranked(rows, searched_only=True)[:1], rival(rows), noise_floor(rows)
    if not best or beside is None or floor is None:
        return None
    gain = (beside.value or 0.0) - (best[0].value or 0.0)
    num_trials, num_seeds = count(rows).counted, len(study.trial_seeds())
    noise = floor.beside(beside, num_seeds)
    return Luck(
        best=best[0],
        rival=beside,
        gain=gain,
        num_trials=num_trials,
        num_seeds=num_seeds,
        floor=floor,
        noise=noise,
        chance=chance_of_best(gain, noise.sd, noise.df, num_trials),
    )


def verdict(study: Study, rows: list[Row]) -> str:
    """What may be said of the best searched trial: beside the best control, better than luck or not."""
    best = ranked(rows, searched_only=True)
    if not best and (refused := infeasible(rows)):
        return _all_refused(refused)
    if not best or rival(rows) is None:
        return "no trial to compare with a control yet"
    found = luck(study, rows)
    if found is None:
        return "the spread between training seeds is not known: raise seeds.control_repeats"
    pair = f"best trial {found.best.number} against {found.rival.role}"
    amount = f"better by {found.gain:.2g}" if found.gain > 0 else f"worse by {-found.gain:.2g}"
    if found.is_worse:
        return f"{pair}: {amount}, more than two runs differ by through their seeds ({found.floor.finding:.2g})"
    apart = ABOVE_LUCK if found.is_distinguishable else "not distinguishable"
    return (
        f"{pair}: {apart}. It is {amount}, and the best of {found.num_trials} trials of pure noise would look at least "
        f"as good in {_percent(found.chance)} of studies. Fresh seeds decide: "
        f"bdense-weights confirm --study {study.name} --top 3 --seeds 5"
    )


def _percent(chance: float) -> str:
    if chance < 0.01:
        return "less than 1%"
    return "more than 99%" if chance > 0.99 else f"{chance:.0%}"
