"""The decision rule on whole simulated studies: search with the study's own sampler, then fresh seeds."""

from collections.abc import Iterator

import optuna
import pytest

from benchmarks.decisions import CASES, Decision, decide
from search.spec import Study
from search.study_file import load_study, studies_folder

NUM_STUDIES = 100


@pytest.fixture(scope="module")
def study() -> Iterator[Study]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield load_study(studies_folder() / "digits.yaml")
    optuna.logging.set_verbosity(verbosity)


def decisions(study: Study, case: str) -> list[Decision]:
    return [decide(study, CASES[case], seed) for seed in range(NUM_STUDIES)]


def test_pure_noise_is_called_not_distinguishable_in_at_least_95_of_100_studies(study: Study) -> None:
    found = decisions(study, "noise")
    assert sum(item.winner is None and item.verdict.startswith("not distinguishable") for item in found) >= 95
    assert sum(item.is_above_luck for item in found) <= 10, "the search alone: 5 of 100 by its own rule"


def test_a_gap_of_three_noise_spreads_has_a_winner_in_at_least_90_of_100_studies(study: Study) -> None:
    found = decisions(study, "gap")
    assert sum(item.winner is not None and "is better than every control" in item.verdict for item in found) >= 90


@pytest.mark.parametrize("case", ["unequal", "noisy control"])
def test_unequal_noise_is_not_taken_for_a_winner(study: Study, case: str) -> None:
    """In 5 of 100 studies at most by the rule; more than 10 of 100 would be a chance of 1 in 100."""
    found = decisions(study.edited({"sampler.kind": "random"}), case)
    assert sum(item.winner is not None for item in found) <= 10
