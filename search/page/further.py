"""What a report shows of searched settings, of figures beside the metric, and of the constraints on them."""

from bdense_core.methods.base import Axis
from search import marks, plots
from search.labels import settings_text, value_text
from search.noise import infeasible
from search.page.evidence import Evidence
from search.page.parts import NOTHING, OF_BAND, Picture, Section, Table, filled, listed, number, shares_of

_SIZE = (7.4, 3.7)


def tuned(evidence: Evidence) -> Section:
    """Values over the settings that were searched beside the weights."""
    study, rows = evidence.study, evidence.rows
    key, title = "tuned", "Settings that were searched"
    if not study.spec.tuned:
        return Section(
            key=key, title=title,
            missing="This study searches weights alone; `tune` in a study file searches settings of the method beside "
            "them.",
        )  # fmt: skip
    drawn = marks.slices(study, rows)
    if not any(point.value is not None for found in drawn.values() for point in found):
        return Section(key=key, title=title, missing=NOTHING.format(name=evidence.name))

    def picture(name: str) -> Picture:
        return Picture(
            name=f"{key}-{name}", alt=f"{study.metric} of each trial over {name}", size=_SIZE,
            draw=lambda figure: plots.draw_slice(figure.subplots(), study, rows, name, drawn[name]),
        )  # fmt: skip

    axes = study.spec.tuned
    return Section(
        key=key, title=title,
        text=(
            "The final value of each trial over one setting at a time: all else differs as well, weights among it. "
            + OF_BAND,
        ),
        pictures=tuple(picture(name) for name in drawn),
        tables=(
            Table(
                header=("setting", "searched", "what it is"),
                rows=[(name, extent_of(axis), axis.about) for name, axis in axes.items()],
            ),
        ),
    )  # fmt: skip


def metrics(evidence: Evidence) -> Section:
    """Figures beside the metric, of the controls and the best trials."""
    study = evidence.study
    key, title, meanings = "metrics", "Further figures", study.spec.method.metrics()
    shown = [row for row in marks.named(evidence.rows) if row.metrics]
    if not shown:
        missing = "This method has no figures beside the metric."
        return Section(
            key=key, title=title, missing=NOTHING.format(name=evidence.name) if meanings else missing
        )  # fmt: skip
    names = list(dict.fromkeys([*meanings, *(name for row in shown for name in row.metrics)]))
    return Section(
        key=key, title=title,
        text=(
            "Of the student of each run's first training seed. Neither the search's ranking nor a verdict asks for "
            "them; constraints do.",
            *(f"{name}: {meaning}." for name, meaning in meanings.items()),
        ),
        tables=(
            filled(
                header=("weighting", *names, "violates"),
                rows=[
                    (marks.name_of(row), *(number(row.metrics.get(name)) for name in names), listed(row.violated))
                    for row in shown
                ],
                caption=f"Best {study.metric} first.",
            ),
        ),
    )  # fmt: skip


def refused(evidence: Evidence) -> list[Table]:
    """Trials that are never the best, whatever their value."""
    rows = [
        (
            marks.name_of(row),
            number(row.value),
            shares_of(row.shares),
            settings_text(row.settings),
            listed(row.violated),
        )
        for row in infeasible(evidence.rows)
    ]
    header = ("weighting", evidence.study.metric, "shares", "settings", "violates")
    caption = "Trials that ran to the end and do not keep the constraints: none of them is ever the best."
    return [filled(header, rows, caption)] if rows else []


def extent_of(axis: Axis) -> str:
    """The range or the choices of a searched setting."""
    return f"{{{', '.join(map(value_text, axis.choices))}}}" if axis.choices else f"[{axis.low:g}, {axis.high:g}]"
