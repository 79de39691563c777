"""How much distillation a search needs until it has found good weights: ours against Optuna's defaults.

    python -m benchmarks.search [--seeds 100] [--cap 160] [--landscape digits] [--landscape quadratic-0.05] ...
    python -m benchmarks.search --record      # the table that the digits' landscape is made of; goes on where it was

All contestants search the slope a in [-1, 5], one trial after the other, on a *landscape* whose truth is known. Work is
kimg trained, that of stopped trials included, that of controls not: whoever searches needs them. A search recommends
the best finished trial so far, by what it saw; its *regret* is the truth at that slope less the lowest truth. Reported
is the median work after which the regret is first at most R (null where the cap came first), how often it was, and the
ratio to Optuna's default (TPE on (a, b), nothing stopped) with a 95 % bootstrap interval over the simulated seeds. In
the ratio work is cut at the cap, which favours whoever misses R more often; it is null where half of the seeds miss it.

The landscapes:

- `digits`: real distillations of studies/digits.yaml, recorded in search_table.json. The truth is the mean over the
  recorded training seeds, between the recorded slopes by monotone cubics (PCHIP). The noise is what the seeds leave
  after the mean over seeds at each slope and the seed's own mean over slopes, which trials of one study share. A
  simulated seed is a random mixture of the recorded seeds' remainders, normal with their sample covariance over slopes
  and kimg: so noise depends on the slope as it does in the recording, and early scores go with late ones as they do
  there. Besides, each trial has noise of its own, as large as the difference between runs that differ by b alone.
- `quadratic-S`: the method `synthetic`, a quadratic in the endpoint's share with independent noise of sd S. Its early
  scores rank as its last ones do, noise included: the best case for stopping trials early.

The rule for R, fixed before any contestant was run: R is judged by the share of the range of a whose regret is at most
R. A share q is reached by chance after log(1/2) / log(1 - q) trials. Reported are the shares 1/4, 1/10 and 1/20, and on
the digits also absolute values: half of what endpoint only is worse than the best, 0.01 and 0.005. The aim (a fifth of
the work of Optuna's default) is judged at the share 1/10, where its R exceeds the *floor*: the median regret that is
left after an even grid of 61 whole runs on one seed. Below it the noise decides, and no search on one seed does better.
"""

import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any, Protocol

import click
import numpy as np
import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from scipy.interpolate import PchipInterpolator
from scipy.stats import bootstrap, spearmanr

from bdense_core.distill import distill
from bdense_core.errors import BadValue
from bdense_core.files import canonical_json, write_text_atomically
from bdense_core.methods.synthetic import Synthetic
from bdense_core.task import Score, Task
from bdense_core.weights import Weights, endpoint_only, log_linear
from search.samplers import make_pruner, make_sampler
from search.space import Axes, Slope
from search.spec import Study
from search.study_file import load_study, studies_folder
from search.version import code_version, source_fingerprint

Array = np.ndarray[Any, np.dtype[np.float64]]

TABLE = Path(__file__).parent / "search_table.json"
LOW, HIGH = -1.0, 5.0
"""The range of a."""
GRID: Array = np.linspace(LOW, HIGH, 1201)
"""Where the truth is looked up."""
SHARES = {"a quarter of the range": 1 / 4, "a tenth of the range": 1 / 10, "a twentieth of the range": 1 / 20}
NUM_EXHAUSTIVE = 61
"""Whole runs of the search that knows no better, which gives the floor."""


# --- the recorded table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One distillation of the table: a slope, or None for endpoint only; b, or None for weights that sum to 1."""

    a: float | None
    b: float | None
    seed: int

    def weights(self, num_branches: int) -> Weights:
        if self.a is None:
            return endpoint_only(num_branches)
        if self.b is None:
            return Slope().weights({"a": self.a}, num_branches)
        return log_linear(self.a, self.b, num_branches)


