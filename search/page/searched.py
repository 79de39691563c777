"""What a search itself shows: its settings, weights, values, noise, and how far early scores foretell the last ones."""

from statistics import mean, stdev

from search import marks, plots
from search.labels import settings_text, term_labels
from search.noise import Rung, noise_floor, ranked, rungs
from search.noise import luck as measured_luck
from search.page.evidence import Evidence
from search.page.further import extent_of, refused
from search.page.parts import (
    NOTHING,
    OF_BAND,
    Picture,
    Section,
    Table,
    counted,
    filled,
    listed,
    number,
    shares_of,
    small,
)
from search.records import Row, count, mixed_versions
from search.spec import Study, flatten
from search.statistics import Correlation

_WIDE, _TALL = (7.4, 3.7), (7.4, 4.3)
_FEW = 6
"""So many kimg are listed."""


def settings(evidence: Evidence) -> Section:
    """What was asked for, and by what the values are measured."""
    study, spec, rows = evidence.study, evidence.study.spec, evidence.rows
    counts = count(rows)
    seeds = f"{listed([str(seed) for seed in study.trial_seeds()])}; controls on {len(study.control_seeds())}"
    versions = sorted({row.code for row in rows if row.code})
    facts = {
        "data set": spec.dataset,
        "method": f"{spec.method.kind}, NFE {spec.method.nfe}",
        "loss terms": listed(spec.method.terms),
        "budget of a trial": f"{spec.method.budget_kimg:g} kimg, scored {_moments(study)}",
        "search": f"{spec.space.family} over {_ranges(study)}; sampler {spec.sampler.kind}, pruner {spec.pruner.kind}",
        "constraints": _constraints(study),
        "trials": f"{counts.counted} of {spec.budget.trials} ended, {counts.running} running, {counts.failed} failed",
        "training seeds of a trial": seeds,
        "metric": f"{study.metric}, lower is better",
        "protocol": _protocol(study),
        "teacher": f"sha256 {study.teacher.sha256[:16]}" if study.teacher else "none: this method needs no teacher",
        "device": "GPU" if spec.resources.gpus else "CPU",
        "code version": listed(versions) or str(evidence.provenance["code_version"]),
        "settings": f"sha256 {str(evidence.provenance['spec_sha256'])[:16]}",
        "created": str(evidence.provenance["created"]),
    }
    return Section(
        key="settings",
        title="Settings",
        text=(
            "What all trials have in common. Values may be compared with values of the same protocol only. "
            "On a CPU the same settings, seeds and code version give the same values again.",
        ),
        tables=(Table(header=("", ""), rows=tuple((name, fact) for name, fact in facts.items() if fact)),),
        details="\n".join(f"{key}: {value}" for key, value in _resolved(study).items()),
    )


def _moments(study: Study) -> str:
    steps = study.steps
    if len(steps) <= _FEW:
        return f"at {listed([str(step) for step in steps])} kimg"
    return f"{len(steps)} times, first at {steps[0]} kimg"


def _ranges(study: Study) -> str:
    weights = [f"{axis} in [{low:g}, {high:g}]" for axis, (low, high) in study.spec.axes.items()]
    return listed([*weights, *(f"{name} in {extent_of(axis)}" for name, axis in study.spec.tuned.items())])


def _constraints(study: Study) -> str:
    bounds = [
        f"{name} {sign} {bound:g}"
        for name, asked in study.spec.constraints.items()
        for sign, bound in (("≥", asked.min), ("≤", asked.max))
        if bound is not None
    ]
    return listed(bounds)


def _protocol(study: Study) -> str:
    if study.evaluation is None:
        return f"none: a known function, not a measured distance (hash {study.protocol_hash()})"
    found = study.evaluation.protocol
    return (
        f"features {found.features} ({found.features_sha256[:12]}), reference {found.reference_sha256[:12]}, "
        f"{found.n_samples} samples of evaluation seed {study.evaluation.seed}, {found.image_preparation} "
        f"(hash {study.protocol_hash()})"
    )


def _resolved(study: Study) -> dict[str, object]:
    """All settings, without the paths of this machine."""
    return {key: value for key, value in flatten(study.to_dict()).items() if not key.endswith(".path")}


