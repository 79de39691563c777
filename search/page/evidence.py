"""All that a report stands on, read from the database at once."""

from dataclasses import dataclass

from bdense_core.errors import BadValue
from search import report
from search.comparison import Comparison, compare
from search.records import Row
from search.spec import Study
from search.storage import Studies, StudyStore


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A comparison with the runs that it was made from."""

    comparison: Comparison
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A search with its confirmation and its transfers, as far as there are any."""

    study: Study
    rows: list[Row]
    notes: tuple[str, ...]
    provenance: dict[str, str | None]
    confirmation: Compared | None
    transfers: tuple[Compared, ...]

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def rows_by_study(self) -> dict[str, list[Row]]:
        """The search's rows, and those of every comparison of it."""
        compared = [item for item in (self.confirmation, *self.transfers) if item is not None]
        return {self.name: self.rows} | {item.comparison.study.name: item.rows for item in compared}


def gather(studies: Studies, name: str) -> Evidence:
    """What the database holds on a study.

    Raises:
        StudyNotFound: there is none of that name.
        BadValue: it is a comparison itself.
        UnlikeProtocols: trials of it cannot be compared with each other.
    """
    store = studies.open(name)
    if (section := store.study.spec.comparison) is not None:
        raise BadValue(f"study {name!r} is a comparison; its results stand in the report of --study {section.of}")
    rows = store.rows()
    compared = [(other.study.spec.comparison, _compared(other)) for other in studies.comparisons_of(store)]
    return Evidence(
        study=store.study,
        rows=rows,
        notes=tuple(report.notes(store, rows)),
        provenance=store.provenance(),
        confirmation=next((item for section, item in compared if section and section.kind == "confirm"), None),
        transfers=tuple(
            sorted(
                (item for section, item in compared if section and section.kind == "transfer"),
                key=lambda item: (target_of(item.comparison.study), item.comparison.study.spec.method.nfe),
            )
        ),
    )


def target_of(study: Study) -> tuple[str, str]:
    """What transfers at several NFEs have in common: the target, and how its students are scored."""
    return study.spec.comparison.target if study.spec.comparison else study.name, study.protocol_hash()


def _compared(store: StudyStore) -> Compared:
    rows = store.rows()
    return Compared(comparison=compare(store.study, rows), rows=rows)