def planned(num_slopes: int = 25, seeds: Sequence[int] = (0, 1, 2)) -> list[Run]:
    """Every run of the table, coarse to fine: whatever part of it there is covers the range."""
    slopes = np.linspace(LOW, HIGH, num_slopes).tolist()
    fourths, halves, others = (
        [Run(a, None, seed) for a in some for seed in seeds] for some in (slopes[::4], slopes[2::4], slopes[1::2])
    )
    endpoint = [Run(None, None, seed) for seed in seeds]
    without_effect = [Run(a, b, seeds[0]) for a in (0.0, 2.0, 3.0) for b in (-5.0, 0.0)]
    return [*endpoint, *fourths, *without_effect, *halves, *others]


def record(study: Study, runs: Sequence[Run], path: Path) -> None:
    """Distil what the table does not hold yet, one run after the other, and store each as it ends.

    Raises:
        BadValue: the table is of other settings.
    """
    settings = json.loads(canonical_json(study.identity()))
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": settings, "runs": []}
    if table["settings"] != settings:
        raise BadValue(f"{path} holds runs of other settings than {study.name}'s; name another --table, or remove it")
    behind = {(run["a"], run["b"], run["seed"]) for run in table["runs"]}
    with tempfile.TemporaryDirectory() as cache:
        for run in runs:
            if (run.a, run.b, run.seed) not in behind:
                table["runs"].append(_distilled(study, run, Path(cache)))
                write_text_atomically(path, _text(table | {"machine": machine()}))
                click.echo(f"{len(table['runs'])} of {len(runs)}: {table['runs'][-1]}", err=True)


def _distilled(study: Study, run: Run, cache: Path) -> dict[str, Any]:
    task = study.task(run.weights(study.num_branches), run.seed, cache_root=cache)
    begin = process_time()
    scores = [event for event in distill(study.spec.method, task) if isinstance(event, Score)]
    return {
        **asdict(run),
        "kimg": [score.kimg for score in scores],
        "values": [score.value for score in scores],
        "surrogates": [score.surrogate for score in scores],
        "cpu_s": round(process_time() - begin, 1),
        "code": f"{code_version()} {source_fingerprint()}",
    }


def _text(table: dict[str, Any]) -> str:
    """JSON with a line for each run."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items() if key != "runs"]
    runs = ",\n".join(f"  {json.dumps(run)}" for run in table["runs"])
    return "{\n" + ",\n".join([*lines, f' "runs": [\n{runs}\n ]']) + "\n}\n"


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": f"{model or platform.machine()}, {os.cpu_count()} cores, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "optuna": optuna.__version__,
    }


# --- landscapes -----------------------------------------------------------------------------------------


Scores = Callable[[float], Sequence[float]]
"""What a trial at a slope reports at each step; noise of its own is drawn anew in each call."""


class Landscape(Protocol):
    """What is searched: scores as functions of the slope, lower is better."""

    steps: tuple[int, ...]
    """The kimg at which a trial reports."""
    named_regrets: dict[str, float]
    """Regrets of interest beside those that shares of the range define."""
    about: dict[str, Any]
    """What else there is to report of it."""

    def truth(self, slopes: Array) -> Array:
        """The scores without noise, [slopes, steps]."""

    def seeded(self, seed: int) -> Scores:
        """The scores as a study on one training seed sees them."""


class Recorded:
    """The digits' landscape; see the module."""

    def __init__(self, slopes: Array, values: Array, endpoint: Array, repeats: list[Array], steps: Sequence[int]):
        """
        Args:
            values: [slopes, seeds, steps].
            endpoint: of endpoint only, [seeds, steps].
            repeats: of groups of runs that differ by b alone, each [runs, steps].
        """
        self.steps = tuple(steps)
        means = values.mean(axis=1)
        self.remainders = values - means[:, None]
        self.remainders -= self.remainders.mean(axis=0)
        self.sd_by_b = np.sqrt(np.mean([group.var(axis=0, ddof=1) for group in repeats], axis=0))
        self._means = PchipInterpolator(slopes, means)
        self._remainders = PchipInterpolator(slopes, self.remainders)
        behind = float(endpoint[:, -1].mean() - self.truth(GRID)[:, -1].min())
        self.named_regrets = {"0.01": 0.01, "0.005": 0.005}
        if behind > 0:
            self.named_regrets["half of endpoint only's"] = behind / 2
        to_best = self.remainders[:, :, -1] - self.remainders[means[:, -1].argmin(), :, -1]  # [slopes, seeds]
        self.about = {
            "slopes": slopes.tolist(),
            "seeds": values.shape[1],
            "truth_at_slopes": [_rounded(value) for value in means[:, -1].tolist()],
            "endpoint_only": _rounded(float(endpoint[:, -1].mean())),
            "sd_of_difference_to_best": [_rounded(value) for value in to_best.std(axis=1, ddof=1).tolist()],
            "sd_by_b_at_steps": [_rounded(value) for value in self.sd_by_b.tolist()],
        }

    def truth(self, slopes: Array) -> Array:
        found: Array = self._means(slopes)
        return found

    def seeded(self, seed: int) -> Scores:
        random = np.random.default_rng([seed, 1])
        num_seeds = self.remainders.shape[1]
        mixture = random.normal(size=num_seeds) / math.sqrt(num_seeds - 1)

        def scores(a: float) -> Sequence[float]:
            own = random.normal(size=len(self.steps)) * self.sd_by_b
            reported: list[float] = (self._means(a) + mixture @ self._remainders(a) + own).tolist()
            return reported

        return scores