def weights(evidence: Evidence) -> Section:
    """The weight curves of the best trials and the controls."""
    study, rows = evidence.study, evidence.rows
    key, title = "weights", "Weight curves"
    shown = marks.curves(rows)
    if not shown:
        return Section(key=key, title=title, missing=NOTHING.format(name=evidence.name))
    text = [
        "The share of each term in the loss, for the best trials and the controls. Under Adam only shares count: a "
        "common factor of all weights changes nothing. A share of zero does not appear on the logarithmic scale."
    ]
    if any(row.schedule for row in rows if row.number in {curve.number for curve in shown}):
        text.append("Where weights change over training or between intervals, their mean is drawn.")
    if any(row.rule != "fixed" for row in rows):
        text.append("Weightings that are learned in training have no curve of their own: they begin as `uniform`.")

    def draw(figure: plots.Figure) -> None:
        left, right = figure.subplots(1, 2)
        plots.draw_curves(left, study, rows)
        plots.draw_curves(right, study, rows, log=True, legend=False)

    kind, names = term_labels(study.spec.method.terms)
    settings_of = {row.number: settings_text(row.settings) for row in rows}
    return Section(
        key=key, title=title, text=tuple(text),
        pictures=(Picture(name=key, alt=f"share of the loss by {kind}", size=_WIDE, draw=draw),),
        tables=(
            filled(
                header=("weighting", study.metric, f"shares: {kind} {', '.join(names)}", "settings"),
                rows=[(c.name, number(c.value), shares_of(c.shares), settings_of[c.number]) for c in shown],
                caption="Best value first. A trial's value is from the search itself: the best of many is partly luck.",
            ),
            *refused(evidence),
        ),
    )  # fmt: skip


def valley(evidence: Evidence) -> Section:
    """Values over the searched axes, with the flat direction."""
    study, rows = evidence.study, evidence.rows
    (x, y), flat = marks.map_axes(study), marks.flat_axis(study)
    key, title = "map", f"{study.metric} over {x}" if y == study.metric else f"The valley in ({x}, {y})"
    drawn = marks.points(study, rows)
    if not any(point.value is not None for point in drawn):
        return Section(key=key, title=title, missing=NOTHING.format(name=evidence.name))
    text = [_of_map(study)]
    if flat:
        text.append(
            f"Along the dashed lines all shares are equal: {flat} only scales the whole loss, which Adam cancels. "
            "Differences along a line are noise, and so is any best place on it."
        )
    if any(point.pruned for point in drawn):
        text.append("Trials that were stopped early have no final value and are drawn as crosses.")
    if any(point.violates for point in drawn):
        text.append("Trials that violate a constraint are upright crosses: they are never the best.")
    placed = {point.label for point in drawn}
    if absent := [name for row in ranked(rows) if row.is_control and (name := marks.name_of(row)) not in placed]:
        text.append(f"Not on the map, since the search could not have proposed them: {listed(absent)}.")
    return Section(
        key=key, title=title, text=tuple(text),
        pictures=(
            Picture(
                name=key, alt=f"{study.metric} of each trial over {x} and {y}", size=_TALL,
                draw=lambda figure: plots.draw_map(figure.subplots(), study, rows),
            ),
        ),
    )  # fmt: skip


def _of_map(study: Study) -> str:
    x, y = marks.map_axes(study)
    if y == study.metric:
        return f"The final value of each trial over its {x}. {OF_BAND}"
    others = [axis for axis in study.spec.searched if axis not in (x, y)]
    more = f" The other axes ({listed(others)}) are not seen here." if others else ""
    return f"Each trial in the plane of its parameters; the darker, the better (lower).{more}"


def _early(study: Study) -> str:
    """What scores before the last one are of; more words only where they are of fewer samples."""
    final, evaluation = study.spec.method.nfe, study.evaluation
    if (calls := sorted({study.nfe_at(step) for step in study.steps} - {final}, reverse=True)) or evaluation is None:
        return f"Scores before the last one are at NFE {listed(list(map(str, calls)))} instead of {final}"
    few, all_ = evaluation.early_samples, evaluation.n_samples
    return f"Scores before the last one are from {few} samples instead of {all_}, which biases them upwards"


def training(evidence: Evidence) -> Section:
    """The metric over training."""
    study, rows = evidence.study, evidence.rows
    key, title = "training", f"{study.metric} over training"
    found, noise = marks.traces(study, rows), marks.band(rows)
    if not found:
        return Section(key=key, title=title, missing=NOTHING.format(name=evidence.name))
    text = ["All trials on their first training seed; grey ones are not among the best."]
    if any(trace.is_pruned for trace in found):
        text.append("A line that ends in a cross was stopped early.")
    if noise is not None:
        text.append(OF_BAND)
    else:
        text.append("No band: the spread between training seeds is not known (`seeds.control_repeats` is 1).")
    if any(trace.detached for trace in found):
        text.append(f"{_early(study)}: no line joins them to the last one.")
    return Section(
        key=key, title=title, text=tuple(text),
        pictures=(
            Picture(
                name=key, alt=f"{study.metric} by kimg for all trials", size=_TALL,
                draw=lambda figure: plots.draw_traces(figure.subplots(), study, rows),
            ),
        ),
    )  # fmt: skip


