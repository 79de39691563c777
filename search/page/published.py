"""What a report says of published tables: their figures, and ours beside them where they were measured alike."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bdense_core.weights import Weights, shares
from search import marks, paper
from search.comparison import Comparison
from search.noise import ranked
from search.page.evidence import Evidence
from search.page.parts import Section, Table, counted, mean_of, number
from search.records import Row, count
from search.spec import Study
from search.statistics import mean_interval

_NOT_MEASURED = "not measured"
_NAMES = {paper.CIFAR10: "CIFAR-10", paper.CIFAR100: "CIFAR-100", paper.IMAGENET64: "ImageNet-64"}


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A value of ours: of a weighting, on a data set at an NFE, as the paper measures."""

    name: str
    shares: Weights
    text: str
    is_candidate: bool
    """Whether it may be called our best: weights of their own, neither a control's nor learned."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those that are not the study's own."""


def section(evidence: Evidence) -> Section:
    """The tables of the study's method, with a column of ours."""
    key, title, sheet = "paper", "Beside the paper", paper.SHEETS.get(evidence.study.spec.method.kind)
    if sheet is None:
        return Section(key=key, title=title, missing="No paper reports figures of this method.")
    tables = [_table(evidence, sheet, of) for of in dict.fromkeys((item.table, item.dataset) for item in sheet.columns)]
    return Section(
        key=key, title=title,
        text=(
            sheet.source,
            f"A value of ours stands here only if it is an FID on {paper.N_SAMPLES:,} samples, of the same method on "
            "the same data set at the same NFE. All values of one data set and NFE come from one place: the "
            "confirmation or a transfer where there is one, else the search.",
            _own(evidence.study),
        ),
        tables=(
            *tables,
            *([_table_4(evidence, sheet)] if sheet.pairs else []),
            *([_models(evidence, sheet)] if sheet.models else []),
        ),
    )  # fmt: skip


def _own(study: Study) -> str:
    samples = f" on {study.evaluation.n_samples:,} samples" if study.evaluation else ""
    method = study.spec.method
    return f"This study: {method.kind} on {study.spec.dataset} at NFE {method.nfe}, {study.metric}{samples}."


def _table(evidence: Evidence, sheet: paper.Sheet, of: tuple[int, str]) -> Table:
    names = (
        f"paper: {sheet.plain}",
        "paper: B-DENSE",
        f"ours: {sheet.plain}",
        "ours: the paper's weights",
        "ours: best",
    )
    found = [item for item in sheet.columns if (item.table, item.dataset) == of]
    rows = [_published_row(sheet, item, _measured(evidence, item.dataset, item.nfe)) for item in found]
    return Table(header=("NFE", *names, ""), rows=rows, caption=f"Table {of[0]}: FID on {_NAMES[of[1]]}.")


def _published_row(sheet: paper.Sheet, item: paper.Published, ours: list[_Measured]) -> tuple[str, ...]:
    best = next((found.text for found in ours if found.is_candidate), "")
    named = {found.name: found.text for found in ours}
    cells = (named.get("endpoint only", ""), named.get(sheet.dense_control, ""), best)
    return (str(item.nfe), f"{item.plain:.2f}", f"{item.dense:.2f}", *cells, "" if any(cells) else _NOT_MEASURED)


def _table_4(evidence: Evidence, sheet: paper.Sheet) -> Table:
    measured = {dataset: _measured(evidence, dataset, 2) for dataset in (paper.IMAGENET64, paper.CIFAR10)}
    rows = []
    for pair in sheet.pairs:
        cells = [
            next((found.text for found in of if not found.settings and pair.has_shares(found.shares)), "")
            for of in measured.values()
        ]
        name = "plain SFD" if pair.a is None else f"({pair.a:.3f}, {pair.b:.3f})"
        remark = "" if any(cells) else _NOT_MEASURED
        rows.append((name, f"{pair.imagenet64:.2f}", cells[0], f"{pair.cifar10:.2f}", cells[1], remark))
    return Table(
        header=("(a, b)", "paper: ImageNet-64", "ours: ImageNet-64", "paper: CIFAR-10", "ours: CIFAR-10", ""),
        rows=tuple(rows),
        caption="Table 4: the paper's five best pairs at NFE 2, FID. Ours are weightings of the same shares. "
        "The paper's plain SFD on ImageNet-64 differs between Tables 3 and 4; it does not say why.",
    )  # fmt: skip


