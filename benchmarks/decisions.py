"""How often a study decides right: simulated searches and their confirmations, where the truth is known.

    python -m benchmarks.decisions --studies 200 --seed 1

A study is studies/digits.yaml with made-up scores: its own sampler proposes 12 trials beside the controls, then the
best 3 and the controls run on 5 fresh seeds, and `search.comparison.compare` decides, as `bdense-weights confirm`
does. A score is the weighting's truth, plus what its training seed does to all weightings alike, plus noise of the
run's own. Nothing is trained. The cases:

- `noise`: all weightings are equally good. Right is "not distinguishable".
- `gap`: every proposal is better than every control by 3 standard deviations of a run. Right is a winner.
- `unequal`: all are equally good, but their noise grows from 0.002 at endpoint only to 0.084 at uniform weights, as on
  the digits, so the search picks noisy ones. Right is "not distinguishable".
- `noisy control`: uniform weights are as good as every proposal but 40 times as noisy; the other controls are far
  worse, so only the noisy one stands between a lucky proposal and a wrong winner: the rule's worst case.

Printed is JSON: for each case how often there was a winner, how often the verdict was "not distinguishable", and how
often the search alone, before any fresh seed, called its best trial better than luck; with 95 % intervals (Wilson).
"""

import json
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import optuna
import scipy
from optuna.exceptions import ExperimentalWarning
from optuna.trial import create_trial
from scipy.stats import binomtest

from bdense_core.weights import Weights, shares
from search import noise
from search.comparison import compare
from search.records import SEARCH, Row
from search.samplers import make_sampler
from search.sections import Arm
from search.spec import Study
from search.study_file import load_study, studies_folder

TOP = 3
FRESH = tuple(range(1000, 1005))
NOISE = 0.05
"""Standard deviation of a run, of about the digits' size."""
SEED_EFFECT = 0.1
"""Standard deviation of what a training seed does to all weightings alike."""

Case = Callable[[str, Weights], tuple[float, float]]
"""A control's name, or whatever else, and weights -> their truth, and the standard deviation of a run's own noise."""

_CONTROLS = ("endpoint_only", "uniform", "paper")


def _noise(name: str, weights: Weights) -> tuple[float, float]:
    return 1.0, NOISE


def _gap(name: str, weights: Weights) -> tuple[float, float]:
    return (1.0 if name in _CONTROLS else 1.0 - 3 * NOISE), NOISE


def _unequal(name: str, weights: Weights) -> tuple[float, float]:
    distance = min(1.0, (1 - shares(weights)[-1]) / (1 - 1 / len(weights)))  # 0 at endpoint only, 1 at uniform weights
    return 1.0, 0.002 * 42**distance


def _noisy_control(name: str, weights: Weights) -> tuple[float, float]:
    if name == "uniform":
        return 1.0, 40 * NOISE
    return (1000.0 if name in _CONTROLS else 1.0), NOISE


CASES: dict[str, Case] = {"noise": _noise, "gap": _gap, "unequal": _unequal, "noisy control": _noisy_control}


@dataclass(frozen=True)
class Decision:
    """What one simulated study said."""

    winner: str | None
    verdict: str
    is_above_luck: bool
    """Whether the search alone called its best trial better than luck."""


def decide(study: Study, case: Case, seed: int) -> Decision:
    """One search and its confirmation."""
    lab = _Lab(case, np.random.default_rng(seed))
    searched = _search(study.edited({"sampler.seed": seed}), lab)
    best = noise.ranked(searched, searched_only=True)[:TOP]
    arms = [Arm(name=f"trial-{row.number}", weights=row.weights, trial=row.number) for row in best]
    every = [arm.model_dump() for arm in (*arms, *study.controls().values())]
    about = {"kind": "confirm", "of": study.name, "of_created": "", "target": study.name}
    confirmation = study.edited({"comparison": {**about, "arms": every, "seeds": FRESH}})
    runs = [
        _row(confirmation, number, role, arm.weights, {seed: lab.score(arm.name, arm.weights, seed) for seed in seeds})
        for number, (role, seeds, arm) in enumerate(confirmation.fixed_runs())
    ]
    compared = compare(confirmation, runs)
    return Decision(compared.winner, compared.verdict, noise.ABOVE_LUCK in noise.verdict(study, searched))