def noise(evidence: Evidence) -> Section:
    """How much values move when only a seed changes."""
    key, title, rows = "noise", "The noise floor", evidence.rows
    floor, found = noise_floor(rows), marks.repeats(evidence.rows)
    if floor is None or not found:
        return Section(
            key=key, title=title,
            missing="The spread between seeds is not known. A study with `seeds.control_repeats` of 3 or more "
            "measures it.",
        )  # fmt: skip
    still = [marks.name_of(row) for row in ranked(rows) if row.is_control and not row.is_trained]
    text = [
        f"Each control ran on {floor.num_seeds} training seeds or more. Between training seeds the standard "
        f"deviation is {small(floor.sd)}, pooled over {counted(floor.num_controls, 'control')} ({floor.df} degrees "
        "of freedom).",
        f"On the same seed two weightings share noise, data order and targets; what is left of the noise then is "
        f"{small(floor.paired_sd)}." if floor.paired_sd is not None else "",
        f"Scoring one trained student on other evaluation seeds moves the metric by {small(floor.evaluation_sd)}."
        if floor.evaluation_sd is not None else "",
        f"What of that is not common to all weightings is {small(floor.evaluation_paired_sd)} "
        f"({counted(floor.evaluation_paired_df, 'degree')} of freedom). All trials of a search share their evaluation "
        "seed, so further training seeds do not take it away."
        if floor.evaluation_paired_sd is not None else "",
        f"Two single runs on different training seeds may differ by {small(floor.finding)} (2 √2 sd) for no reason but "
        "their seeds.",
        f"Nothing is trained for {listed(still)}, so that training seeds say nothing of it." if still else "",
    ]  # fmt: skip
    return Section(
        key=key, title=title, text=tuple(filter(None, text)),
        pictures=(
            Picture(
                name=key, alt="each control's runs around their mean", size=(7.4, 0.9 + 0.62 * len(found)),
                draw=lambda figure: plots.draw_controls(figure.subplots(), rows),
            ),
        ),
        tables=(
            Table(
                header=("control", "mean", "sd, training seeds", "sd, evaluation seeds", "values by training seed"),
                rows=tuple(
                    (item.name, number(mean(item.training)), small(_sd(item.training)), small(_sd(item.evaluation)),
                     ", ".join(number(value) for value in item.training))
                    for item in found
                ),
                caption="The spread may differ between weightings; the pooled figure then says too much of the calm "
                "ones and too little of the others.",
            ),
        ),
    )  # fmt: skip


def _sd(values: tuple[float, ...]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def luck(evidence: Evidence) -> Section:
    """Whether the best of so many trials of pure noise could look like the best one."""
    key, title = "luck", "Could luck alone look like this?"
    found = measured_luck(evidence.study, evidence.rows)
    if found is None:
        missing = "This needs a finished trial, a control, and the noise floor (`seeds.control_repeats` of 3 or more)."
        return Section(key=key, title=title, missing=missing)
    best_name, rival_name = marks.name_of(found.best), marks.name_of(found.rival)
    lead = (
        f"The best of {counted(found.num_trials, 'trial')} of pure noise would look at least this good in "
        f"{_percent(found.chance)} of studies."
    )
    if found.is_worse:
        lead = (
            f"There is no gain to explain: {best_name} is worse than {rival_name} by more than two runs differ by "
            f"through their seeds ({small(found.floor.finding)})."
        )
    return Section(
        key=key, title=title,
        lead=lead,
        text=(
            f"{best_name.capitalize()} has {number(found.best.value)}, {rival_name} {number(found.rival.value)} on the "
            f"same {'training seed' if found.num_seeds == 1 else f'{found.num_seeds} training seeds'}: a gain of "
            f"{found.gain:+.2g}.",
            "The best of many is partly picked for its luck, so this asks how large the best gain is where all "
            f"{found.num_trials} weightings are as good as {rival_name} and differ by noise alone (standard deviation "
            f"{small(found.noise.sd)}, {found.noise.df} degrees of freedom).",
            "It takes the noise to be normal and alike for all weightings. A small number is a reason to confirm "
            "on fresh seeds, not a result.",
        ),
    )  # fmt: skip


def _percent(chance: float) -> str:
    if chance < 0.01:
        return "less than 1 %"
    return "more than 99 %" if chance > 0.99 else f"{100 * chance:.0f} %"


def foresight(evidence: Evidence) -> Section:
    """How far scores on the way foretell the final ones."""
    study, rows = evidence.study, evidence.rows
    key, title = "rungs", "Do early scores foretell the last one?"
    found = [rung for rung in rungs(study, rows) if rung.metric or rung.surrogate]
    if not found:
        return Section(
            key=key, title=title,
            missing="A rank correlation needs four weightings that ran to the end and were scored on the way "
            "(`budget.every_kimg`).",
        )  # fmt: skip
    panels = _panels(study, ranked(rows), found)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)

    def draw(figure: plots.Figure) -> None:
        for axes, (name, pairs) in zip(figure.subplots(lines, columns, squeeze=False).flat, panels, strict=False):
            plots.draw_ranks(axes, pairs, name)
        for axes in figure.axes[len(panels) :]:
            axes.remove()

    return Section(
        key=key, title=title,
        text=(
            "Spearman's rank correlation between a score on the way and the final one: 1 is the same order, 0 "
            "none. Pruning is as good as these numbers. They are over the weightings that ran to the end, controls "
            "among them; whatever was stopped early has no final score, and could move them either way.",
            "Points on the dashed diagonal kept their rank. Ranks of weightings that are equal up to noise are noise "
            "too.",
        ),
        pictures=(
            Picture(name=key, alt="early rank against final rank", size=(7.4, 2.9 * lines), draw=draw),
        ),
        tables=(
            Table(
                header=("kimg", "samples", study.metric, "distance to the teacher"),
                rows=tuple(
                    (str(rung.step), str(rung.samples or ""), _correlation(rung.metric), _correlation(rung.surrogate))
                    for rung in found
                ),
                caption="Rank correlation with the final score, its 95 % interval, and the number of weightings.",
            ),
        ),
    )  # fmt: skip


