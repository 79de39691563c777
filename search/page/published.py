"""What a report says of the paper's tables: its figures, and ours beside them where they were measured alike."""

from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A value of ours: of a weighting, on a data set at an NFE, as the paper measures."""

    name: str
    shares: Weights
    text: str
    is_candidate: bool
    """Whether it may be called our best: weights of their own, neither a control's nor learned."""


def section(evidence: Evidence) -> Section:
    """Tables 2 to 4 with a column of ours."""
    return Section(
        key="paper", title="Beside the paper",
        text=(
            f"The paper's FIDs (arXiv 2602.15971) are of one run each, on {paper.N_SAMPLES:,} samples, with no "
            "repeated seeds.",
            "A value of ours stands here only if it is an FID on as many samples, of SFD on the same data set at the "
            "same NFE. All values of one data set and NFE come from one place: the confirmation or a transfer where "
            "there is one, else the search.",
            _own(evidence.study),
        ),
        tables=(_table(evidence, 2, "CIFAR-10"), _table(evidence, 3, "ImageNet-64"), _table_4(evidence)),
    )  # fmt: skip


def _own(study: Study) -> str:
    samples = f" on {study.evaluation.n_samples:,} samples" if study.evaluation else ""
    method = study.spec.method
    return f"This study: {method.kind} on {study.spec.dataset} at NFE {method.nfe}, {study.metric}{samples}."


def _table(evidence: Evidence, table: int, dataset: str) -> Table:
    columns = ("NFE", "paper: SFD", "paper: B-DENSE", "ours: SFD", "ours: the paper's weights", "ours: best", "")
    found = [item for item in paper.TABLES if item.table == table]
    rows = [_published_row(item, _measured(evidence, item.dataset, item.nfe)) for item in found]
    return Table(header=columns, rows=rows, caption=f"Table {table}: FID on {dataset}.")


def _published_row(item: paper.Published, ours: list[_Measured]) -> tuple[str, ...]:
    best = next((found.text for found in ours if found.is_candidate), "")
    named = {found.name: found.text for found in ours}
    cells = (named.get("endpoint only", ""), named.get("paper", ""), best)
    return (str(item.nfe), f"{item.sfd:.2f}", f"{item.dense:.2f}", *cells, "" if any(cells) else _NOT_MEASURED)


def _table_4(evidence: Evidence) -> Table:
    measured = {dataset: _measured(evidence, dataset, 2) for dataset in (paper.IMAGENET64, paper.CIFAR10)}
    rows = []
    for pair in paper.TABLE_4:
        cells = [
            next((found.text for found in measured[dataset] if pair.has_shares(found.shares)), "")
            for dataset in (paper.IMAGENET64, paper.CIFAR10)
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


def _measured(evidence: Evidence, dataset: str, nfe: int) -> list[_Measured]:
    """Our values that may stand beside the paper's, best first, of one comparison, or of the search if there is none.

    Those of several would be on unlike seeds, and the search's best was picked for being good.
    """
    compared = [item.comparison for item in (evidence.confirmation, *evidence.transfers) if item is not None]
    sources = [list(_of_comparison(item)) for item in compared if paper.is_like(item.study, dataset, nfe)]
    if paper.is_like(evidence.study, dataset, nfe):
        sources.append(list(_of_search(evidence)))
    return next(filter(None, sources), [])


def _of_comparison(comparison: Comparison) -> Iterator[_Measured]:
    for arm in comparison.arms:
        if not arm.missing:
            text = f"{mean_of(arm.mean)}, {counted(arm.mean.count, 'seed')}"
            yield _Measured(
                name=marks.readable(arm.name), text=text,
                shares=_constant(arm.arm.weights, is_constant=arm.arm.rule == "fixed" and not arm.arm.schedule),
                is_candidate=not arm.is_control and arm.arm.rule == "fixed",
            )  # fmt: skip


def _of_search(evidence: Evidence) -> Iterator[_Measured]:
    num_trials = count(evidence.rows).counted
    for row in ranked(evidence.rows):
        yield _Measured(
            name=marks.name_of(row), is_candidate=row.is_search,
            shares=_constant(row.weights, is_constant=row.rule == "fixed" and not row.schedule),
            text=_of_control(row) if row.is_control else f"{number(row.value)}, picked from {num_trials}",
        )  # fmt: skip


def _constant(weights: Weights, *, is_constant: bool) -> Weights:
    """The shares all through training; none where they change in it."""
    return shares(weights) if is_constant and weights else ()


def _of_control(row: Row) -> str:
    found = mean_interval(row.by_seed.values())
    return f"{mean_of(found)}, {counted(found.count, 'seed')}" if found.count > 1 else mean_of(found)