class _Lab:
    """Scores as a case has them."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self._case = case
        self._rng = rng
        self._of_seed: dict[int, float] = {}

    def score(self, name: str, weights: Weights, seed: int) -> float:
        truth, sd = self._case(name, weights)
        if seed not in self._of_seed:
            self._of_seed[seed] = SEED_EFFECT * self._rng.normal()
        return truth + self._of_seed[seed] + sd * self._rng.normal()


def _search(study: Study, lab: _Lab) -> list[Row]:
    """The controls, and then what the study's sampler proposes, one after the other."""
    rows: list[Row] = []
    asking = optuna.create_study()
    for role, seeds, arm in study.fixed_runs():
        scores = {seed: lab.score(arm.name, arm.weights, seed) for seed in seeds}
        rows.append(_row(study, len(rows), role, arm.weights, scores))
        asking.add_trial(create_trial(value=rows[-1].value, user_attrs={"role": role}))
    for _ in range(study.spec.budget.trials):
        asking.sampler = make_sampler(study)  # a launcher keeps nothing either
        trial = asking.ask()
        params = {name: trial.suggest_float(name, low, high) for name, (low, high) in study.spec.axes.items()}
        weights = study.spec.space.weights(params, study.num_branches)
        scores = {seed: lab.score(SEARCH, weights, seed) for seed in study.trial_seeds()}
        rows.append(_row(study, len(rows), SEARCH, weights, scores))
        asking.tell(trial, rows[-1].value)
    return rows


def _row(study: Study, number: int, role: str, weights: Weights, scores: dict[int, float]) -> Row:
    """A run that ended, as the database would hold it. `scores` begin with the first training seed's."""
    seeds, last = tuple(scores), study.steps[-1]
    return Row(
        number=number, state="COMPLETE", role=role, params={}, weights=weights, seeds=seeds, value=scores[seeds[0]],
        intermediate={last: scores[seeds[0]]}, repeats=tuple((seed, last, scores[seed]) for seed in seeds[1:]),
        duration_s=None, reason=None, is_final=False, owner=None, retry_of=None, protocol=study.protocol_hash(),
    )  # fmt: skip


def counted(study: Study, case: Case, num_studies: int, seed: int) -> dict[str, Any]:
    """How often each thing was said."""
    decisions = [decide(study, case, seed * 1_000_000 + i) for i in range(num_studies)]
    return {
        "winner": _share(sum(item.winner is not None for item in decisions), num_studies),
        "not distinguishable": _share(
            sum(item.verdict.startswith("not distinguishable") for item in decisions), num_studies
        ),
        "search alone above luck": _share(sum(item.is_above_luck for item in decisions), num_studies),
    }


def _share(count: int, total: int) -> dict[str, float]:
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return {"count": count, "share": count / total, "low": round(interval.low, 4), "high": round(interval.high, 4)}


@click.command()
@click.option("--studies", default=200, show_default=True, type=click.IntRange(min=1), help="Of each case.")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(min=0))
@click.option("--sampler", default="tpe", show_default=True, help="sampler.kind of the studies.")
def main(studies: int, seed: int, sampler: str) -> None:
    """Simulate studies and print how often they decide right."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", ExperimentalWarning)
    study = load_study(studies_folder() / "digits.yaml", overrides=(f"sampler.kind={sampler}",))
    result = {
        "studies": studies, "seed": seed, "sampler": sampler, "trials": study.spec.budget.trials,
        "controls": list(study.controls()), "candidates": TOP, "fresh_seeds": len(FRESH),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "cases": {name: counted(study, case, studies, seed) for name, case in CASES.items()},
    }  # fmt: skip
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
