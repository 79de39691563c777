"""Small studies of the known function, and what a launcher does with them, for the tests of the database."""

from collections import Counter

from search.database import Database
from search.spec import Study
from search.storage import Studies, StudyStore
from search.study_file import load_study, studies_folder


def synthetic(*overrides: str, name: str = "t") -> Study:
    return load_study(studies_folder() / "synthetic.yaml", name=name, overrides=("seeds.control_repeats=1", *overrides))


def opened(url: str, study: Study, *, owner: str | None = None) -> StudyStore:
    """The study as a launcher of its own sees it, with an owner of another machine if named."""
    store = Studies(Database(url)).create_or_resume(study)
    if owner is not None:
        store.trials.owner = f"{owner}|elsewhere|1|1"
    return store


def run_one(store: StudyStore, value: float = 4.0) -> int | None:
    claim = store.trials.claim()
    if claim is None:
        return None
    store.trials.report(claim.number, value, 3, may_prune=False)
    store.trials.complete(claim.number, value)
    return claim.number


def run_all(store: StudyStore) -> None:
    while run_one(store) is not None:
        pass


def states(store: StudyStore) -> Counter[tuple[str, str]]:
    return Counter((row.role, row.state) for row in store.rows())