def recorded(path: Path) -> Recorded:
    """The landscape of a table, on the slopes that all of its seeds have.

    Raises:
        BadValue: there is no table, or too little in it.
    """
    if not path.exists():
        raise BadValue(f"there is no table {path}; make it with --record")
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    by_run = {Run(run["a"], run["b"], run["seed"]): run["values"] for run in runs}
    seeds = sorted({run.seed for run in by_run})
    slopes = [
        a for a in sorted({run.a for run in by_run if run.a is not None})
        if all(Run(a, None, seed) in by_run for seed in seeds)
    ]  # fmt: skip
    groups = [
        [values for run, values in by_run.items() if (run.a, run.seed) == (other.a, other.seed)]
        for other in by_run if other.b is not None
    ]  # fmt: skip
    whole = all(Run(None, None, seed) in by_run for seed in seeds)
    if len(seeds) < 2 or not {LOW, HIGH} <= set(slopes) or not whole or not groups:
        raise BadValue(f"{path} does not cover a from {LOW:g} to {HIGH:g} on two seeds; go on with --record")
    return Recorded(
        np.array(slopes),
        np.array([[by_run[Run(a, None, seed)] for seed in seeds] for a in slopes]),
        np.array([by_run[Run(None, None, seed)] for seed in seeds]),
        [np.array(group) for group in groups],
        runs[0]["kimg"],
    )


class Quadratic:
    """The method `synthetic`; see the module."""

    def __init__(self, noise: float, num_steps: int = 4) -> None:
        self.steps = tuple(range(1, num_steps + 1))
        self.named_regrets: dict[str, float] = {}
        self.about = {"sd": noise}
        self._noise = noise

    def truth(self, slopes: Array) -> Array:
        without = self._scores(0.0, 0)
        return np.array([without(a) for a in slopes.tolist()])

    def seeded(self, seed: int) -> Scores:
        return self._scores(self._noise, seed)

    def _scores(self, noise: float, seed: int) -> Scores:
        method = Synthetic(budget_kimg=self.steps[-1], noise=noise)

        def scores(a: float) -> Sequence[float]:
            weights = Slope().weights({"a": a}, method.num_branches)
            task = Task(weights=weights, seed=seed, every_kimg=1, teacher=None, evaluation=None, cache_root=None)
            return [event.value for event in distill(method, task) if isinstance(event, Score)]

        return scores


LANDSCAPES: dict[str, Callable[[Path], Landscape]] = {
    "digits": recorded,
    "quadratic-0": lambda _: Quadratic(0.0),
    "quadratic-0.01": lambda _: Quadratic(0.01),
    "quadratic-0.05": lambda _: Quadratic(0.05),
}


# --- contestants ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """Who proposes and who stops: the searched axes, and a sampler and a pruner for each seed."""

    axes: Axes
    start: Callable[[int], tuple[BaseSampler, BasePruner]]


def by_optuna(sampler: Callable[..., BaseSampler]) -> Contestant:
    """One of Optuna's samplers as it comes, on (a, b); nothing is stopped."""
    return Contestant({"a": (LOW, HIGH), "b": (-5.0, 0.0)}, lambda seed: (sampler(seed=seed), NopPruner()))