def _panels(study: Study, ended: list[Row], found: list[Rung]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Early and final scores: of the metric at the last three rungs, of the surrogate at as many."""
    early = {
        study.metric: [(rung.step, [(row.intermediate, row.value) for row in ended]) for rung in found if rung.metric],
        "distance to teacher": [
            (rung.step, [(row.surrogate, row.value) for row in ended]) for rung in found if rung.surrogate
        ],
    }
    return [
        (f"{name}, {step} kimg", [(by_kimg[step], end) for by_kimg, end in of if step in by_kimg and end is not None])
        for name, at in early.items()
        for step, of in at[-3:]
    ]


def _correlation(found: Correlation | None) -> str:
    return "" if found is None else f"{found.rho:.2f} ({found.low:.2f} to {found.high:.2f}, n = {found.count})"


def learned(evidence: Evidence) -> Section:
    """Weights that were learned in training beside the fixed ones."""
    study, rows = evidence.study, evidence.rows
    key, title = "learned", "Learned weightings (experimental)"
    controls = [row for row in ranked(rows) if row.is_control and row.is_trained]
    shown = controls + ranked(rows, searched_only=True)[:1]
    if not any(row.rule != "fixed" for row in shown):
        return Section(
            key=key, title=title,
            missing="No weighting here was learned in training; `experimental: [gate, meta]` in a study file runs two "
            "rules that do.",
        )  # fmt: skip
    ordered = sorted(shown, key=lambda row: mean(row.by_seed.values()))
    return Section(
        key=key, title=title,
        text=(
            "`gate` keeps a term only while its gradient agrees with the primary one's; `meta` moves the shares so "
            "that the primary loss on held-out noise falls. Both begin with equal weights.",
            "All had the same compute, controls on the same seeds: a rule pays for its own looks at the gradients with "
            "images that it does not train on.",
        ),
        tables=(
            Table(
                header=(
                    "weighting", "weights", "shares in the end", f"{study.metric}, mean over seeds", "sd",
                    "by training seed",
                ),
                rows=[_by_rule(row) for row in ordered],
                caption=f"The best trial ran on {counted(len(study.trial_seeds()), 'seed')} and was picked for its "
                "value.",
            ),
        ),
    )  # fmt: skip


def _by_rule(row: Row) -> tuple[str, ...]:
    values, is_fixed = tuple(row.by_seed.values()), row.rule == "fixed"
    shares = " ".join(f"{share:.2f}" for share in (row.shares if is_fixed else row.shares_learned))
    scores = number(mean(values)), small(_sd(values)), ", ".join(map(number, values))
    return marks.name_of(row), "fixed" if is_fixed else "learned", shares, *scores


def warnings(evidence: Evidence) -> Section:
    """What may mislead, and what went wrong, in the search and in its comparisons."""
    found = list(evidence.notes)
    everything = [(name, row) for name, rows in evidence.rows_by_study.items() for row in rows]
    if mixed := mixed_versions(row for _, row in everything):
        found.append(mixed)
    found += [f"{name}, trial {row.number}: {note}" for name, row in everything for note in row.notes]
    failed = [
        (name, str(row.number), marks.name_of(row), row.reason or "")
        for name, row in everything
        if row.state == "FAIL" and not row.is_retried
    ]
    caption = "Trials that failed for good. They have no value and no part in any figure here."
    table = Table(header=("study", "trial", "weighting", "reason"), rows=failed, caption=caption)
    return Section(
        key="warnings", title="Warnings", text=tuple(found), tables=(table,) if failed else (),
        missing="" if found or failed else "Nothing to warn of.",
    )  # fmt: skip