def _models(evidence: Evidence, sheet: paper.Sheet) -> Table:
    """Rows of models, columns of data sets; ours are weightings of the same shares and settings."""
    measured = {dataset: _measured(evidence, dataset, paper.MODELS_NFE) for dataset in (paper.CIFAR10, paper.CIFAR100)}
    header = [f"{whose}: {_NAMES[dataset]}{what}" for dataset in measured for whose, what in _COLUMNS]
    rows = []
    for model in sheet.models:
        cells = [cell for dataset, ours in measured.items() for cell in _model_cells(model, dataset, ours)]
        rows.append((model.name, *cells, "" if any(cells[2::3]) else _NOT_MEASURED))
    return Table(
        header=("model", *header, ""), rows=tuple(rows),
        caption="Main table: FID, and rho, the mean size of the guidance gap over the teacher's.",
    )  # fmt: skip


_COLUMNS = (("paper", ""), ("paper", ", rho"), ("ours", ""))


def _model_cells(model: paper.Model, dataset: str, ours: list[_Measured]) -> tuple[str, str, str]:
    found = next((item.text for item in ours if model.is_run_by(item.shares, item.settings)), "")
    rho = model.rho.get(dataset)
    return f"{model.fid[dataset]:.2f}", "" if rho is None else f"{rho:.2f}", found


def _measured(evidence: Evidence, dataset: str, nfe: int) -> list[_Measured]:
    """Our values that may stand beside the paper's, best first, of one comparison, or of the search if there is none.

    Those of several would be on unlike seeds, and the search's best was picked for being good.
    """
    method = evidence.study.spec.method.kind
    compared = [item.comparison for item in (evidence.confirmation, *evidence.transfers) if item is not None]
    sources = [list(_of_comparison(item)) for item in compared if paper.is_like(item.study, method, dataset, nfe)]
    if paper.is_like(evidence.study, method, dataset, nfe):
        sources.append(list(_of_search(evidence)))
    return next(filter(None, sources), [])


def _of_comparison(comparison: Comparison) -> Iterator[_Measured]:
    for arm in comparison.arms:
        if not arm.missing:
            text = f"{mean_of(arm.mean)}, {counted(arm.mean.count, 'seed')}"
            yield _Measured(
                name=marks.readable(arm.name), text=text,
                shares=_constant(arm.arm.weights, is_constant=arm.arm.rule == "fixed" and not arm.arm.schedule),
                is_candidate=not arm.is_control and arm.may_win,
                settings=_own_settings(comparison.study, arm.arm.settings),
            )  # fmt: skip


def _of_search(evidence: Evidence) -> Iterator[_Measured]:
    num_trials = count(evidence.rows).counted
    for row in ranked(evidence.rows):
        yield _Measured(
            name=marks.name_of(row), is_candidate=row.is_search and not row.violated,
            settings=_own_settings(evidence.study, row.settings),
            shares=_constant(row.weights, is_constant=row.rule == "fixed" and not row.schedule),
            text=_of_control(row) if row.is_control else f"{number(row.value)}, picked from {num_trials}",
        )  # fmt: skip


def _own_settings(study: Study, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the study's."""
    return {name: value for name, value in settings.items() if getattr(study.spec.method, name, None) != value}


def _constant(weights: Weights, *, is_constant: bool) -> Weights:
    """The shares all through training; none where they change in it."""
    return shares(weights) if is_constant and weights else ()


def _of_control(row: Row) -> str:
    found = mean_interval(row.by_seed.values())
    return f"{mean_of(found)}, {counted(found.count, 'seed')}" if found.count > 1 else mean_of(found)