def by_study(file: str, *overrides: str) -> Contestant:
    """What a study file says, on the benchmark's range of a."""
    study = load_study(studies_folder() / file, overrides=(f"space.a=[{LOW}, {HIGH}]", *overrides))

    def start(seed: int) -> tuple[BaseSampler, BasePruner]:
        seeded = study.edited({"sampler.seed": seed})
        return make_sampler(seeded), make_pruner(seeded)

    return Contestant(study.spec.axes, start)


DEFAULT = "Optuna's default"
CONTESTANTS: dict[str, Callable[[], Contestant]] = {
    DEFAULT: partial(by_optuna, TPESampler),
    "random": partial(by_optuna, RandomSampler),
    "multivariate TPE": partial(by_study, "digits.yaml", "sampler.kind=tpe", "pruner.kind=none"),
    "GP": partial(by_study, "digits.yaml", "sampler.kind=gp", "pruner.kind=none"),
    "slope, TPE, pruned": partial(by_study, "digits-slope.yaml", "sampler.kind=tpe"),
    "slope, GP, pruned": partial(by_study, "digits-slope.yaml", "sampler.kind=gp"),
    "slope, TPE, halving": partial(
        by_study, "digits-slope.yaml", "sampler.kind=tpe", "sampler.startup_trials=4",
        "pruner.kind=successive_halving", "pruner.reduction_factor=3",
    ),
}  # fmt: skip
"""The last three are ours, the first of them studies/digits-slope.yaml as it is but for the range of a. The settings of
the halving were chosen on `quadratic-0` and other seeds."""


# --- the race -------------------------------------------------------------------------------------------


def recommendations(
    landscape: Landscape, contestant: Contestant, seed: int, cap_kimg: float
) -> Iterator[tuple[float, float]]:
    """After each trial that ends within the cap: the work so far, and the slope of the best finished trial.

    The slope is nan until a trial has finished.
    """
    sampler, pruner = contestant.start(seed)
    study, scores = optuna.create_study(sampler=sampler, pruner=pruner), landscape.seeded(seed)
    work, best = 0.0, (math.inf, math.nan)
    while True:
        trial = study.ask()
        a = {name: trial.suggest_float(name, *bounds) for name, bounds in contestant.axes.items()}["a"]
        value = math.inf
        for step, value in zip(landscape.steps, scores(a), strict=True):
            trial.report(value, step)
            if step < landscape.steps[-1] and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, value)
            best = min(best, (value, a))
        work += step
        if work > cap_kimg:
            return
        yield work, best[1]


def work_to_reach(
    landscape: Landscape, contestant: Contestant, seed: int, targets: Sequence[float], cap_kimg: float
) -> list[float]:
    """kimg until the truth of the recommendation is first at most each target; inf where the cap comes first."""
    needed = [math.inf] * len(targets)
    for work, slope in recommendations(landscape, contestant, seed, cap_kimg):
        truth = math.inf if math.isnan(slope) else landscape.truth(np.array([slope]))[0, -1]
        needed = [min(old, work) if truth <= target else old for old, target in zip(needed, targets, strict=True)]
        if max(needed) < math.inf:
            break
    return needed


def floor(landscape: Landscape, lowest: float, num_seeds: int) -> float:
    """The median regret that is left after whole runs on an even grid, all on one seed."""
    slopes = np.linspace(LOW, HIGH, NUM_EXHAUSTIVE)
    truth = landscape.truth(slopes)[:, -1]
    left = []
    for seed in range(num_seeds):
        scores = landscape.seeded(seed)
        left.append(truth[int(np.argmin([scores(a)[-1] for a in slopes.tolist()]))])
    return float(np.median(left)) - lowest


def goals(truth: Array, named_regrets: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The regrets to reach by name, each with the share of the range where the regret is at most that.

    Args:
        truth: on `GRID`.
    """
    regrets = truth - truth.min()
    wanted = {name: float(np.quantile(regrets, share)) for name, share in SHARES.items()} | named_regrets
    return {name: (regret, float(np.mean(regrets <= regret))) for name, regret in wanted.items()}


def ratio(work: Array, default: Array, cap_kimg: float) -> list[float] | None:
    """Median work over the default's, and its 95 % interval by bootstrap over seeds; None if half never came there."""
    if math.isinf(np.median(work)):
        return None
    cut = (np.minimum(work, cap_kimg), np.minimum(default, cap_kimg))

    def statistic(ours: Array, theirs: Array, axis: int = -1) -> Array:
        quotient: Array = np.median(ours, axis=axis) / np.median(theirs, axis=axis)
        return quotient

    found = bootstrap(
        cut, statistic, paired=True, vectorized=True, method="percentile", n_resamples=2000, random_state=0
    )
    return [float(statistic(*cut)), float(found.confidence_interval.low), float(found.confidence_interval.high)]


def race(landscape: Landscape, names: Sequence[str], num_seeds: int, cap_kimg: float, label: str) -> dict[str, Any]:
    """What a landscape is like, and each contestant's work on it."""
    truth = landscape.truth(GRID)
    lowest, wanted = float(truth[:, -1].min()), goals(truth[:, -1], landscape.named_regrets)
    targets = [lowest + regret for regret, _ in wanted.values()]
    work: dict[str, Array] = {}
    for name in names:
        begin, contestant = process_time(), CONTESTANTS[name]()
        work[name] = np.array(
            [work_to_reach(landscape, contestant, seed, targets, cap_kimg) for seed in range(num_seeds)]
        )
        click.echo(f"{label}, {name}: {process_time() - begin:.0f} s", err=True)
    return {
        "about": landscape.about,
        "best_slope": round(float(GRID[truth[:, -1].argmin()]), 3),
        "range_of_truth": _rounded(float(np.ptp(truth[:, -1]))),
        "floor": _rounded(floor(landscape, lowest, num_seeds)),
        "rank_correlation_with_the_end": {
            step: _rounded(float(spearmanr(truth[:, i], truth[:, -1]).statistic))
            for i, step in enumerate(landscape.steps[:-1])
        },
        "to_reach": {
            goal: {
                "regret": _rounded(regret),
                "share_of_range": _rounded(share),
                "by_chance_trials": math.ceil(math.log(0.5) / math.log1p(-share)) if share < 1 else 1,
                "contestants": {name: _outcome(work[name][:, i], work[DEFAULT][:, i], cap_kimg) for name in names},
            }
            for i, (goal, (regret, share)) in enumerate(wanted.items())
        },
    }


def _outcome(work: Array, default: Array, cap_kimg: float) -> dict[str, Any]:
    median, to_default = float(np.median(work)), ratio(work, default, cap_kimg)
    return {
        "median_kimg": None if math.isinf(median) else median,
        "reached": _rounded(float(np.isfinite(work).mean())),
        "ratio_to_default": to_default and [_rounded(value) for value in to_default],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


@click.command()
@click.option("--seeds", default=100, show_default=True, help="Simulated studies of each contestant.")
@click.option("--cap", default=160.0, show_default=True, help="kimg after which a study has missed.")
@click.option("--landscape", "labels", type=click.Choice(list(LANDSCAPES)), multiple=True, help="Default: all.")
@click.option("--contestant", "names", type=click.Choice(list(CONTESTANTS)), multiple=True, help="Default: all.")
@click.option("--table", type=click.Path(path_type=Path), default=TABLE, help="The recorded distillations.")
@click.option("--record", "is_recording", is_flag=True, help="Fill the table instead.")
def main(
    seeds: int, cap: float, labels: tuple[str, ...], names: tuple[str, ...], table: Path, is_recording: bool
) -> None:
    """Measure and print; Optuna's default always runs."""
    torch.set_num_threads(1)
    if is_recording:
        record(load_study(studies_folder() / "digits.yaml"), planned(), table)
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", ExperimentalWarning)
    result = {"machine": machine(), "seeds": seeds, "cap_kimg": cap}
    chosen = [name for name in CONTESTANTS if name in (DEFAULT, *names) or not names]
    for label in labels or LANDSCAPES:
        result[label] = race(LANDSCAPES[label](table), chosen, seeds, cap, label)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
